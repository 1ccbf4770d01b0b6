"""Processes that work together: they wait for each other, compare where they are, and exchange tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.errors import OptionError, OrderError, ProcessError
from batchnorm.moments import Moments, pool


class _Message(NamedTuple):
    """What one process tells all others when they meet."""

    label: str | None
    failure: str | None
    tensors: list[Tensor]


class Group:
    """The processes of a group; this process alone, where there is no group.

    Args:
        process_group: None for the default group where torch.distributed is initialised, and this process otherwise.

    Attributes:
        rank: this process's number in the group, from 0.
        size: how many processes there are.

    Raises:
        OptionError: this process is not in `process_group`.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        together = process_group is not None or (dist.is_available() and dist.is_initialized())
        self._group = process_group
        self.rank = dist.get_rank(process_group) if together else 0
        self.size = dist.get_world_size(process_group) if together else 1
        self._parted = False
        if self.rank < 0:
            raise OptionError("got a process group that this process is not in; only its members may call this")

    @classmethod
    def alone(cls) -> Group:
        """This process alone, whatever others there are."""
        group = cls.__new__(cls)
        group._group, group.rank, group.size, group._parted = None, 0, 1, False
        return group

    def all_gather(self, label: str | None, tensors: Sequence[Tensor] = ()) -> tuple[str | None, list[list[Tensor]]]:
        """Wait for all processes, check that they are at the same place, and hand out what each brought.

        Args:
            label: where this process is, in words; None where it has nothing to do and goes wherever the others are.
            tensors: what it brings. Of any shapes, and any number of them.

        Returns:
            The label, None where nobody has anything to do; and the tensors of every process, in the order of ranks,
            so that all compute the same bits from them. With more than one process they are on the CPU.

        Raises:
            OrderError: the processes are at different places; the same error in all of them.
            ProcessError: another process failed, or is gone.
        """
        if self.size == 1:
            return label, [list(tensors)]
        messages = self._exchange(_Message(label, None, [t.detach().cpu() for t in tensors]))
        failures = [f"rank {rank} with {m.failure}" for rank, m in enumerate(messages) if m.failure is not None]
        labels: dict[str, list[int]] = {}
        for rank, message in enumerate(messages):
            if message.label is not None:
                labels.setdefault(message.label, []).append(rank)
        if failures or len(labels) > 1:
            self._parted = True
        if failures:
            raise ProcessError(f"other processes failed: {'; '.join(failures)}. Nothing was changed in this one")
        if len(labels) > 1:
            where = "; ".join(f"{_ranks(ranks)} at {there}" for there, ranks in labels.items())
            raise OrderError(
                f"got processes at different places: {where}; all must call the same layers in the same order. Give "
                f"every process the same model, and batches that take the same path through it"
            )
        return next(iter(labels), None), [message.tensors for message in messages]

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """An exception inside is told to the others, who would wait for this process otherwise."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not self._parted:
                self._exchange(_Message(None, f"{type(error).__name__}: {error}", []))
            raise

    def all_reduce_moments(self, moments: Moments, positions: int | Tensor, label: str) -> tuple[Moments, Tensor]:
        """The moments of all processes together, the same bits in each of them.

        Args:
            moments: of this process, (C,), or of D domains, (D, C) with D counts; of nothing is allowed.
            positions: how many values of each channel this process has, whether they count in the moments or not; of D
                domains, (D,).
            label: where this process is, in words.

        Returns:
            The joined moments, whose count is floating; and the sum of the positions, () or (D,).

        Raises:
            ProcessError: another process is gone.
            OrderError: on the CPU, the processes have different numbers of channels; under
                `TORCH_DISTRIBUTED_DEBUG=DETAIL`, they are at different places.
        """
        count, channels = moments.count.to(moments.mean.dtype), moments.mean.shape[-1]
        head = torch.stack([count, torch.ones_like(count) * positions], dim=-1)
        all_of_them = self._gather(torch.cat([head, moments.mean, moments.m2], dim=-1), label)
        counts, positions_of, means, m2s = all_of_them.split([1, 1, channels, channels], dim=-1)
        return pool(counts[..., 0], means, m2s), positions_of[..., 0].sum(0)

    def all_reduce(self, tensors: Sequence[Tensor], label: str) -> list[Tensor]:
        """The sums over all processes, the same bits in each of them.

        Args:
            tensors: of this process, (C,) each.
            label: as in `all_reduce_moments`.

        Raises: as `all_reduce_moments`.
        """
        return list(self._gather(torch.stack(list(tensors)), label).sum(0))

    def _gather(self, tensor: Tensor, label: str) -> Tensor:
        """What each process has, (size, *shape), in the order of ranks."""
        if dist.get_debug_level().name == "DETAIL":  # type: ignore[attr-defined]  # not in torch's list of names
            self.all_gather(label)
        elif tensor.device.type == "cpu":
            self._agree_on_size(tensor, label)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with _partners():
            dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=self._group)
        return gathered

    def _agree_on_size(self, tensor: Tensor, label: str) -> None:
        """The same error in all processes where they bring different sizes.

        Of messages of different sizes gloo ends one process and lets another go on, with what is in its memory. A GPU
        would have to be waited for, so there it takes `TORCH_DISTRIBUTED_DEBUG=DETAIL`.
        """
        own = torch.tensor([tensor.numel(), tensor.element_size()])
        sizes = own.new_empty(self.size, len(own))
        with _partners():
            dist.all_gather(list(sizes.unbind()), own, group=self._group)
        if not torch.equal(sizes, own.expand_as(sizes)):
            self.all_gather(f"{label}, with {tensor.numel()} numbers of {tensor.dtype} to exchange")

    def _exchange(self, message: _Message) -> list[_Message]:
        messages: list[_Message | None] = [None] * self.size
        self._parted = True  # until it has succeeded: after an exchange that was cut off there can be no other
        with _partners():
            dist.all_gather_object(messages, message, group=self._group)
        self._parted = message.failure is not None
        return [m for m in messages if m is not None]


@contextmanager
def _partners() -> Iterator[None]:
    """An error of torch.distributed inside is one of the other processes."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"another process of the group is gone, or later than the group's timeout: {error}"
        ) from error


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
