"""Layers that replace torch's: the same state, the same `isinstance`, the same results within rounding.

A forward pass in training mode *proposes* the batch's moments; a *commit* blends them into the running statistics.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, fx
from typing_extensions import Self

from batchnorm import functional, layout
from batchnorm._torch import in_backward_recompute
from batchnorm.activations import check_activation
from batchnorm.call import Call, check_sync, check_virtual_batch_size
from batchnorm.distributed import Group
from batchnorm.errors import BatchNormError, DTypeError, OptionError, ShapeError
from batchnorm.kernels.running_statistics import check_running
from batchnorm.moments import Moments
from batchnorm.rebuilding import Rebuilding
from batchnorm.renorm import Renorm, check_renorm, corrections
from batchnorm.statistics import BatchStatistics, Frozen, RunningStatistics, SyncStatistics

_STATISTICS = ("running_mean", "running_var")
_NUMBERS = itertools.count(1)
_HALVES = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def _at_least_float32(buffer: Tensor) -> Tensor:
    return buffer.float() if buffer.dtype in _HALVES else buffer


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
}


class BatchNorm(Rebuilding):
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
    # What `num_batches_skipped` shows, where the running statistics are, and made again where they are others. No
    # buffer, because tools that copy, prune, broadcast or load buffers expect torch's and no others.
    _skipped: Tensor | None = None
    # fairscale's checkpointing leaves layers alone that have this: ours notice a repeated pass by themselves.
    disable_patch_batchnorm: ClassVar[bool] = True
    # pfn-extras' checkpointing takes the root of 1 - momentum, for two passes, of layers that do not have this.
    _bn_momentum_patched: ClassVar[bool] = True
    # Where proposals go instead of being committed: `deferred` sets it for a while.
    _receiver: Callable[[Moments], None] | None = None
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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set_options(activation, channel_dim, sync, process_group, virtual_batch_size, renorm, inplace)
        self.frozen = Frozen()
        self.label = f"number {next(_NUMBERS)}"
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
        self._reset_skipped(self._buffers.get("running_mean"))  # not at the first call: that would compile twice

    def _reset_skipped(self, mean: Tensor | None) -> None:
        """Nothing was skipped of these. Those that only stand for others get no counter: it would outlive them."""
        self._skipped = None
        if mean is not None and type(mean) in _PLAIN and not mean.is_meta:
            self._skipped = torch.zeros_like(mean, dtype=torch.int64)

    def _widen_statistics(self) -> None:
        """Give running statistics the dtype that a running average needs."""
        for name in _STATISTICS:
            if (buffer := self._buffers.get(name)) is not None:
                self._buffers[name] = _at_least_float32(buffer)

    @property
    def num_batches_skipped(self) -> Tensor | None:
        """(C,) int64, or None: see the class."""
        mean, var = self.running_mean, self.running_var
        return None if mean is None or var is None else self._running(mean, var).num_batches_skipped

    def _running(self, mean: Tensor, var: Tensor) -> RunningStatistics:
        """The running statistics and how they move."""
        skipped = self._skipped
        if type(mean) not in _PLAIN:  # the counter cannot be changed with it
            skipped = None
        elif skipped is None or skipped.shape != mean.shape or skipped.device != mean.device:
            self._reset_skipped(mean)
            skipped = self._skipped
        return RunningStatistics(mean, var, self._buffers["num_batches_tracked"], skipped, self._momentum)

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
        own = self._parameters  # attributes take several times as long, and `get` would look at them all the same
        weight: Tensor | None = own["weight"] if "weight" in own else self.weight  # noqa: SIM401 - not `get`: see above
        bias: Tensor | None = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 - not `get`: see above
        buffers = self._buffers
        # Statistics that are parameters, or computed, are attributes.
        mean: Tensor | None = buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401 - likewise
        var: Tensor | None = buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401 - likewise
        training, frozen = self.training, self.frozen
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
            if mean is not None and var is not None and by_running:
                if not training:
                    return functional.normalize_by_running(call, mean, var, inplace=self.inplace)
                output = functional.normalize_by_running(call, mean, var)
                if moves:
                    self._propose(functional.batch_moments(call, self._statistics()))
                return output
            if not training:  # without running statistics
                return functional.normalize(call, _BATCH)[0]
            if moves and mean is not None and var is not None:
                running = self._running(mean, var)
                if mean.dtype in _HALVES or var.dtype in _HALVES:
                    raise DTypeError(
                        f"got running statistics of dtype {mean.dtype} and {var.dtype} in training, where such "
                        f"averages stand still. Leave buffers out of mixed precision, or convert with .float()"
                    )
                counter, momentum = running.num_batches_tracked, running.momentum
                check_running(mean, var, counter, momentum, self._num_features, input.device)
                plain = self.renorm is None and self.virtual_batch_size is None and not self.sync
                if plain and self._receiver is None and not self._listeners:
                    return functional.normalize_and_commit(call, running)
            output, moments = functional.normalize(call, self._statistics())
            if moves:
                self._propose(moments)
        except BatchNormError as error:
            raise error.within(self._title()) from None
        return output

    def _title(self) -> str:
        return f"{type(self).__name__}({self._num_features})"

    def _statistics(self) -> BatchStatistics | SyncStatistics:
        """What a training pass normalises by."""
        correction = None if self.renorm is None else self._correction
        if self.sync and (group := Group(self.process_group)).size > 1:
            label = f"{self._title()}, {self.label}"
            return SyncStatistics(group, label, correction)
        return BatchStatistics(self.virtual_batch_size, correction)

    def _correction(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Batch renormalization's r and d."""
        mean, var, renorm = self.running_mean, self.running_var, self.renorm
        assert mean is not None
        assert var is not None
        assert renorm is not None
        if in_backward_recompute() and self._receiver is None and not self.frozen.statistics:
            raise OptionError(
                "got a forward pass repeated inside a backward pass; the running statistics have moved since the first "
                "one, so batch renormalization would correct differently. Keep this layer out of activation "
                "checkpointing, or train inside batchnorm.deferred"
            )
        return corrections(moments, mean, var, self._eps, *renorm.limits(self.num_batches_tracked))

    def _propose(self, proposal: Moments) -> None:
        """Commit, or hand the proposal to whoever collects them; a pass that a backward pass repeats does neither."""
        if not in_backward_recompute():
            for listener in self._listeners:
                listener(self, proposal)
            (self._receiver or self._commit)(proposal)

    def _commit(self, proposal: Moments) -> None:
        """Blend moments into the running statistics, and count one batch."""
        mean, var = self.running_mean, self.running_var
        if mean is not None and var is not None:
            functional.commit(proposal, self._running(mean, var))

    def reset_running_stats(self) -> None:
        """Reset running statistics and counters, `num_batches_skipped` too, as torch's layers do.

        Frozen statistics stay: `torch.optim.swa_utils.update_bn` begins with this.
        """
        if "frozen" in vars(self) and self.frozen.statistics:  # torch's constructor comes here before ours is done
            return
        super().reset_running_stats()
        self._reset_skipped(self._buffers.get("running_mean"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Torch's `.to()`, `.half()` and the like, but running statistics keep the precision that they had."""
        before = {name: self._buffers.get(name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype in _HALVES:
                self._buffers[name] = _at_least_float32(old.to(new.device))
        if (mean := self._buffers.get("running_mean")) is not None and self._skipped is not None:
            self._skipped = None if mean.is_meta else self._skipped.to(mean.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:  # noqa: ANN401 - torch's own has no types
        """torch's; what a checkpoint assigns in half precision becomes float32, and nothing was skipped since."""
        super()._load_from_state_dict(state_dict, *args)
        self._widen_statistics()
        self._reset_skipped(self._buffers.get("running_mean"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that refers to the same processes: their group is a handle, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

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
