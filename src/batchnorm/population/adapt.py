"""Statistics for data that are not those of training: for a while, or for good."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from batchnorm._torch import without_compiled_code
from batchnorm.distributed import Group
from batchnorm.errors import OptionError
from batchnorm.models.devices import device_types
from batchnorm.models.hooks import Uncopied
from batchnorm.models.modes import preserved_modes, set_training
from batchnorm.models.norm_layers import unwrapped
from batchnorm.population.adaptation_report import AdaptationReport, AdaptedLayer
from batchnorm.population.adapter import Adapter
from batchnorm.population.batches import Batches, Forward, default_forward
from batchnorm.population.context import Context, Progress
from batchnorm.population.interrupts import caller, closed, shielded
from batchnorm.population.layers import select_layers
from batchnorm.population.result import SkippedLayer
from batchnorm.population.transaction import transaction

# Samples. As much as one in 17 is then what a single sample moves the statistics by, and half what sixteen do.
DEFAULT_PRIOR = 16.0


class Adaptation:
    """A model inside `adapt`: what it has seen so far, and whether that stays."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._adapters: list[Adapter] = []
        self._skipped: list[SkippedLayer] = []
        self._warned = False

    @property
    def report(self) -> AdaptationReport:
        """How many samples and effective values each layer has seen so far, and which layers are left alone."""
        seen = [adapter for adapter in self._adapters if adapter.seen.batches]
        others = [
            SkippedLayer(adapter.layer.name, "only inf or NaN" if adapter.seen.refused else "no values yet")
            for adapter in self._adapters
            if not adapter.seen.batches
        ]
        return AdaptationReport(self._prior, tuple(self._described(a) for a in seen), (*self._skipped, *others))

    def keep(self) -> None:
        """Let the statistics as they are now stay when the context is left, be it by an exception.

        Inside another `adapt` of the same layers, they become those that it goes on from until its next batch.
        """
        with closed():
            for adapter in self._adapters:
                adapter.keep()

    def _described(self, adapter: Adapter) -> AdaptedLayer:
        return AdaptedLayer.of(adapter.layer.name, adapter.seen, self._prior)

    def _tell(self, adapter: Adapter) -> None:
        """After a layer's call. Now and then only: how much it is worth takes a look at the device."""
        batches = adapter.seen.batches
        if not self._warned and batches & (batches - 1) == 0:
            self._warn([self._described(adapter)], stacklevel=2)

    def _warn(self, layers: Sequence[AdaptedLayer], stacklevel: int) -> None:
        """Once: which of these layers has seen least for what it moves, if that is too little."""
        few = [layer for layer in layers if layer.batches and layer.too_few]
        if few and not self._warned:
            self._warned = True
            worst = max(few, key=lambda layer: layer.standard_error)
            warnings.warn(worst.warning, UserWarning, stacklevel=stacklevel + 1)


