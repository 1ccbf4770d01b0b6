"""What wrong running statistics do: outputs and loss in inference by running, exact and batch statistics, and by whom.

For each layer, two passes: one in which it alone is put right, one in which it alone is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.diagnosis.observation import ObservedLayer
from batchnorm.diagnosis.result import LayerAttribution, Measure, Mode
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.errors import OptionError
from batchnorm.models.devices import device, device_types
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.modes import set_training
from batchnorm.models.nested import map_tensors, tensors
from batchnorm.population.batches import cut, samples
from batchnorm.population.layers import Layer
from batchnorm.population.transaction import transaction

MOST_SAMPLES = 32  # of the batch that layers are compared on, one after another
LEAST_RISE = 1e-3  # of the loss: one that does not tell running and exact statistics apart says nothing of layers
NOTICED = 0.01  # standard deviations, or in the logarithm of the variance: layers nearer than that have no part


class Far(NamedTuple):
    """How far running statistics are from the population, over channels.

    Attributes:
        shift: (C,) (running mean - mean) / sqrt(var + eps), in standard deviations.
        log_ratio: (C,) log((running var + eps) / (var + eps)).
        noise: what sampling explains of a channel's shift, root mean square; 0 where that is not known.
    """

    shift: Tensor
    log_ratio: Tensor
    noise: float

    @property
    def moved(self) -> float:
        """The larger root mean square of the two; inf where one is not finite."""
        values = [float(t.square().mean().sqrt()) if t.numel() else 0.0 for t in (self.shift, self.log_ratio)]
        return max(values) if all(map(math.isfinite, values)) else math.inf


def distance_of(layer: LayerState, observed: ObservedLayer) -> Far | None:
    """How far a layer's running statistics are; None where there are none, or nothing to compare them with."""
    population = observed.population
    if layer.mean is None or layer.var is None or population is None or float(population.count) <= 1:
        return None
    mean, var = (t.detach().double().to(population.mean.device) for t in (layer.mean, layer.var))
    here = observed.variance + layer.eps
    shift = (mean - population.mean) / here.sqrt()
    log_ratio = ((var + layer.eps) / here).log()
    means = observed.sample_means
    noise = 0.0
    if len(means) > 1:
        errors = means.var(0) / len(means) / here[observed.channels.to(here.device)].cpu()
        noise = float(errors.mean().sqrt())
    return Far(shift, log_ratio, noise)


@dataclass(frozen=True)
class Gap:
    """What running statistics cost.

    Attributes:
        modes: by running, exact and batch statistics.
        attribution: of layers whose statistics are off, the largest part first.
        measure: "loss" or "output": what attribution is in.
        passes: how many forward passes attribution took.
        samples: of how many samples each; None where they cannot be counted.
    """

    modes: tuple[Mode, ...]
    attribution: tuple[LayerAttribution, ...] = ()
    measure: Measure = "output"
    passes: int = 0
    samples: int | None = None

    def mode(self, name: str) -> Mode:
        """One of the modes."""
        return next(mode for mode in self.modes if mode.name == name)


def measure(subject: Subject, far: Mapping[str, Far], *, is_worth_it: Callable[[Gap], bool]) -> Gap | None:
    """Compare, on the batches that were kept.

    Args:
        subject: with data.
        far: of the layers that have exact statistics, how far their running ones are.
        is_worth_it: whether to find out by which layers, once it is known what the gap is.

    Returns:
        None where nothing was kept.
    """
    data = subject.data
    if subject.model is None or data is None or not data.kept:
        return None
    trial = _Trial(subject, subject.model, far)
    with trial.everything_restored():
        outputs = list(data.outputs)
        columns = {"exact": outputs, "running": trial.run(data.kept, trial.running)}
        with trial.by_batches():
            columns["batch"] = trial.run(data.kept, {})
        data.passes += 2 * len(data.kept) / max(data.batches, 1)
        modes = tuple(
            Mode(
                name,
                distance(column, outputs),
                changed_decisions(column, outputs),
                trial.loss(column, data.kept),
            )
            for name, column in ((name, columns[name]) for name in ("running", "exact", "batch"))
        )
        gap = Gap(modes)
        return trial.attributed(gap, data.kept[0]) if is_worth_it(gap) else gap


