"""One model's statistics from those of many: federated clients, processes, models to be merged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import CountError, NonFiniteError, OptionError
from batchnorm.models.norm_layers import display_name, unwrapped
from batchnorm.moments import Moments, pool

_MEAN, _VAR, _COUNTER = "running_mean", "running_var", "num_batches_tracked"
_SHOWN = 10  # names of a list

Source = nn.Module | Mapping[str, Any]


class Unpooled(NamedTuple):
    """A layer whose statistics are the first source's alone, or that the first does not have; and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class PooledStatistics:
    """One state from many. Prints as a summary.

    Attributes:
        state_dict: the first source's state_dict with the pooled statistics in it, to be loaded with `strict=True`
            where the first can be.
        pooled: the layers whose statistics are pooled.
        unpooled: the layers that do not match in all sources, and why: their entries are the first's.
        copied: the entries that are the first's as they are: weights and all else, of unpooled layers too.
    """

    state_dict: dict[str, Any]
    pooled: tuple[str, ...]
    unpooled: tuple[Unpooled, ...]
    copied: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"statistics pooled: {_listed(self.pooled)}", f"from the first alone: {_listed(self.copied)}"]
        return "\n".join(lines + [f"not pooled: {name} ({reason})" for name, reason in self.unpooled])


def pool_statistics(sources: Sequence[Source], counts: Sequence[float | Mapping[str, float]]) -> PooledStatistics:
    """Pool the running statistics of several models of one architecture: those of all their data in one place.

        mean = Σ w_i mean_i,    var = Σ w_i (var_i + (mean_i - mean)^2),    w_i = counts_i / Σ counts

    The variance between the models is part of the variance; an average of variances leaves it out. Only running
    statistics are pooled; weights are for other tools to average. A batch-norm layer is known by its running_mean and
    running_var. `num_batches_tracked` is never averaged: it becomes the largest, so that an average of all batches
    (momentum=None) and schedules of `Renorm` go on from the model that is furthest.

    It is exact where each model's statistics are those of its own data under equal weights of the layers before, as
    after `recalibrate` of one model on parts of the data by method "pooled"; of models that have trained apart it is
    the statistics of what each sees of its own data.

    Args:
        sources: models or state_dicts, one at least; none is changed. Wrappers of models are looked through.
        counts: how many samples each has seen, >= 0: only their ratios matter. For layers with domains, instead of a
            number, a mapping from each domain to one; each domain is pooled by itself.

    Returns:
        A `PooledStatistics`: a state_dict to load, and what did not match.

    Raises:
        OptionError: no source, another number of counts than of sources, a count that is below 0 or not finite, a
            domain without a count, a variance below 0, or no layer that can be pooled.
        CountError: all counts are 0.
        NonFiniteError: statistics of inf or NaN, or that the first's dtype cannot hold.

    Example:
        >>> import torch, batchnorm as bn
        >>> a, b = bn.BatchNorm1d(1), bn.BatchNorm1d(1)
        >>> _ = b.running_mean.fill_(4.0)
        >>> pooled = bn.pool_statistics([a, b], counts=[100, 100])
        >>> pooled.state_dict["running_mean"].item(), pooled.state_dict["running_var"].item()
        (2.0, 5.0)

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    states = [unwrapped(s).state_dict() if isinstance(s, nn.Module) else s for s in sources]
    _check(states, counts)
    # A copy that keeps what torch.save and load_state_dict look for: the versions of modules.
    result: dict[str, Any] = copy.copy(states[0]) if isinstance(states[0], dict) else dict(states[0])
    pooled: list[str] = []
    unpooled: list[Unpooled] = []
    rows = list(dict.fromkeys(row for state in states for row in _rows(state)))
    domains = {row.domain for row in rows}
    for row in rows:
        weights = [_weight(count, row.domain, domains) for count in counts]
        reason = _mismatch(row, states) or (None if any(weights) else "all counts are 0")
        if reason is not None:
            unpooled.append(Unpooled(row.name, reason))
            continue
        result.update(_pooled(row, states, weights))
        pooled.append(row.name)
    if not pooled:
        raise OptionError(
            f"got {len(states)} sources without a batch-norm layer that all have, with running_mean and running_var of "
            f"one shape: {'; '.join(f'{name}: {reason}' for name, reason in unpooled[:_SHOWN]) or 'there is none'}. "
            f"Give models of one architecture, or their state_dicts"
        )
    return PooledStatistics(
        result, tuple(pooled), tuple(unpooled), tuple(name for name in result if result[name] is states[0][name])
    )


def _check(states: Sequence[Mapping[str, Any]], counts: Sequence[float | Mapping[str, float]]) -> None:
    if not states or len(states) != len(counts):
        raise OptionError(
            f"got {len(states)} sources and {len(counts)} counts; there must be one source at least, and a number of "
            f"samples for each"
        )
    numbers = [n for count in counts for n in (count.values() if isinstance(count, Mapping) else (count,))]
    wrong = next((n for n in numbers if not 0 <= n < math.inf), None)
    if wrong is not None:
        raise OptionError(f"got a count of {wrong}; each must be a finite number of samples >= 0")
    if not any(numbers):
        raise CountError("got counts that are all 0; there is nothing to pool. Give how many samples each source saw")


def _weight(count: float | Mapping[str, float], domain: str, domains: Set[str]) -> float:
    """What a source weighs in a domain; "" is the first, whose name a state does not have."""
    if not isinstance(count, Mapping):
        return float(count)
    named = [name for name in count if name == domain or (not domain and name not in domains)]
    if len(named) != 1:
        which = f'the domain "{domain}"' if domain else "the first domain"
        raise OptionError(
            f"got counts for {', '.join(map(repr, count)) or 'no domain'}; there must be one for {which}, and for each "
            f"of the others. Give 0 where a source has seen nothing of a domain"
        )
    return float(count[named[0]])


class _Row(NamedTuple):
    """A layer's statistics, of one domain.

    Attributes:
        prefix: of the layer's keys.
        domain: "" for the first, or for a layer without domains: its keys are torch's.
    """

    prefix: str
    domain: str

    def key(self, kind: str) -> str:
        """The state_dict's key."""
        return f"{self.prefix}{kind}_{self.domain}" if self.domain else self.prefix + kind

    @property
    def name(self) -> str:
        """In words."""
        layer = display_name(self.prefix.removesuffix("."))
        return f"{layer} ({self.domain})" if self.domain else layer


