"""A batch whose samples come from several domains: each is normalised by its own domain's moments, in one pass.

Moments here are those of D domains, stacked: count (D,), mean and m2 (D, C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm import _torch, autograd, functional, ghost, layout, ops, sync
from batchnorm.call import Assignment, Call, check_virtual_batch_size, empty_output, wrong_eps
from batchnorm.errors import CountError, OptionError
from batchnorm.kernels import aten
from batchnorm.kernels.reference import statistics_dtype
from batchnorm.moments import Moments, pool
from batchnorm.recording import RECORDERS
from batchnorm.statistics import BatchStatistics, DomainStatistics, RunningStatistics, SyncStatistics


def normalize(call: Call, statistics: BatchStatistics | SyncStatistics, names: Sequence[str]) -> tuple[Tensor, Moments]:
    """`functional.normalize` of a call with an assignment.

    A domain without samples has empty moments. Virtual batches are those that the domain's samples alone would make.

    Args:
        call: what is normalised.
        statistics: of the batch, or of a batch that processes share, whatever domains their parts hold.
        names: of the domains, for errors.

    Raises:
        CountError: a domain has one value for each channel.
        Others as `functional.normalize`.
    """
    if not 0 < call.eps < math.inf:
        raise wrong_eps(call.eps)
    if ops.read_by_others():
        aten.refuse("samples of several domains")
    if call.channel_dim == 0:
        y, moments = normalize(_samples_first(call), statistics, names)
        return layout.laid_out(y.movedim(1, 0), call.x), moments
    if isinstance(statistics, SyncStatistics):
        return sync.normalize(call, statistics)
    if call.x.numel() == 0:
        return empty_output(call), _empty(call)
    size = statistics.virtual_batch_size
    check_virtual_batch_size(size)
    if size is not None:
        return _normalize_ghost_batches(call, size, names)
    _check_counts(call, names)
    if statistics.correction is not None:
        call = call.corrected(*statistics.correction(batch_moments(call)))
    return _normalize(call)


def normalize_and_commit(call: Call, running: DomainStatistics, names: Sequence[str]) -> Tensor:
    """`normalize` by the batch, and `functional.commit` of its moments to each domain's statistics, which were checked.

    In one function of autograd's where that can be: small inputs feel every call.
    """
    simple = call.channel_dim != 0 and call.x.numel() > 0 and 0 < call.eps < math.inf
    operations = ops.select(call.x, call.mask, call.activation, domains=True)
    if simple and operations.eager:
        _check_counts(call, names)
        assignment = _assignment(call)
        target = running if _torch.current_backward() == -1 else None
        options = (call.eps, call.channel_dim, call.activation)
        table = (assignment.domain, len(assignment.samples))
        if operations.train_domains is not None and (recorded := _for_node(call, target)) is not None:
            inputs = (call.x, call.weight, call.bias, call.residual)
            return operations.train_domains(*inputs, *options, call.mask, *table, *recorded)
        tensors = (call.x, call.weight, call.bias, call.residual, call.mask)
        y: Tensor = autograd.plain_apply(*tensors, options, operations, target, True, *table)
        if RECORDERS:
            autograd.record(y, call, operations, running.of_each[0].mean)
        return y
    y, moments = normalize(call, BatchStatistics(), names)
    if not _torch.in_backward_recompute():
        for number, statistics in enumerate(running.of_each):
            functional.commit(moments, statistics, number)
    return y


def _for_node(call: Call, running: DomainStatistics | None) -> tuple[list[Tensor], float | None] | None:
    """The statistics to commit to and the momentum, as `train_domains` takes them; None where Python records the call.

    When it does is what `functional.normalize_and_commit` says.
    """
    x, residual = call.x, call.residual
    recorded = x.requires_grad or (residual is not None and residual.requires_grad)
    if type(x) is not Tensor or RECORDERS or not (recorded or not torch.is_grad_enabled()):
        return None
    if running is None:
        return [], None
    tensors = [t for of_domain in running.of_each for t in of_domain[:4] if t is not None]
    return (tensors, running.of_each[0].momentum) if len(tensors) == 4 * len(running.of_each) else None


def normalize_by_running(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """`functional.normalize_by_running` of a call with an assignment, by tables that nobody changes, (D, C)."""
    if not 0 <= call.eps < math.inf:
        raise OptionError(f"got eps={call.eps}; eps must be finite and not negative. torch's default is 1e-5")
    x = call.x
    if x.numel() == 0:
        return empty_output(call)
    if call.channel_dim == 0:
        y = normalize_by_running(_samples_first(call), mean, var)
        return layout.laid_out(y.movedim(1, 0), x)
    layout.check_device(mean, "running_mean", x.device)
    layout.check_device(var, "running_var", x.device)
    operations = ops.select(x, None, call.activation, domains=True)
    if not torch.is_grad_enabled() or operations is ops.DIFFERENTIABLE or mean.requires_grad or var.requires_grad:
        if torch.is_grad_enabled():
            operations = ops.DIFFERENTIABLE
        return operations.normalize(x, mean, var, *call.arguments, _assignment(call).domain)
    output: Tensor = autograd.apply(call, operations, RunningStatistics(mean.detach(), var.detach()))
    return output


def batch_moments(call: Call, statistics: BatchStatistics | SyncStatistics | None = None) -> Moments:
    """The moments of each domain alone, for a layer that normalises by others but proposes these."""
    if isinstance(statistics, SyncStatistics):
        return sync.batch_moments(call, statistics)
    if call.x.numel() == 0:
        return _empty(call)
    call = _samples_first(call) if call.channel_dim == 0 else call
    x, assignment = call.x.detach(), _assignment(call)
    operations = ops.select(x, call.mask, domains=True)
    moments = operations.batch_moments(x, call.channel_dim, call.mask, assignment.domain, len(assignment.samples))
    return Moments(*moments)


def _assignment(call: Call) -> Assignment:
    assert call.assignment is not None
    return call.assignment


def _empty(call: Call) -> Moments:
    """Of no samples in every domain."""
    domains = len(_assignment(call).samples)
    dtype, device = statistics_dtype(call.x.device), call.x.device
    zeros = torch.zeros(domains, call.num_channels, dtype=dtype, device=device)
    return Moments(torch.zeros(domains, dtype=torch.int64, device=device), zeros, zeros.clone())


def _samples_first(call: Call) -> Call:
    """The same with the channels in the second dimension, as the kernels need them, instead of the first."""
    residual = None if call.residual is None else call.residual.movedim(0, 1)
    return call.replace(x=call.x.movedim(0, 1), residual=residual, channel_dim=1)


def _check_counts(call: Call, names: Sequence[str]) -> None:
    """Raises CountError where a domain has one value for each channel; graphs are for any assignment."""
    if torch.compiler.is_compiling():
        return
    samples = _assignment(call).samples
    if 1 in samples and call.count == call.num_samples:
        raise _one_value(call, names[samples.index(1)])


def _one_value(call: Call, name: str, how: str = "") -> CountError:
    return CountError(
        f"got an input of shape {tuple(call.x.shape)}{how} with one value for each channel in domain {name!r}; "
        f"expected more than 1 value per channel when training, because the variance of one value is 0. Give that "
        f"domain more samples of this batch, or none"
    )


def _normalize(call: Call) -> tuple[Tensor, Moments]:
    """Each domain's samples by the moments of these."""
    operations = ops.select(call.x, call.mask, call.activation, domains=True)
    assignment = _assignment(call)
    if operations.differentiable:
        table = (assignment.domain, len(assignment.samples))
        y, *moments = operations.forward(call.x, *call.arguments, call.mask, *table)
        return y, Moments(*(t.detach() for t in moments))
    y, *moments = autograd.apply(call, operations)
    return y, Moments(*moments)