class _Trial:
    """A model whose layers are given one statistics or the other."""

    def __init__(self, subject: Subject, model: nn.Module, far: Mapping[str, Far]) -> None:
        assert subject.data is not None
        self._subject, self._model, self._far = subject, model, far
        states = {state.name: state for state in subject.layers if state.name in far}
        self._layers = {
            name: Layer(name, state.module, state.mean, state.var)
            for name, state in states.items()
            if state.module is not None and state.mean is not None and state.var is not None
        }
        self.running = {name: (layer.mean.clone(), layer.var.clone()) for name, layer in self._layers.items()}
        observed = subject.data.layers
        self.exact = {name: (observed[name].population.mean, observed[name].variance) for name in self._layers}  # type: ignore[union-attr]  # `far` has no others

    @contextmanager
    def everything_restored(self) -> Iterator[None]:
        """Inside, inference mode; afterwards all is as before."""
        with transaction(self._model, (), device_types(self._model)):
            for module in self._model.modules():
                set_training(module, False)
            yield

    @contextmanager
    def by_batches(self) -> Iterator[None]:
        """Inside, these layers normalise by the moments of what they are given."""
        by_module: dict[nn.Module, Layer] = {layer.module: layer for layer in self._layers.values()}

        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moments = by_module[module].moments(args, kwargs)
            by_module[module].write(moments.mean, moments.m2 / torch.where(moments.count > 0, moments.count, 1))

        with forward_hooks(by_module, before=write):
            yield

    def run(self, contents: Sequence[Any], statistics: Mapping[str, tuple[Tensor, Tensor]]) -> list[Any]:
        """The outputs for batches, by these statistics."""
        for name, values in statistics.items():
            self._layers[name].write(*values)
        return [self._subject.forward(self._model, content) for content in contents]

    def loss(self, outputs: Sequence[Any], contents: Sequence[Any]) -> float | None:
        """The mean loss over samples."""
        return None if self._subject.loss is None else mean_loss(self._subject, self._model, outputs, contents)

    def attributed(self, gap: Gap, content: Any) -> Gap:  # noqa: ANN401 - batches are of any type
        """The gap with each layer's part in it, on a few samples."""
        few = [cut(content, MOST_SAMPLES) if samples(content) else content]
        exact, running = self.run(few, self.exact), self.run(few, self.running)
        at_exact, at_running = self.loss(exact, few), self.loss(running, few)
        measure: Measure = "output"
        cost: Callable[[list[Any]], float] = lambda outputs: _or_inf(distance(outputs, exact))  # noqa: E731 - one expression
        if at_exact is not None and at_running is not None and at_running - at_exact > LEAST_RISE * abs(at_exact):
            measure, cost = "loss", lambda outputs: (self.loss(outputs, few) or 0.0) - (at_exact or 0.0)
        whole = cost(running)
        if not math.isfinite(whole):  # then who makes it so
            measure, cost, whole = "output", lambda outputs: 0.0 if _finite(outputs) else 1.0, 1.0
        if whole <= 0:
            return replace(gap, passes=2, samples=samples(few[0]))
        parts = []
        for name, far in self._far.items():
            if name in self._layers and far.moved > NOTICED:
                right = cost(self.run(few, self.running | {name: self.exact[name]}))
                wrong = cost(self.run(few, self.exact | {name: self.running[name]}))
                parts.append(LayerAttribution(name, 1 - right / whole, wrong / whole))
        parts.sort(key=lambda part: -(part.closes + part.remains))
        return Gap(gap.modes, tuple(parts), measure, 2 + 2 * len(parts), samples(few[0]))


def mean_loss(subject: Subject, model: nn.Module, outputs: Sequence[Any], contents: Sequence[Any]) -> float:
    """The mean over samples of the loss of outputs, whose targets are the batches' second items."""
    total, weight = 0.0, 0
    home = device(model)
    for output, content in zip(outputs, contents, strict=True):
        n = samples(content) or 1
        target = map_tensors(target_of(content), lambda t: t.to(home))
        assert subject.loss is not None
        total, weight = total + n * float(subject.loss(output, target)), weight + n
    return total / weight


def target_of(content: Any) -> Any:  # noqa: ANN401 - batches are of any type
    """A batch's target: its second item.

    Raises:
        OptionError: there is none.
    """
    if isinstance(content, (tuple, list)) and len(content) >= 2:
        return content[1]
    raise OptionError(
        f"got a loss and a batch of type {type(content).__name__}; with a loss, batches must be (input, target). Yield "
        f"such pairs, or leave loss out"
    )


def distance(outputs: Sequence[Any], others: Sequence[Any]) -> float | None:
    r"""How far outputs are from others, relative to how these vary: |a - b| / |b - mean of b over samples|.

    None where that is not finite.
    """
    apart = spread = whole = 0.0
    for a, b in zip(_floats(outputs), _floats(others), strict=True):
        a, b = a.double(), b.double()
        apart += float((a - b).square().sum())
        spread += float((b - (b.mean(0, keepdim=True) if b.dim() else b)).square().sum())
        whole += float(b.square().sum())
    scale = spread or whole
    if not math.isfinite(apart) or (apart and not scale):
        return None
    return math.sqrt(apart / scale) if scale else 0.0


def changed_decisions(outputs: Sequence[Any], others: Sequence[Any]) -> float | None:
    """The share of samples whose largest output is another one; None where outputs do not look like logits."""
    changed = total = 0
    for output, other in zip(outputs, others, strict=True):
        pair = [next(iter(_floats([value])), None) for value in (output, other)]
        if any(t is None or t.dim() != 2 or t.shape[1] < 2 for t in pair):
            return None
        a, b = pair
        assert a is not None
        assert b is not None
        changed += int((a.argmax(1) != b.argmax(1)).sum())
        total += len(a)
    return changed / total if total else None


def _floats(outputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in tensors(list(outputs)) if t.is_floating_point()]


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _finite(outputs: Sequence[Any]) -> bool:
    return all(bool(t.isfinite().all()) for t in _floats(outputs))
