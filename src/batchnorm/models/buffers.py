"""The buffers of a model: saved, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm._torch import buffers_of
from batchnorm.errors import OptionError

Step = tuple[str, Callable[[], object]]  # what is put back, and how


def put_back(steps: Iterator[Step]) -> None:
    """Take every step, whatever the others do.

    Raises:
        OptionError: some failed; it names all of them.
    """
    failed: list[str] = []
    first: Exception | None = None
    for what, step in steps:
        try:
            step()
        except Exception as error:
            first = first or error
            failed.append(f"{what} ({type(error).__name__}: {error})")
    if failed:
        raise OptionError(
            f"could not put back {len(failed)} of the things that a forward pass changed: {'; '.join(failed)}. "
            f"Everything else is as it was. Load these from a checkpoint, and do not change them in forward"
        ) from first


class SavedBuffers:
    """Every buffer of a model as it is now: the tensors, by module and name, and their values.

    Args:
        model: any module. Buffers without values (lazy ones, those on the device "meta") are saved as objects alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(module, dict(buffers_of(module))) for module in model.modules()]
        self._saved: dict[Tensor, _Saved] = {}
        for path, module in model.named_modules():
            for name, buffer in buffers_of(module).items():
                if buffer is not None and not buffer.is_meta and not torch.nn.parameter.is_lazy(buffer):
                    self._saved[buffer] = _Saved.of(buffer, f"{path}.{name}".lstrip("."))

    def accept(self, buffers: Iterable[Tensor]) -> Iterator[Step]:
        """Let buffers keep the values that they have by the time of `restore`. Returns what would put them back."""
        taken = {buffer: self._saved.pop(buffer) for buffer in buffers if buffer in self._saved}
        return _steps(taken)

    def restore(self) -> None:
        """Put everything back.

        Raises:
            OptionError: some could not be; all others are.
        """
        put_back(self.steps())

    def steps(self) -> Iterator[Step]:
        """What there is to put back."""
        yield "the names of buffers", self._restore_objects
        yield from _steps(self._saved)

    def _restore_objects(self) -> None:
        for module, named in self._buffers:
            if list(map(id, buffers_of(module).values())) != list(map(id, named.values())):
                buffers_of(module).clear()
                buffers_of(module).update(named)


class _Place(NamedTuple):
    """Where the values of a strided tensor lie."""

    storage: torch.UntypedStorage
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Place | None:
        """None for a tensor that keeps its values in another way."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
            return None
        return cls(tensor.untyped_storage(), int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor's values lie here."""
        return _Place.of(tensor) == self


class _Saved(NamedTuple):
    """A buffer as it was."""

    name: str
    value: Tensor
    place: _Place | None

    @classmethod
    def of(cls, buffer: Tensor, name: str) -> _Saved:
        return cls(name, buffer.detach().clone(), _Place.of(buffer))

    def write_back(self, buffer: Tensor) -> None:
        with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
            if self.place is None or not self._has_room():
                buffer.data = self.value  # the object stays, whatever its shape and layout were and are
                return
            if not self.place.is_of(buffer):
                buffer.set_(*self.place)
            # Only what differs: a write would tell a graph that saved the buffer that it is no longer what it was.
            if not torch.equal(buffer, self.value):
                buffer.copy_(self.value)

    def _has_room(self) -> bool:
        """Whether the storage is still as large as it has to be."""
        assert self.place is not None
        last = sum((n - 1) * step for n, step in zip(self.place.shape, self.place.stride, strict=True))
        needed = (self.place.offset + last + 1) * self.value.element_size()
        return 0 in self.place.shape or self.place.storage.nbytes() >= needed


def _steps(saved: dict[Tensor, _Saved]) -> Iterator[Step]:
    for buffer, before in saved.items():
        yield f'buffer "{before.name}"', functools.partial(before.write_back, buffer)
