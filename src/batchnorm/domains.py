"""A layer with several domains, called for samples of more than one, or by a mixture of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import autograd, functional, mixed
from batchnorm._torch import in_backward_recompute, in_functorch, saves_through_hooks
from batchnorm.call import Assignment, Call
from batchnorm.errors import OptionError
from batchnorm.kernels.running_statistics import check_running
from batchnorm.layer_state import LayerState, Row
from batchnorm.moments import Moments
from batchnorm.statistics import BatchStatistics, DomainStatistics, Frozen, RunningStatistics, SyncStatistics


class Mixture(NamedTuple):
    """The population that has samples of each domain, by these weights, which sum to 1."""

    weights: tuple[float, ...]


class DomainLayer(LayerState):
    """What `BatchNorm` does where its samples are not all of one domain."""

    channel_dim: int
    frozen: Frozen
    inplace: bool
    renorm: object
    sync: bool
    virtual_batch_size: int | None

    def _forward_by_domain(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None
    ) -> Tensor:
        """`forward`, by a domain for each sample, or by a mixture."""
        training, frozen = self.training, self.frozen
        by_running = not training or frozen.normalization
        weight, bias = self._affine_tables()
        assignment = self._assignment(input)
        if assignment is None:
            mean, var = self._mixture(by_running)
            call = Call(input, weight, bias, residual, None, self._eps, self.channel_dim, activation)
            return functional.normalize_by_running(call, mean, var, inplace=self.inplace and not training)
        moves = self.track_running_stats and not frozen.statistics and training
        moves = moves and (input.numel() > 0 or self.sync)
        if by_running and not moves:
            mask = None  # no effect
        call = Call(input, weight, bias, residual, mask, self._eps, self.channel_dim, activation, assignment)
        running = self._running_of_each()
        if moves:
            for mean, var, counter, _, momentum in running:
                check_running(mean, var, counter, momentum, self._num_features, input.device)
        moments = None
        plain = self.renorm is None and self.virtual_batch_size is None and not self.sync
        if moves and plain and not by_running and self._receiver is None and not self._listeners:
            return mixed.normalize_and_commit(call, DomainStatistics(running), self.domains)
        if by_running:
            mean, var = (torch.stack([statistics[i] for statistics in running]) for i in (0, 1))  # type: ignore[misc]
            output = mixed.normalize_by_running(call, mean, var)
            if moves:
                moments = mixed.batch_moments(call, self._statistics())
        else:
            output, moments = mixed.normalize(call, self._statistics(), self.domains)
        if moves and moments is not None:
            self._propose_all(moments, running)
        if self.inplace and not training and not torch.is_grad_enabled():
            return input.copy_(output)
        return output

    def _marked(self, output: Tensor) -> Tensor:
        """The output, which a repetition for other domains does not give again: where one may come, it will raise."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_functorch() or not saves_through_hooks():
            return output
        choice = self._row
        if isinstance(choice, Row):
            return autograd.marked(output, choice.number)
        if isinstance(choice, Assignment):
            return autograd.marked(output, len(self._rows) + choice.mark)
        return output

    def _assignment(self, input: Tensor) -> Assignment | None:
        """The domain of each sample; None for a mixture.

        Raises:
            OptionError: nobody has chosen.
        """
        choice = self._row
        if isinstance(choice, Assignment):
            return choice if choice.domain.device == input.device else choice.to(input.device)
        if isinstance(choice, Mixture):
            return None
        if isinstance(choice, Row):  # of processes that may have other domains
            samples = input.shape[1 if self.channel_dim == 0 else 0]
            domain = torch.full((samples,), choice.number, device=input.device)
            return Assignment(domain, tuple(samples if row is choice else 0 for row in self._rows))
        names = ", ".join(f'"{name}"' for name in self.domains)
        raise OptionError(
            f"got a call without a choice of one of the domains {names}, each of which has statistics of its own. Call "
            f'the model inside "with batchnorm.domain(model, "{self.domains[0]}"):", or give a domain for each sample '
            f"instead of the name; a pass that activation checkpointing repeats needs the choice in the backward pass "
            f"too"
        )

    def _affine_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias: (C,), or (D, C) where each domain has its own."""
        if not self.own_affine:
            own = self._parameters  # attributes take several times as long, and `get` would look at them all the same
            weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401 - not `get`: see above
            bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 - likewise
            return self._learning(weight, bias)
        tables: list[Tensor | None] = []
        for kind in ("weight", "bias"):
            rows: list[Tensor | None] = [getattr(self, getattr(row, kind)) for row in self._rows]
            table = [t for t in rows if t is not None]
            tables.append(torch.stack(table) if table else None)
        return self._learning(tables[0], tables[1])

    def _learning(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both, as constants where they are frozen."""
        if not self.frozen.affine:
            return weight, bias
        return None if weight is None else weight.detach(), None if bias is None else bias.detach()

    def _mixture(self, by_running: bool) -> tuple[Tensor, Tensor]:
        """Mean and variance of the mixture: of moments that weigh as much as their domain."""
        if not by_running:
            raise OptionError(
                "got a mixture of domains in training, which normalises each domain by its own samples. Give a domain "
                "for each sample, or call .eval() first"
            )
        choice = self._row
        assert isinstance(choice, Mixture)
        return self.mixture_of(choice)

    def mixture_of(self, choice: Mixture) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, of a mixture of the domains.

        Raises:
            OptionError: each domain has a weight and a bias of its own.
        """
        if self.own_affine:
            raise OptionError(
                "got a mixture of domains for a layer with own_affine=True; statistics have a mixture, the domains' "
                "weights and biases do not. Choose one domain"
            )
        return mixture(choice.weights, [self.statistics_of(row.number) for row in self._rows])

    def _propose_all(self, moments: Moments, running: tuple[RunningStatistics, ...]) -> None:
        """Commit each domain's moments, or hand them to whoever collects them."""
        if in_backward_recompute():
            return
        if self._receiver is None and not self._listeners:
            for number, statistics in enumerate(running):
                functional.commit(moments, statistics, number)
            return
        for row, own in zip(self._rows, self._each(moments), strict=True):
            self._propose(own, row)

    def _each(self, moments: Moments) -> list[Moments]:
        """The domains' moments one by one."""
        of_each = (t.unbind() for t in (moments.count, moments.mean, moments.m2))
        return [Moments(*own) for own in zip(*of_each, strict=True)]

    # What `BatchNorm` defines.
    _receiver: Any
    _listeners: Any

    def _statistics(self) -> BatchStatistics | SyncStatistics:
        raise NotImplementedError

    def _propose(self, proposal: Moments, row: Row) -> None:
        raise NotImplementedError


def mixture(weights: tuple[float, ...], statistics: list[RunningStatistics]) -> tuple[Tensor, Tensor]:
    """Mean and variance, (C,) each, of the population that the domains' populations make together by these weights."""
    parts = []
    for weight, (mean, var, *_) in zip(weights, statistics, strict=True):
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        count = torch.full((), weight, dtype=wide, device=mean.device)
        parts.append(Moments(count, mean.to(wide), var.to(wide) * count))
    joined = sum(parts[1:], start=parts[0])
    return joined.mean, joined.m2 / joined.count
