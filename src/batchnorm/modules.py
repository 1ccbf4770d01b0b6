"""Layers that replace torch's: the same state, the same `isinstance`, the same results within rounding.

A forward pass in training mode *proposes* the batch's moments; a *commit* blends them into the running statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, fx

from batchnorm import functional, layout
from batchnorm._torch import in_backward_recompute
from batchnorm.activations import check_activation
from batchnorm.call import Call, check_sync, check_virtual_batch_size
from batchnorm.distributed import Group
from batchnorm.domains import DomainLayer
from batchnorm.errors import BatchNormError, DTypeError, OptionError, ShapeError
from batchnorm.kernels.running_statistics import check_running
from batchnorm.layer_state import FIRST, HALVES, Row, check_domains
from batchnorm.moments import Moments
from batchnorm.renorm import Renorm, check_renorm, corrections
from batchnorm.statistics import BatchStatistics, Frozen, SyncStatistics

_NUMBERS = itertools.count(1)
_BATCH = BatchStatistics()
_OPTIONS: dict[str, Any] = {
    "activation": None,
    "channel_dim": 1,
    "sync": False,
    "process_group": None,
    "virtual_batch_size": None,
    "renorm": None,
    "inplace": False,
    "frozen": Frozen(),
    "domains": (),
    "own_affine": False,
}


class BatchNorm(DomainLayer):
    r"""Batch normalization of an input of any rank >= 2, with an optional residual and activation inside.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and (biased) var are the batch's, and the running statistics move towards them (their variance
    unbiased, as in torch); in inference they are the running statistics.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; None for the equal-weight average of all batches.
        affine: whether there are a learnable weight (gamma, initially 1) and bias (beta, initially 0).
        track_running_stats: whether there are running statistics; without them, inference uses the batch's too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with affine, whether there is a beta.
        activation: "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu", "relu6", "mish", "sigmoid" or "tanh", with
            torch's default parameters; or None.
        channel_dim: the dimension of the channels; -1 for channels last.
        sync: in training, take the statistics from what all processes have together, in equal or unequal parts, an
            empty one included; on any device and backend of torch.distributed. All must call their layers in the same
            order; under `TORCH_DISTRIBUTED_DEBUG=DETAIL` a process that does not is named. No effect without
            torch.distributed or with one process.
        process_group: with sync, the processes; None for the default group. A copy of the layer refers to the same.
        virtual_batch_size: in training, normalise every so many samples by their own statistics: ghost batches. The
            running statistics see the joined moments; a single sample that is left over joins the last.
        renorm: batch renormalization, `Renorm`; training then normalises by nearly the running statistics.
        inplace: in inference without gradients, write the output over the input; no effect otherwise.
        domains: names of populations that samples come from, each with running statistics of its own, of which
            `batchnorm.domain` chooses: docs/domains.md. Torch's buffers are the first one's.
        own_affine: with domains, whether each has a weight and a bias of its own.

    Shapes:
        input, residual, output: (N, C, *S), or with the channels in `channel_dim`.
        mask: the input's shape without the channels (a size of 1 broadcasts), or (N,). Bool, or sample weights >= 0:
            which positions the statistics are taken from in training. The output is there for all.

    Attributes:
        num_batches_skipped: (C,) int64: of how many batches since the layer was made or loaded a channel's statistics
            were not finite, so that its running statistics skipped them; the other channels' moved. Neither a buffer
            nor in the state_dict, not counted inside transforms of torch.func; None where running statistics are none
            or DTensors.
        frozen: what `freeze` set.
        label: what distinguishes this layer from others in errors of processes: "number 4" for the fourth layer that
            this process made, and its path where `convert` made it.

    Running statistics are float32 at least, also in a layer of a half-precision dtype and after `.half()`: an average
    whose steps are smaller than its rounding would stand still.

    Raises:
        OptionError: an unknown activation, or options that exclude each other, when the layer is made.
        ShapeError, DTypeError, CountError, OptionError: when it is called, as `functional.batch_norm`; the layer
            stays as it was, `num_batches_tracked` included.
        ProcessError, OrderError: another process is gone, or at another layer.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    ranks: ClassVar[tuple[int, ...]] = ()
    activation: str | None
    channel_dim: int
    sync: bool
    process_group: dist.ProcessGroup | None
    virtual_batch_size: int | None
    renorm: Renorm | None
    inplace: bool
    frozen: Frozen
    label: str
    # fairscale's checkpointing leaves layers alone that have this: ours notice a repeated pass by themselves.
    disable_patch_batchnorm: ClassVar[bool] = True
    # pfn-extras' checkpointing takes the root of 1 - momentum, for two passes, of layers that do not have this.
    _bn_momentum_patched: ClassVar[bool] = True
    # Where proposals go instead of being committed: `deferred` sets it for a while.
    _receiver: Callable[[Moments, Row], None] | None = None
    # Who is told of proposals, whatever becomes of them: monitors, for the time of one forward pass.
    _listeners: tuple[Callable[[BatchNorm, Moments], None], ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        domains: Sequence[str] | None = None,
        own_affine: bool = False,
    ) -> None:
        names = check_domains(domains, own_affine, affine, track_running_stats)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set_options(activation, channel_dim, sync, process_group, virtual_batch_size, renorm, inplace)
        self.frozen = Frozen()
        self.label = f"number {next(_NUMBERS)}"
        if names:
            self._add_domains(names, own_affine)
        self._complete()

    def _set_options(
        self,
        activation: str | None,
        channel_dim: int,
        sync: bool,
        process_group: dist.ProcessGroup | None,
        virtual_batch_size: int | None,
        renorm: Renorm | None,
        inplace: bool,
    ) -> None:
        """Check what a constructor was given, and keep it."""
        check_activation(activation)
        check_virtual_batch_size(virtual_batch_size)
        check_sync(sync, process_group, virtual_batch_size)
        check_renorm(renorm, virtual_batch_size, self.track_running_stats)
        self.activation = activation
        self.channel_dim = channel_dim
        self.sync = sync
        self.process_group = process_group
        self.virtual_batch_size = virtual_batch_size
        self.renorm = renorm
        self.inplace = inplace

    def _complete(self) -> None:
        """What torch's constructor leaves open: Python's numbers, which compilers know, and `_widen_statistics`."""
        for name in ("num_features", "eps", "momentum"):
            setattr(self, name, vars(self)[name])
        self._widen_statistics()
        self._tell_opacus()
        self._reset_skipped()  # not at the first call: that would compile twice

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Normalise `input`; in training mode, move the running statistics.

        `activation` is for this call of a layer that has none of its own; OptionError if both are set.
        """
        if isinstance(input, fx.Proxy):
            return self._leaf(input, residual, mask, activation)
        if activation is None:
            activation = self.activation
        elif self.activation is not None:
            raise OptionError(
                f"got activation={activation!r} for a layer with activation={self.activation!r}; one call has one. "
                f"Leave one of them out"
            )
        row, training, frozen = self._row, self.training, self.frozen
        if type(row) is not Row or (self.domains and self.sync and training):
            try:
                self._check_input_dim(input)
                return self._marked(self._forward_by_domain(input, residual, mask, activation))
            except BatchNormError as error:
                raise error.within(self._title()) from None
        own = self._parameters  # attributes take several times as long, and `get` would look at them all the same
        weight: Tensor | None = own[row.weight] if row.weight in own else getattr(self, row.weight)
        bias: Tensor | None = own[row.bias] if row.bias in own else getattr(self, row.bias)
        buffers = self._buffers
        # Statistics that are parameters, or computed, are attributes.
        mean: Tensor | None = buffers[row.mean] if row.mean in buffers else getattr(self, row.mean)
        var: Tensor | None = buffers[row.var] if row.var in buffers else getattr(self, row.var)
        # Of an empty batch nothing is proposed, unless other processes have parts of it.
        moves = self.track_running_stats and not frozen.statistics and (input.numel() > 0 or self.sync)
        by_running = mean is not None and var is not None and (not training or frozen.normalization)
        if frozen.affine:
            weight, bias = (None if t is None else t.detach() for t in (weight, bias))
        if by_running and (not training or frozen.statistics):
            mask = None  # no effect
        try:
            self._check_input_dim(input)
            call = Call(input, weight, bias, residual, mask, self._eps, self.channel_dim, activation)
            alone = False  # whether the batch's moments go to the running statistics and nowhere else
            moments = None
            if not by_running and training and moves and mean is not None and var is not None:
                running = self._running(row, mean, var)
                if mean.dtype in HALVES or var.dtype in HALVES:
                    raise DTypeError(
                        f"got running statistics of dtype {mean.dtype} and {var.dtype} in training, where such "
                        f"averages stand still. Leave buffers out of mixed precision, or convert with .float()"
                    )
                counter, momentum = running.num_batches_tracked, running.momentum
                check_running(mean, var, counter, momentum, self._num_features, input.device)
                plain = self.renorm is None and self.virtual_batch_size is None and not self.sync
                alone = plain and self._receiver is None and not self._listeners
            if alone:
                output = functional.normalize_and_commit(call, running)
            elif mean is not None and var is not None and by_running:
                output = functional.normalize_by_running(call, mean, var, inplace=self.inplace and not training)
                if moves and training:
                    moments = functional.batch_moments(call, self._statistics())
            elif not training:  # without running statistics
                output = functional.normalize(call, _BATCH)[0]
            else:
                output, moments = functional.normalize(call, self._statistics())
            if moves and moments is not None:
                self._propose(moments, row)
        except BatchNormError as error:
            raise error.within(self._title()) from None
        return output if len(self._rows) == 1 else self._marked(output)

    # Named here, so that the reference shows them with the layer.
    num_batches_skipped = DomainLayer.num_batches_skipped
    statistics_of = DomainLayer.statistics_of
    reset_running_stats = DomainLayer.reset_running_stats

    def _title(self) -> str:
        label = f", {self.label}" if self.domains else ""
        return f"{type(self).__name__}({self._num_features}){label}"

    def _statistics(self) -> BatchStatistics | SyncStatistics:
        """What a training pass normalises by."""
        correction = None if self.renorm is None else self._correction
        if self.sync and (group := Group(self.process_group)).size > 1:
            label = f"{type(self).__name__}({self._num_features}), {self.label}"
            return SyncStatistics(group, label, correction)
        return BatchStatistics(self.virtual_batch_size, correction)

    def _correction(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Batch renormalization's r and d."""
        renorm = self.renorm
        assert renorm is not None
        if in_backward_recompute() and self._receiver is None and not self.frozen.statistics:
            raise OptionError(
                "got a forward pass repeated inside a backward pass; the running statistics have moved since the first "
                "one, so batch renormalization would correct differently. Keep this layer out of activation "
                "checkpointing, or train inside batchnorm.deferred"
            )
        if moments.mean.dim() == 1:
            row = self._row if isinstance(self._row, Row) else FIRST
            mean, var, counter, *_ = self.statistics_of(row.number)
            return corrections(moments, mean, var, self._eps, *renorm.limits(counter))
        of_each = []
        for own, (mean, var, counter, *_) in zip(
            self._each(moments), map(self.statistics_of, self.domains), strict=True
        ):
            of_each.append(corrections(own, mean, var, self._eps, *renorm.limits(counter)))
        r, d = (torch.stack(each) for each in zip(*of_each, strict=True))
        return r, d

    def _propose(self, proposal: Moments, row: Row) -> None:
        """Commit, or hand the proposal to whoever collects them; a pass that a backward pass repeats does neither."""
        if not in_backward_recompute():
            for listener in self._listeners:
                listener(self, proposal)
            (self._receiver or self._commit)(proposal, row)

    def _commit(self, proposal: Moments, row: Row) -> None:
        """Blend moments into a domain's running statistics, and count one batch."""
        mean, var = getattr(self, row.mean), getattr(self, row.var)
        if mean is not None and var is not None:
            functional.commit(proposal, self._running(row, mean, var))

    def _check_input_dim(self, input: Tensor) -> None:
        if self.ranks and input.dim() not in self.ranks:
            expected = " or ".join(f"{rank}D" for rank in self.ranks)
            raise ShapeError(
                f"expected {expected} input (got {input.dim()}D input of shape {tuple(input.shape)}). "
                f"Reshape it, or use batchnorm.BatchNorm, which takes any rank"
            )
        rank, channel_dim = input.dim(), self.channel_dim
        if rank < 2 or not -rank <= channel_dim < rank:
            layout.channel_axis(rank, channel_dim)  # says what is wrong
        if input.shape[channel_dim] != self._num_features:
            raise ShapeError(
                f"got {input.shape[channel_dim]} channels in dimension {channel_dim % rank} of an input of shape "
                f"{tuple(input.shape)}; this layer was made for {self._num_features}. Check num_features and "
                f"channel_dim={channel_dim}"
            )

    def extra_repr(self) -> str:
        """What torch prints of its layer, and our options that are not at their defaults."""
        torchs: str = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's has no annotation
        return torchs + "".join(f", {name}={value}" for name, value in self.options().items())

    def options(self) -> dict[str, Any]:
        """What this layer has that torch's cannot express: our options that are not at their defaults."""
        return {name: value for name in _OPTIONS if (value := getattr(self, name)) != _OPTIONS[name]}


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """`BatchNorm` for inputs (N, C) and (N, C, L); stands in for `torch.nn.BatchNorm1d`."""

    ranks = (2, 3)


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """`BatchNorm` for inputs (N, C, H, W); stands in for `torch.nn.BatchNorm2d`."""

    ranks = (4,)


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """`BatchNorm` for inputs (N, C, D, H, W); stands in for `torch.nn.BatchNorm3d`."""

    ranks = (5,)
