"""The forward pass that shows what comes into every layer: exact populations, each batch and each sample, in one.

Every batch's forward pass waits at each layer until all have come there, as in `recalibrate`, so that a layer is seen
as inference will show it. Layers that cannot wait, because they are called several times, normalise by no running
statistics or are frozen, are watched on the way.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm import functional, ghost, layout
from batchnorm.call import Call
from batchnorm.diagnosis.observation import Input, NonFinite, Observation, ObservedLayer
from batchnorm.distributed import Group
from batchnorm.errors import NonFiniteError, OptionError, OrderError
from batchnorm.models.devices import device_types
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.modes import set_training
from batchnorm.models.nested import map_tensors
from batchnorm.models.norm_layers import display_name, named_norm_layers, uninitialized
from batchnorm.modules import BatchNorm
from batchnorm.moments import Moments, pool
from batchnorm.population.batches import Batch, Batches, Forward, cut, nothing_to_learn_from, samples
from batchnorm.population.context import Context, LayerCall, Progress
from batchnorm.population.exact import Exact
from batchnorm.population.layers import Layer, select_layers
from batchnorm.population.result import SkippedLayer
from batchnorm.population.torch_state import TorchState
from batchnorm.population.transaction import transaction

MOST_CHANNELS = 64  # of a layer whose samples' means are kept: what tests between batches need, in little memory
KEPT_SHARE = 4  # one batch of so many is kept, for passes that compare: two of them are half a pass
MOST_KEPT = 8


class _Measured(NamedTuple):
    """One call's input: moments, and each sample's mean, (N, C), where samples can be told apart."""

    moments: Moments
    sample_means: Tensor | None
    values: int
    input: Input
    padding: float | None


def _measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, padding: bool) -> _Measured:
    x = args[0] if args else kwargs["input"]
    ours = module if isinstance(module, BatchNorm) else None
    mask = None if ours is None else kwargs.get("mask")
    call = Call(x, mask=mask, channel_dim=1 if ours is None else ours.channel_dim)
    axis = layout.channel_axis(x.dim(), call.channel_dim)
    last = x.dim() > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    seen = Input(tuple(x.shape), x.dtype, last, axis)
    x = x.detach()
    if mask is not None or axis == 0 or x.numel() == 0:
        return _Measured(functional.batch_moments(call), None, 0, seen, None)
    if x.dim() == 2:
        return _Measured(functional.batch_moments(call), x.double(), 1, seen, None)
    # Each sample's moments, in one read; the batch's are their sum.
    each = functional.batch_moments(Call(ghost.widen(x.movedim(axis, 1), x.shape[0])))
    means, squares = (t.view(x.shape[0], -1) for t in (each.mean, each.m2))
    moments = pool(each.count.expand(x.shape[0]), means, squares)
    return _Measured(moments, means, int(each.count), seen, _padding(x.movedim(axis, 1)) if padding else None)


def _padding(x: Tensor) -> float:
    """The share of positions, from the end, that repeat their sample's last one; that one left out."""
    flat = x.flatten(2)
    same = (flat == flat[..., -1:]).all(1).flip(-1)
    run = same.long().cumprod(-1).sum(-1)
    return float((run - 1).sum() / flat[:, 0].numel())