# Not in a compiled graph: which ghost batches there are depends on the samples' domains.
@_torch.outside_graphs
def _normalize_ghost_batches(call: Call, size: int, names: Sequence[str]) -> tuple[Tensor, Moments]:
    """Every `size` samples of a domain by their own moments; the moments of each domain. A ghost batch is a domain."""
    assignment = _assignment(call)
    of_sample = call.count // max(1, call.num_samples)
    ghost_of_sample = torch.empty_like(assignment.domain)
    domain_of_ghost: list[int] = []
    samples_of_ghost: list[int] = []
    for domain, name in enumerate(names):
        samples = (assignment.domain == domain).nonzero().flatten()
        if not len(samples):
            continue
        for first, ghosts, of_each in ghost.parts(len(samples), size):
            if of_each * of_sample == 1:
                raise _one_value(call, name, f" in ghost batches of {size}")
            numbers = torch.arange(ghosts, device=samples.device) + len(domain_of_ghost)
            ghost_of_sample[samples[first : first + ghosts * of_each]] = numbers.repeat_interleave(of_each)
            domain_of_ghost += [domain] * ghosts
            samples_of_ghost += [of_each] * ghosts
    rows = torch.tensor(domain_of_ghost, device=call.x.device)
    weight, bias = (t if t is None or t.dim() == 1 else t.index_select(0, rows) for t in (call.weight, call.bias))
    ghosts_of = call.replace(weight=weight, bias=bias, assignment=Assignment(ghost_of_sample, tuple(samples_of_ghost)))
    y, each = _normalize(ghosts_of)
    pooled = [
        pool(each.count[rows == domain], each.mean[rows == domain], each.m2[rows == domain])
        for domain in range(len(names))
    ]
    return y, Moments(*(torch.stack([getattr(m, name) for m in pooled]) for name in ("count", "mean", "m2")))