def _rows(state: Mapping[str, Any]) -> list[_Row]:
    """What of a state is statistics: pairs of running_mean and running_var."""
    found = []
    for key in state:
        prefix, dot, last = key.rpartition(".") if isinstance(key, str) else ("", "", "")
        kind, _, domain = last.partition(f"{_MEAN}_")
        if last == _MEAN or (not kind and domain):
            row = _Row(prefix + dot, domain)
            if row.key(_VAR) in state:
                found.append(row)
    return found


def _mismatch(row: _Row, states: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a layer cannot be pooled; None if it can."""
    shapes = []
    for number, state in enumerate(states):
        if row.key(_MEAN) not in state or row.key(_VAR) not in state:
            return f"source {number} does not have it"
        mean, var = state[row.key(_MEAN)], state[row.key(_VAR)]
        for statistic in (mean, var):
            if not isinstance(statistic, Tensor) or not statistic.is_floating_point() or statistic.is_meta:
                what = statistic.dtype if isinstance(statistic, Tensor) else type(statistic).__name__
                return f"source {number} has no floating values there, but {what}"
        if mean.shape != var.shape:
            return f"source {number} has means of shape {tuple(mean.shape)} and variances of {tuple(var.shape)}"
        shapes.append(tuple(mean.shape))
    other = next((number for number, shape in enumerate(shapes) if shape != shapes[0]), None)
    return None if other is None else f"shape {shapes[0]} in source 0 and {shapes[other]} in source {other}"


def _pooled(row: _Row, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Tensor]:
    """A layer's entries."""
    parts = []
    for number, (state, weight) in enumerate(zip(states, weights, strict=True)):
        if weight:  # what nothing was seen for may be anything
            mean, var = (state[row.key(kind)].detach().to("cpu", torch.float64) for kind in (_MEAN, _VAR))
            _check_values(mean, var, f'layer "{row.name}" of source {number}')
            parts.append(Moments(torch.tensor(weight, dtype=torch.float64), mean, var * weight))
    whole = pool(*(torch.stack([getattr(part, of) for part in parts]) for of in ("count", "mean", "m2")))
    entries = {}
    for kind, value in ((_MEAN, whole.mean), (_VAR, whole.m2 / whole.count)):
        first = states[0][row.key(kind)]
        rounded = entries[row.key(kind)] = value.to(first.device, first.dtype)
        if not bool(rounded.isfinite().all()):
            raise NonFiniteError(
                f'layer "{row.name}": got pooled statistics up to {float(value.abs().max()):.3g} that {first.dtype} '
                f"cannot hold; they must be finite. Keep running statistics in float32: batchnorm.convert(model)"
            )
    counters = [state.get(row.key(_COUNTER)) for state in states]
    if isinstance(counters[0], Tensor):
        largest = max(int(counter) for counter in counters if isinstance(counter, Tensor))
        entries[row.key(_COUNTER)] = torch.full_like(counters[0], largest)
    return entries


def _check_values(mean: Tensor, var: Tensor, where: str) -> None:
    if not bool((mean.isfinite() & var.isfinite()).all()):
        raise NonFiniteError(
            f"{where}: got running statistics that are inf or NaN; they must be finite. Recalibrate that model first, "
            f"or leave it out"
        )
    if bool((var < 0).any()):
        raise OptionError(
            f"{where}: got a running_var of {float(var.min()):.3g}; a variance is not below 0. Recalibrate that model "
            f"first, or leave it out"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
