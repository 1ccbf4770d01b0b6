"""What becomes of batch norm while a model is trained."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import Self

from batchnorm import _torch
from batchnorm.choosing import check_one_population
from batchnorm.diagnosis.listening import Listening
from batchnorm.diagnosis.measuring import Measured, Snapshot
from batchnorm.diagnosis.records import LayerRecord
from batchnorm.diagnosis.writers import Writer, writer_for
from batchnorm.errors import OptionError
from batchnorm.models.hooks import Uncopied, forward_hooks
from batchnorm.models.norm_layers import named_norm_layers, unwrapped


class Monitor:
    """Inside, every so many steps of training, each batch-norm layer's numbers are written down.

        with bn.Monitor(model, every=10) as monitor:
            for x, y in batches:
                ...
        print(monitor.records[-1].shift.max)

    A step is a forward pass of the whole model in training mode with gradients. Not counted are passes that activation
    checkpointing repeats, and those that accumulate gradients: a pass that finds gradients, and parameters that nothing
    has changed since the pass before, belongs to that one's step, of which the first pass is recorded.

    The moments of a batch are those that layers of ours propose. For others (torch.nn's, frozen ones, layers in
    inference mode inside a model in training mode) the input is read once more, and so is each output, in recorded
    steps only. In between a step costs two calls of empty hooks, and nothing waits for the device; a recorded step
    waits once. Gradients and learning rates are read when an optimizer of torch's has made its step, as that used them:
    joined over processes, unscaled, clipped. Without one, gradients are those that are there when the next step begins.

    Training is the same, bit for bit. An exception inside passes; the record of its step is dropped, and the model has
    no hooks any more. Copies of the model, pickled ones too, are not monitored. There may be several monitors.

    Args:
        model: ours and torch.nn's layers, of all depths. What DistributedDataParallel or torch.compile returned too:
            compiled models run as they were written in recorded steps. A model that is compiled from outside, or in
            place by `model.compile()`, cannot be looked into; a UserWarning at the end says so.
        every: record steps `every`, 2 * `every`, ...
        writer: the path of a file, to which a line of JSON is appended for each layer and recorded step
            (`batchnorm monitor FILE` draws it); or anything with `add_scalar(tag, value, step)`, and `add_histogram` if
            it likes, such as TensorBoard's SummaryWriter; None to keep the records in `records`. With several
            processes, give it to one.

    Attributes:
        records: a list of `LayerRecord`, without a writer; empty with one.
        step: how many steps there were.

    Raises:
        OptionError: `every` or `writer` is none of these, or the model has no batch-norm layer.
        UsageError: the file cannot be written.
    """

    def __init__(self, model: nn.Module, every: int = 10, writer: Any = None) -> None:  # noqa: ANN401 - see above
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"got every={every!r}; it must be a number of steps, 1 or more")
        check_one_population(model, "Monitor")
        if next(named_norm_layers(model), None) is None:
            raise OptionError(f"got a {type(model).__name__} without batch-norm layers; there is nothing to monitor")
        self.records: list[LayerRecord] = []
        self.step = 0
        self._model, self._every, self._destination = model, every, writer
        self._writer: Writer | None = None
        self._attached = ExitStack()
        self._pass: ExitStack | None = None  # what ends the recorded forward pass under way
        self._listening: Listening | None = None
        self._waiting: Snapshot | None = None  # a recorded pass whose gradients are still to come
        self._before: dict[str, Measured] = {}  # by layer, what was measured last
        self._stepped = True  # whether an optimizer made a step since the last counted pass
        self._probe: Tensor | None = None
        self._version = 0
        self._compiled = False

    def start(self) -> Self:
        """Attach to the model; `with` does it.

        Raises:
            OptionError: it is attached already.
        """
        if self.started:
            raise OptionError("got a monitor that has been started; stop() it first")
        self._writer = writer_for(self._destination, self.records)
        self._probe = self._choose_probe()
        self._parameters = {id(parameter) for parameter in self._model.parameters()}
        with ExitStack() as attached:
            attached.callback(self._close)
            self._attach(attached)
            attached.callback(register_optimizer_step_post_hook(self._after_optimizer).remove)
            self._attached = attached.pop_all()
        return self

    def stop(self) -> None:
        """Write what waits to be written, and detach; `with` does it. Nothing happens where it is not attached."""
        try:
            self._finish(None)
        finally:
            self._attached.close()
        if not self.step:
            how = (
                "it runs inside torch.compile, which cannot be looked into: give Monitor what torch.compile returned"
                if self._compiled
                else "it needs calls of the model itself, in training mode and with gradients"
            )
            warnings.warn(f"the monitor saw no step of the {type(self._model).__name__}; {how}", stacklevel=2)

    def abandon(self) -> None:
        """Detach without looking at anything: after an exception; `with` does it. The record that waits is dropped."""
        self._waiting = None
        self._attached.close()

    @property
    def started(self) -> bool:
        """Whether it is attached."""
        return self._writer is not None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.abandon()

    def _attach(self, attached: ExitStack) -> None:
        """See the model's forward passes."""
        # Several monitors begin in one order and end in the other, so that each finds torch.compile as it left it.
        attached.enter_context(forward_hooks([self._model], before=Uncopied(self._begin)))
        attached.enter_context(forward_hooks([self._model], after=Uncopied(self._end), first=True))

    def _close(self) -> None:
        self._abandon()
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _begin(self, *_: Any) -> None:  # noqa: ANN401 - a hook's
        """Before each forward pass of the model."""
        if torch.compiler.is_compiling():
            self._compiled = True
            return
        if self._pass is not None:  # an exception ended the last one, outside of which training went on
            self._abandon()
        if not self._model.training or not torch.is_grad_enabled() or self._repeated():
            return
        self.step += 1
        self._stepped = False
        if self._probe is not None:
            self._version = _torch.version(self._probe)
        if self.step % self._every and self._waiting is None:
            return
        self._finish(None)
        if self.step % self._every == 0:
            with ExitStack() as inside:
                inside.enter_context(_torch.without_compiled_code())
                self._listening = Listening(named_norm_layers(unwrapped(self._model)))
                inside.callback(self._listening.end)
                self._pass = inside.pop_all()

    def _repeated(self) -> bool:
        """Whether this pass is none of its own: repeated for gradients, one of several of a step, or a transform's."""
        if _torch.current_backward() != -1 or _torch.in_functorch() or _torch.is_traced():
            return True
        probe = self._probe
        return (
            not self._stepped
            and probe is not None
            and probe.grad is not None
            and _torch.version(probe) == self._version
        )

    def _end(self, *_: Any) -> None:  # noqa: ANN401 - a hook's
        """After each forward pass of the model."""
        if self._pass is None or self._listening is None:
            return
        heard = self._listening.heard()
        self._abandon()
        self._waiting = Snapshot(self.step, heard)

    def _abandon(self) -> None:
        """No layer is listened to any more."""
        inside, self._pass, self._listening = self._pass, None, None
        if inside is not None:
            inside.close()

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401 - a hook's
        """After a step of any optimizer of torch's."""
        if any(id(parameter) in self._parameters for group in optimizer.param_groups for parameter in group["params"]):
            self._stepped = True
            self._finish(optimizer)

    def _finish(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write the record that waits, if one does."""
        snapshot, self._waiting = self._waiting, None
        if snapshot is not None and self._writer is not None:
            measured = snapshot.measured(optimizer, self._before)
            self._before |= {each.record.layer: each for each in measured}
            self._writer.write(measured)

    def _choose_probe(self) -> Tensor | None:
        """The parameter that tells of gradients and changes: a gamma, if any learns."""
        parameters = [layer.weight for _, layer in named_norm_layers(self._model)] + list(self._model.parameters())
        return next((p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad), None)


class GuidedMonitor(Monitor):
    """A monitor that is told when forward passes begin and end: for trainers that may call parts of the model only."""

    def _attach(self, attached: ExitStack) -> None:
        """Attach nothing: it is told."""

    def begin(self) -> None:
        """A forward pass of training begins."""
        self._begin()

    def end(self) -> None:
        """It has ended; not so where an exception ended it."""
        self._end()