class _Record:
    """What is gathered of one layer, by batches' indices: a pass that begins again writes over what it wrote."""

    def __init__(self, turn: Iterator[int]) -> None:
        self._turn = turn
        self.turn = -1  # the order in which layers were first called
        self.input: Input | None = None
        self.calls: dict[int, list[Moments]] = {}
        self.sample_means: dict[int, Tensor] = {}
        self.channels = torch.empty(0, dtype=torch.int64)
        self.values = 0
        self.padding: float | None = None
        self.population: Moments | None = None

    def measure(
        self, batch: int, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Moments:
        """The call of that number in that batch's pass: the moments of its input."""
        measured = _measure(module, args, kwargs, padding=self.input is None)
        if self.input is None:
            self.turn = next(self._turn)
        calls = self.calls.setdefault(batch, [])
        del calls[number:]
        calls.append(measured.moments)
        self.input = self.input or measured.input
        self.padding = measured.padding if self.padding is None else self.padding
        if measured.sample_means is not None and number == 0:
            channels = measured.sample_means.shape[1]
            if not self.channels.numel():
                self.channels = torch.linspace(0, channels - 1, min(channels, MOST_CHANNELS)).long()
            self.values = measured.values
            self.sample_means[batch] = measured.sample_means[:, self.channels.to(measured.sample_means.device)].cpu()
        return measured.moments

    def observed(self, left_out: set[int], exact: bool) -> ObservedLayer | None:
        """What it comes to, without some batches; None where nothing came."""
        calls = {index: self.calls[index] for index in sorted(self.calls) if index not in left_out}
        if self.input is None or not calls:
            return None
        batches = [sum(moments[1:], start=moments[0]) for moments in calls.values()]
        most = max(map(len, calls.values()))
        numbered = [[moments[i] for moments in calls.values() if i < len(moments)] for i in range(most)]
        means = [(i, self.sample_means[index]) for i, index in enumerate(calls) if index in self.sample_means]
        complete = len(means) == len(calls)
        return ObservedLayer(
            self.input,
            most,
            self.population or sum(batches[1:], start=batches[0]),
            batches,
            [sum(moments[1:], start=moments[0]) for moments in numbered] if most > 1 else [],
            torch.cat([m for _, m in means]) if complete else torch.empty(0, 0, dtype=torch.float64),
            torch.cat([torch.full((len(m),), i) for i, m in means]) if complete else torch.empty(0, dtype=torch.int64),
            self.channels,
            self.values,
            self.padding,
            exact and most == 1,
        )


class _Lockstep(Exact):
    """`Exact`, which lets others see what comes in, and goes on without what is not finite."""

    def __init__(self, context: Context, records: dict[str, _Record]) -> None:
        super().__init__(context)
        self._records = records
        self.non_finite: dict[str, NonFinite] = {}
        self.dropped: set[int] = set()
        self.unsettled: dict[str, str] = {}

    @property
    def batch(self) -> Batch | None:
        """The one whose pass runs."""
        current = self._lockstep.current
        return None if current is None else current.batch

    @property
    def count(self) -> int:
        """How many passes there are."""
        return len(self._lockstep.passes)

    def _moments(self, layer: Layer, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
        layer.check_unmoved()
        layout.check_vector(layer.mean, "running_mean", _channels(layer.module, args, kwargs))
        return self._records[layer.name].measure(batch.index, 0, layer.module, args, kwargs)

    def _refuse_non_finite(self, calls: Sequence[LayerCall]) -> None:
        for layer, moments, batch in calls:
            wrong = ~(moments.mean.isfinite() & moments.m2.isfinite())
            if bool(wrong.any()):
                self.non_finite.setdefault(layer.name, NonFinite(layer.name, batch, int(wrong.sum())))
                self.dropped.add(batch)
        for batch_pass in [p for p in self._lockstep.passes if p.batch.index in self.dropped]:
            self._memory.drop(batch_pass)
        if not self._lockstep.passes:
            raise _NothingLeft

    def _solve(self, layer: Layer, moments: Moments) -> None:
        self._records[layer.name].population = moments
        if float(moments.count) <= 1:
            self._solved[layer] = None  # it has no variance: inference will go on by what there is
            return
        try:
            super()._solve(layer, moments)
        except NonFiniteError as error:  # a dtype too small for them
            self.unsettled[layer.name] = str(error)
            self._solved[layer] = None


class _NothingLeft(Exception):  # noqa: N818 - no error: the end of a run
    """No batch is finite any more."""


def _channels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    x: Tensor = args[0] if args else kwargs["input"]
    return int(x.shape[module.channel_dim if isinstance(module, BatchNorm) else 1])


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward,
    memory_limit: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> Observation:
    """What batches show of a model's layers, in one forward pass over them; the model is as before.

    Args:
        model: any module, with values.
        batches: read once, as `recalibrate` does.
        forward: `forward(model, batch)`.
        memory_limit: bytes of suspended activations, as `recalibrate` has it.
        progress: called with the layer calls done, and all of them where that is known.

    Raises:
        OptionError: a module has not been initialised yet, or statistics hold no data.
        CountError: there are no samples.
        Anything that `batches`, the model or `forward` raises.
    """
    for path, module in model.named_modules():
        if uninitialized(module):  # a pass would initialise it
            raise OptionError(
                f'got a model whose "{display_name(path)}" has not been initialised yet; a check with data needs '
                f"an initialised model. Run one batch through the model first"
            )
    selected, _ = select_layers(model)
    contents: list[Any] = []
    source = Batches(_remembered(batches, contents), None)
    devices = device_types(model)
    with transaction(model, (), devices):
        for module in model.modules():
            set_training(module, False)
        first = next(iter(source), None)
        if first is None:
            raise nothing_to_learn_from(source.read)
        repeated = _called_several_times(model, first, forward, devices)
        layers = [layer for layer in selected if layer.module not in repeated]
        reason = None
        try:
            seen = _Seen(model, layers, forward, Progress(progress, source.expected), devices, memory_limit)
            seen.run(itertools.chain([first], source), source)
        except OrderError as error:  # batches take different ways: each by itself, by the running statistics
            reason = str(error)
            for _ in source:  # the rest, into contents
                pass
            again = [Batch(i, content) for i, content in enumerate(contents) if samples(content) != 0]
            seen = _Seen(model, [], forward, Progress(progress, len(again)), devices, memory_limit)
            seen.run(again, source)
        observation = seen.observation(exact=reason is None)
    observation.batches, observation.samples = source.used, source.samples
    observation.passes += 0.0 if reason is None else 1.0
    skipped = [] if reason is None else [SkippedLayer(layer.name, reason) for layer in selected]
    observation.skipped = [*observation.skipped, *skipped]
    return observation


def _remembered(batches: Iterable[Any], contents: list[Any]) -> Iterable[Any]:
    """Batches as they are read; those read are in contents, which waiting passes hold anyway."""
    for batch in batches:
        contents.append(batch)
        yield batch


def _called_several_times(model: nn.Module, first: Batch, forward: Forward, devices: set[str]) -> set[nn.Module]:
    """The layers that one sample's pass calls more than once; where one sample cannot be run, the whole batch tells."""
    norms = [module for _, module in named_norm_layers(model)]
    before = TorchState.here(devices)
    for content in (cut(first.content, 1), first.content) if samples(first.content) else (first.content,):
        called: Counter[nn.Module] = Counter()
        try:
            with forward_hooks(norms, lambda module, *_: called.update([module])):  # noqa: B023 - called at once
                forward(model, content)
            break
        except Exception:
            if content is first.content:
                raise
        finally:
            before.restore()
    return {module for module, times in called.items() if times > 1}


class _Seen:
    """One run over batches, and what it shows."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        forward: Forward,
        progress: Progress,
        devices: set[str],
        memory_limit: int | None,
    ) -> None:
        self._model, self._layers, self._forward = model, layers, forward
        self._progress, self._devices, self._memory_limit = progress, devices, memory_limit
        solved = {layer.module for layer in layers}
        self._names: dict[nn.Module, str] = {module: display_name(path) for path, module in named_norm_layers(model)}
        self._paths: dict[nn.Module, str] = {module: path for path, module in named_norm_layers(model)}
        self._watched = [module for module in self._names if module not in solved]
        turn = itertools.count()
        self._records = {name: _Record(turn) for name in self._names.values()}
        self._numbers: dict[int, Counter[nn.Module]] = {}
        self._outputs: dict[int, Any] = {}
        self._contents: dict[int, Any] = {}
        self._order: list[str] = []

    def run(self, batches: Iterable[Batch], source: Batches) -> None:
        """All batches."""
        self._source = _Again(batches, source)
        context = Context(
            self._model,
            self._layers,
            self._source,  # type: ignore[arg-type]  # as much of `Batches` as is asked for
            self._keeping,
            Group.alone(),
            self._progress,
            self._devices,
            self._memory_limit,
        )
        self._lockstep = _Lockstep(context, self._records)
        with forward_hooks(self._watched, before=self._watch), suppress(_NothingLeft):
            self._lockstep.run()

    def _is_kept(self, index: int) -> bool:
        """Whether a batch is one of those that later passes compare: evenly spread over all, once these are known."""
        count = max(self._lockstep.count, 1)
        kept = min(max(count // KEPT_SHARE, 1), MOST_KEPT)
        return index in {i * count // kept for i in range(kept)}

    def _keeping(self, model: nn.Module, content: Any) -> object:  # noqa: ANN401 - batches are of any type
        batch = self._lockstep.batch
        if batch is None:  # a look ahead
            return self._forward(model, content)
        self._numbers[batch.index] = Counter()
        output = self._forward(model, content)
        if self._is_kept(batch.index):
            self._contents[batch.index] = content
            self._outputs[batch.index] = map_tensors(output, lambda t: t.detach())
        return output

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = self._lockstep.batch
        if batch is None:
            return
        number = self._numbers[batch.index][module]
        self._numbers[batch.index][module] += 1
        self._records[self._names[module]].measure(batch.index, number, module, args, kwargs)

    def observation(self, *, exact: bool) -> Observation:
        """What it showed."""
        dropped = self._lockstep.dropped
        non_finite = {**self._lockstep.non_finite, **self._not_finite_where_watched()}
        layers = {
            self._paths[module]: observed
            for module, name in sorted(self._names.items(), key=lambda item: self._records[item[1]].turn)
            if (observed := self._records[name].observed(dropped, exact)) is not None
        }
        paths = {name: self._paths[module] for module, name in self._names.items()}
        kept = [index for index in sorted(self._outputs) if index not in dropped]
        return Observation(
            layers,
            passes=1.0,
            non_finite={paths[name]: value._replace(layer=paths[name]) for name, value in non_finite.items()},
            kept=[self._contents[index] for index in kept],
            outputs=[self._outputs[index] for index in kept],
            skipped=[SkippedLayer(name, reason) for name, reason in self._lockstep.unsettled.items()],
        )

    def _not_finite_where_watched(self) -> dict[str, NonFinite]:
        found = {}
        for module in self._watched:
            name = self._names[module]
            for batch, calls in self._records[name].calls.items():
                wrong = [~(m.mean.isfinite() & m.m2.isfinite()) for m in calls]
                if any(bool(w.any()) for w in wrong) and name not in found:
                    found[name] = NonFinite(name, batch, max(int(w.sum()) for w in wrong))
        return found


class _Again:
    """Batches of which the first was read already."""

    def __init__(self, batches: Iterable[Batch], source: Batches) -> None:
        self._batches, self._source = batches, source

    def __iter__(self) -> Any:  # noqa: ANN401 - an iterator
        return iter(self._batches)

    @property
    def read(self) -> int:
        """How many items were read."""
        return self._source.read

    @property
    def used(self) -> int:
        """How many of them held samples."""
        return self._source.used