@contextmanager
def adapt(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    prior: float | None = None,
    decay: float | None = None,
    forward: Forward | None = None,
) -> Iterator[Adaptation]:
    """Inside, batch-norm layers normalise by their stored statistics joined with those of other data.

        mean = (N mean_s + n mean_t) / (N + n)
        var = (N var_s + n var_t) / (N + n) + N n / (N + n)^2 (mean_s - mean_t)^2

    of a stored population of N = `prior` samples and n samples seen: the moments of both together, the variance between
    them included. On leaving, every bit is as before: statistics, modes and hooks, after exceptions and Ctrl-C too.

    With `batches`, what is seen are all of them, exactly: each layer sees what comes in if the layers before it
    normalise by their own joined statistics (`recalibrate`'s "exact", with its conditions); inside, nothing moves any
    more. Without, the model adapts online: each call of a layer first joins the moments of its own input, and then
    normalises it by statistics that include it. Batches may have any sizes, one sample too.

    - prior=0 with batches is AdaBN; prior=0 with decay=0 is prediction-time batch normalization: each batch by its own.
    - a finite prior with decay=0 is what Schneider et al. do, who leave out the variance between the two populations.

    All modules are in inference mode, so dropout is off; a layer that is called in training mode raises. Gradients flow
    through the normalisation as in inference: the statistics are constants to them. Layers of torch.nn take part as
    ours do; masks of ours are respected. Layers that are frozen or have no running statistics are left alone, and named
    in the report. A UserWarning says, once, where too few independent values move a layer. A batch with inf or NaN
    in a layer's input is not joined there. Compiled models run uncompiled inside.

    Args:
        model: any module; of wrapped ones (DistributedDataParallel, torch.compile) the inner one is adapted.
        batches: any iterable, read once, as `recalibrate` takes them.
        prior: N >= 0, a number of samples: rows of a layer's batch dimension. In a layer with several values for each
            channel and sample, a sample of the prior counts as many as one of those seen. None for 16: how many samples
            the stored statistics are of is not known, and their number would leave nothing to adapt.
        decay: online, what the samples seen so far weigh after each further one: a batch of n leaves decay^n. 0 for
            the current batch alone; None for 1: nothing is forgotten. 1 / (1 - decay) samples are remembered.
        forward: `forward(model, batch)` runs the model on one of `batches`; by default as `recalibrate`.

    Yields:
        An `Adaptation`: `report` says what was seen, `keep()` lets the statistics stay.

    Raises:
        OptionError: prior or decay outside what they may be; decay with batches.
        CountError: prior=0 and one value for each channel; no samples in batches.
        NonFiniteError: inf or NaN in batches.
        OrderError: batches with which "exact" does not work.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(2).eval()
        >>> with bn.adapt(layer, prior=8) as adapted:
        ...     y = layer(torch.randn(8, 2) + 1)
        >>> adapted.report.layers[0].weight
        0.5
        >>> layer.running_mean.tolist()
        [0.0, 0.0]

    Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", 2016 (AdaBN); Nado et al.,
    "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift", 2020; Schneider et al.,
    "Improving robustness against common corruptions by covariate shift adaptation", 2020, whose N is `prior`.
    """
    prior, decay = _checked(prior, decay, batches)
    inner = unwrapped(model)
    layers, skipped = select_layers(inner)
    adaptation = Adaptation(prior)
    adaptation._skipped = skipped
    if not layers:
        warnings.warn(
            f"no layer of this {type(inner).__name__} can be adapted, so nothing is: it has {len(skipped)} batch-norm "
            f"layers, frozen or without running statistics. Layers inside TorchScript are not seen",
            UserWarning,
            stacklevel=3,
        )
    with shielded(), ExitStack() as leaving:
        leaving.enter_context(preserved_modes(model))
        for module in model.modules():
            set_training(module, False)
        for layer in layers:
            adapter = Adapter(layer, prior, decay, adaptation._tell)
            leaving.callback(adapter.leave)
            adaptation._adapters.append(adapter)
        if batches is None:
            leaving.enter_context(without_compiled_code())
            for adapter in adaptation._adapters:
                handle = adapter.layer.module.register_forward_pre_hook(Uncopied(adapter), with_kwargs=True)
                leaving.callback(handle.remove)
        elif layers:
            _see(inner, batches, forward or default_forward, adaptation._adapters, prior)
            adaptation._warn(adaptation.report.layers, stacklevel=3)
        with caller():
            yield adaptation


def _checked(prior: float | None, decay: float | None, batches: object) -> tuple[float, float | None]:
    if prior is None:
        prior = DEFAULT_PRIOR
    if not 0 <= prior < math.inf:
        raise OptionError(f"got prior={prior}; it must be a finite number of samples >= 0, or None for {DEFAULT_PRIOR}")
    if decay is not None and not 0 <= decay <= 1:
        raise OptionError(
            f"got decay={decay}; it must be from 0, which forgets all but the current batch, to 1, which forgets "
            f"nothing, or None"
        )
    if decay is not None and batches is not None:
        raise OptionError(
            f"got decay={decay} and batches; given together they have no order, so none is older. Leave decay out, or "
            f"leave batches out and call the model with them inside"
        )
    return float(prior), None if decay == 1 else decay


def _see(model: nn.Module, batches: Iterable[Any], forward: Forward, adapters: Sequence[Adapter], prior: float) -> None:
    """Have each layer normalise by its stored statistics joined with those of batches."""
    from batchnorm.population.exact_adaptation import ExactAdaptation  # here: it imports greenlet

    by_layer = {adapter.current: adapter for adapter in adapters}
    source, devices = Batches(batches, None), device_types(model)
    progress = Progress(None, source.expected)
    context = Context(model, list(by_layer), source, forward, Group.alone(), progress, devices)
    with transaction(model, context.layers, devices):
        ExactAdaptation(context, by_layer, prior).run()
