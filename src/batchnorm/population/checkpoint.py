"""Progress of method "pooled" in a file, so that a run that was killed can go on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.files import check_writable, reading, replacing, steady, writing
from batchnorm.moments import Moments
from batchnorm.population.context import Context
from batchnorm.population.layers import Layer
from batchnorm.population.raw import raw
from batchnorm.population.torch_state import random_state, set_random_state

SECONDS_BETWEEN = 5.0
_FORMAT = "batchnorm pooled statistics 2"


class Checkpoint:
    """A file with the moments of the batches that were read.

    Args:
        path: the file; with several processes, one for each, with its rank at the end of the name.
        context: what is recalibrated, by what.

    Raises:
        OptionError: the file cannot be written to.
    """

    def __init__(self, path: Path, context: Context) -> None:
        group = context.group
        self._path = path if group.size == 1 else path.with_name(f"{path.name}.{group.rank}")
        check_writable(self._path, OptionError)
        self._context = context
        self._identity = _identity(context)
        self._last = time.monotonic()

    def load(self) -> dict[Layer, Moments] | None:
        """The moments in the file; None where there is none. The batches that they are of will be passed over.

        Nothing is taken from the file before all of it has been checked.

        Raises:
            OptionError: the file is damaged, of something else, or holds more batches than there are.
        """
        try:
            with reading(self._path, OptionError), self._path.open("rb") as file:
                content: Any = torch.load(file, weights_only=True, map_location="cpu")
        except OptionError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise self._unfit(f"it cannot be read ({error})") from error
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise self._unfit("it is not such a file")
        rules = self._rules()
        if set(content) != {"format", "digest", *rules}:
            raise self._unfit("its fields are not those that this writes")
        wrong = [name for name, fits in rules.items() if not fits(content[name])]
        if wrong:
            # Of another model all else is different too.
            others = "identity" in wrong and isinstance(content["identity"], str)
            raise self._unfit(
                "its model, weights, layers or processes differ"
                if others
                else f"its field {wrong[0]} is not what this writes there"
            )
        if content["digest"] != _digest(content):
            raise self._unfit("it is damaged, or was edited: its content does not match its checksum")
        if not self._context.batches.skip(content["read"], content["used"], content["samples"]):
            raise self._unfit(f"it is of {content['read']} batches, and there are fewer")
        self._context.progress.calls, self._context.progress.done = content["calls"], content["done"]
        try:
            set_random_state(list(zip([g for g, _ in random_state()], content["random"], strict=False)))
        except RuntimeError as error:
            raise self._unfit(f"its field random is not the state of a generator ({error})") from error
        return {
            layer: Moments(*(t.to(layer.mean.device) for t in values))
            for layer, values in zip(self._context.layers, content["moments"], strict=True)
        }

    def save(self, joined: Mapping[Layer, Moments], *, now: bool = False) -> None:
        """Replace the file, if it is time to: in one step, so that there is a whole one whenever this is killed.

        Raises:
            OptionError: it cannot be written.
        """
        if not now and time.monotonic() - self._last < SECONDS_BETWEEN:
            return
        batches = self._context.batches
        content = {
            "format": _FORMAT,
            "identity": self._identity,
            "read": batches.read,
            "used": batches.used,
            "samples": batches.samples,
            "calls": self._context.progress.calls,
            "done": self._context.progress.done,
            "random": [state for _, state in random_state()],
            "moments": [(m.count.cpu(), m.mean.cpu(), m.m2.cpu()) for m in joined.values()],
        }
        with writing(self._path, OptionError), replacing(self._path) as temporary, steady(temporary) as file:
            torch.save(content | {"digest": _digest(content)}, file)
        self._last = time.monotonic()

    def remove(self) -> None:
        """It is not needed any more."""
        with writing(self._path, OptionError):
            self._path.resolve().unlink(missing_ok=True)  # a link may lead to it

    def _rules(self) -> dict[str, Callable[[Any], bool]]:
        """What each field must be for this run."""
        layers = self._context.layers
        states = [state for _, state in random_state()]
        return {
            "identity": lambda value: value == self._identity,
            "read": _is_count,
            "used": _is_count,
            "samples": lambda value: value is None or _is_count(value),
            "calls": lambda value: value is None or _is_count(value),
            "done": _is_count,
            "random": lambda value: isinstance(value, list) and bool(value) and _are_states(value, states),
            "moments": lambda value: (
                isinstance(value, list) and len(value) == len(layers) and all(map(_are_moments, value, layers))
            ),
        }

    def _unfit(self, why: str) -> OptionError:
        return OptionError(
            f'got checkpoint "{self._path}" that does not fit: {why}. It must be of the same method, model and data. '
            f"Delete it to start again, or name another file"
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_states(values: list[object], now: Sequence[Tensor]) -> bool:
    """Whether these can be states of generators, of which there may be more or fewer in this process than in that."""
    return all(isinstance(v, Tensor) and v.dtype == torch.uint8 and v.layout == torch.strided for v in values) and all(
        value.shape == state.shape for value, state in zip(values, now, strict=False) if isinstance(value, Tensor)
    )


def _are_moments(value: object, layer: Layer) -> bool:
    """Whether these are moments of a layer's inputs: () count, (C,) mean and m2."""
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    if not all(isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized for t in value):
        return False
    count, mean, m2 = value
    return (
        count.dtype in (torch.int64, torch.float64)
        and mean.dtype == m2.dtype == torch.float64
        and count.shape == ()
        and mean.shape == m2.shape == (layer.num_channels,)
        and bool(torch.stack([count.isfinite(), mean.isfinite().all(), m2.isfinite().all()]).all())
        and bool((count >= 0) & (m2 >= 0).all())
    )


def _digest(content: Mapping[str, Any]) -> str:
    """A checksum of every field but itself; of fields that hold what `save` writes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(content.keys() - {"digest"}):
        digest.update(f"{name}\n".encode())
        _add(digest, content[name])
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: object) -> None:
    if isinstance(value, Tensor):
        values = value.detach().contiguous()
        digest.update(f"{values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(raw(values.data_ptr(), values.nbytes))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        digest.update(f"{len(value)} in a sequence\n".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{value!r}\n".encode())


def _identity(context: Context) -> str:
    """Layers, processes and weights as a short text; not the statistics that are going to be replaced."""
    replaced = {id(t) for layer in context.layers for t in (layer.mean, layer.var)}
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{context.group.rank} of {context.group.size}".encode())
    for layer in context.layers:
        digest.update(f"{layer.name} {layer.num_channels}\n".encode())
    for name, tensor in [*context.model.named_parameters(), *context.model.named_buffers()]:
        if id(tensor) not in replaced and not tensor.is_meta:
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(raw(values.data_ptr(), values.nbytes))
    return digest.hexdigest()
