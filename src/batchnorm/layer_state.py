"""What a layer keeps: running statistics, of each of its domains, in torch's buffers and under names beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from batchnorm.errors import OptionError
from batchnorm.rebuilding import Rebuilding
from batchnorm.statistics import Frozen, RunningStatistics

HALVES = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


class Row(NamedTuple):
    """Under which names a layer keeps what belongs to one domain: its row of the table."""

    number: int
    weight: str
    bias: str
    mean: str
    var: str
    counter: str
    skipped: str


FIRST = Row(0, "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_skipped")


def _row(number: int, name: str, own_affine: bool) -> Row:
    """The names are the first domain's with the domain's own behind; those of parameters only where it has some."""
    if number == 0:
        return FIRST
    weight, bias = (f"{kind}_{name}" if own_affine else kind for kind in ("weight", "bias"))
    return Row(number, weight, bias, *(f"{kind}_{name}" for kind in FIRST[3:]))


def check_domains(domains: Sequence[str] | None, own_affine: bool, affine: bool, track: bool) -> tuple[str, ...]:
    """The names of a layer's domains; none for a layer that does not know of any.

    Raises:
        OptionError: they are no names, or go with no such layer.
    """
    if domains is None or len(domains) == 0:
        if own_affine:
            raise OptionError(
                'got own_affine=True without domains; it gives each domain a weight and a bias. Pass domains=("a", "b")'
            )
        return ()
    names = () if isinstance(domains, str) else tuple(domains)
    if not names or not all(isinstance(name, str) and name and "." not in name for name in names):
        raise OptionError(
            f"got domains={domains!r}; it must be a sequence of names without dots, which become part of keys of the "
            f'state_dict. For example domains=("clean", "adversarial")'
        )
    if len(set(names)) < len(names):
        raise OptionError(f"got domains={names!r}; each name must be there once")
    if not track:
        raise OptionError(
            "got domains without running statistics; a domain is a set of running statistics. Leave out "
            "track_running_stats=False, or domains"
        )
    if own_affine and not affine:
        raise OptionError(
            "got own_affine=True for a layer without weight and bias. Leave one of affine=False and it out"
        )
    return names


def _at_least_float32(buffer: Tensor) -> Tensor:
    return buffer.float() if buffer.dtype in HALVES else buffer


class LayerState(Rebuilding):
    """Running statistics and parameters of each domain, and how many batches were skipped.

    Attributes:
        domains: their names; () for a layer that knows of none, which has one row all the same.
        own_affine: whether each has a weight and a bias.
    """

    domains: tuple[str, ...] = ()
    own_affine: bool = False
    frozen: Frozen
    _rows: tuple[Row, ...] = (FIRST,)
    # Which domain the samples are of: a row, or what `domains` says; None where nobody has chosen one of several.
    _row: Row | object | None = FIRST
    # What `num_batches_skipped` shows, where the running statistics are, and made again where they are others. No
    # buffer, because tools that copy, prune, broadcast or load buffers expect torch's and no others.
    _skipped: Tensor | None = None

    def _add_domains(self, names: tuple[str, ...], own_affine: bool) -> None:
        """Have a row for each domain: the first is what the layer has, the others begin as copies of it."""
        self.domains, self.own_affine = names, own_affine
        self._rows = tuple(_row(number, name, own_affine) for number, name in enumerate(names)) or (FIRST,)
        if len(names) > 1:
            self._row = None
        for row in self._rows[1:]:
            for name, first in zip(row[3:6], FIRST[3:6], strict=True):
                self.register_buffer(name, self._buffers[first].clone())  # type: ignore[union-attr]  # checked before
            self._reset_skipped_of(row, self._buffers[row.mean])
            for name, first in zip(row[1:3], FIRST[1:3], strict=True):
                if own_affine:
                    old: Tensor | None = getattr(self, first)
                    new = None if old is None else nn.Parameter(old.detach().clone(), old.requires_grad)
                    self.register_parameter(name, new)

    def _drop_domains(self, row: Row) -> None:
        """Keep one row, as the layer's only one."""
        for kind, name in zip(FIRST[1:6], row[1:6], strict=True):
            if name != kind:
                own = self._parameters if kind in ("weight", "bias") else self._buffers
                own[kind] = own[name]  # type: ignore[assignment]  # of either
        if row is not FIRST:
            vars(self)["_skipped"] = vars(self).get(row.skipped)
        for other in self._rows[1:]:
            for name in set(other[1:6]) - set(FIRST):
                (self._parameters if name in self._parameters else self._buffers).pop(name)
            vars(self).pop(other.skipped, None)
        for name in ("domains", "own_affine", "_rows", "_row"):
            vars(self).pop(name, None)

    def row_of(self, domain: str | int) -> Row:
        """The row of a domain by its name or number.

        Raises:
            OptionError: there is no such domain.
        """
        number = self.domains.index(domain) if domain in self.domains else domain
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self._rows):
            raise OptionError(
                f"got domain {domain!r}; this layer has {', '.join(map(repr, self.domains)) or 'no domains'}. Give one "
                f"of these names, or its number from 0"
            )
        return self._rows[number]

    def statistics_of(self, domain: str | int = 0) -> RunningStatistics:
        """The running statistics of a domain, as they are stored: a change in place is one of the layer.

        A layer without domains has one, number 0.

        Args:
            domain: its name, or its number from 0.

        Returns:
            `mean` and `var`, (C,); `num_batches_tracked`, (); `num_batches_skipped`, (C,) or None; the momentum.

        Raises:
            OptionError: there is no such domain, or the layer has no running statistics.
        """
        row = self.row_of(domain)
        mean, var = getattr(self, row.mean), getattr(self, row.var)
        if mean is None or var is None:
            raise OptionError("got a layer without running statistics; make it with track_running_stats=True")
        return self._running(row, mean, var)

    def _reset_skipped(self) -> None:
        """Nothing was skipped of these. Those that only stand for others get no counter: it would outlive them."""
        for row in self._rows:
            self._reset_skipped_of(row, self._buffers.get(row.mean))

    def _reset_skipped_of(self, row: Row, mean: Tensor | None) -> None:
        counter = None
        if mean is not None and type(mean) in _PLAIN and not mean.is_meta:
            counter = torch.zeros_like(mean, dtype=torch.int64)
        setattr(self, row.skipped, counter)

    def _widen_statistics(self) -> None:
        """Give running statistics the dtype that a running average needs."""
        for name in self._statistics_names():
            if (buffer := self._buffers.get(name)) is not None:
                self._buffers[name] = _at_least_float32(buffer)

    def _statistics_names(self) -> list[str]:
        return [name for row in self._rows for name in (row.mean, row.var)]

    @property
    def num_batches_skipped(self) -> Tensor | None:
        """(C,) int64, or None: see the class. Of several domains, the first one's."""
        mean, var = self.running_mean, self.running_var
        return None if mean is None or var is None else self._running(FIRST, mean, var).num_batches_skipped

    def _running_of_each(self) -> tuple[RunningStatistics, ...]:
        """The running statistics of every domain."""
        own = self._buffers  # attributes take several times as long
        return tuple(
            self._running(
                row,
                own[row.mean] if row.mean in own else getattr(self, row.mean),  # type: ignore[arg-type]  # there are
                own[row.var] if row.var in own else getattr(self, row.var),  # type: ignore[arg-type]  # some
            )
            for row in self._rows
        )

    def _running(self, row: Row, mean: Tensor, var: Tensor) -> RunningStatistics:
        """The running statistics and how they move."""
        skipped: Tensor | None = getattr(self, row.skipped)
        if type(mean) not in _PLAIN:  # the counter cannot be changed with it
            skipped = None
        elif skipped is None or skipped.shape != mean.shape or skipped.device != mean.device:
            self._reset_skipped_of(row, mean)
            skipped = getattr(self, row.skipped)
        return RunningStatistics(mean, var, self._buffers[row.counter], skipped, self._momentum)

    def reset_running_stats(self) -> None:
        """Reset running statistics and counters, `num_batches_skipped` too, as torch's layers do, in every domain.

        Frozen statistics stay: `torch.optim.swa_utils.update_bn` begins with this.
        """
        if "frozen" in vars(self) and self.frozen.statistics:  # torch's constructor comes here before ours is done
            return
        super().reset_running_stats()
        for row in self._rows[1:]:
            for name, value in ((row.mean, 0), (row.var, 1), (row.counter, 0)):
                self._buffers[name].fill_(value)  # type: ignore[union-attr]  # they are always there
        self._reset_skipped()

    def reset_parameters(self) -> None:
        """The initial values again, of every domain."""
        super().reset_parameters()
        for row in self._rows[1:]:
            for name, value in ((row.weight, 1.0), (row.bias, 0.0)):
                if (parameter := self._parameters.get(name)) is not None:
                    nn.init.constant_(parameter, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Torch's `.to()`, `.half()` and the like, but running statistics keep the precision that they had."""
        before = {name: self._buffers.get(name) for name in self._statistics_names()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype in HALVES:
                self._buffers[name] = _at_least_float32(old.to(new.device))
        for row in self._rows:
            mean, skipped = self._buffers.get(row.mean), getattr(self, row.skipped, None)
            if mean is not None and skipped is not None:
                setattr(self, row.skipped, None if mean.is_meta else skipped.to(mean.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # noqa: ANN401 - torch's own has no types
        """torch's; what a checkpoint assigns in half precision becomes float32, and nothing was skipped since.

        From a checkpoint without any domain but the first, the others take the values of that one.
        """
        others = [
            (name, first)
            for row in self._rows[1:]
            for name, first in zip(row[1:6], FIRST[1:6], strict=True)
            if name != first
        ]
        if not any(prefix + name in state_dict for name, _ in others):
            for name, first in others:
                if prefix + first in state_dict:
                    state_dict[prefix + name] = state_dict[prefix + first].clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._widen_statistics()
        self._reset_skipped()

    def __getstate__(self) -> dict[str, Any]:
        """Without a domain that was chosen for a while: the copy is not in that context, whose end would not come."""
        state = vars(self).copy()
        state.pop("_row", None)
        return state | ({"_row": None} if len(self._rows) > 1 else {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that refers to the same processes: their group is a handle, which cannot be copied."""
        group = vars(self).get("process_group")
        memo[id(group)] = group
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied
