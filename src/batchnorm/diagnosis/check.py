"""The entry point: what may be asked for, what is looked at, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.choosing import check_one_population
from batchnorm.diagnosis import gap
from batchnorm.diagnosis.catalogue import selected
from batchnorm.diagnosis.checks.inference import gap_severity, is_far, is_fresh
from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.fix import fix
from batchnorm.diagnosis.gradients import training_gradients
from batchnorm.diagnosis.observation import Observation, ObservedLayer
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import ReportedLayer
from batchnorm.diagnosis.subject import LayerState, Subject, subject_of_model, subject_of_state_dict
from batchnorm.errors import OptionError
from batchnorm.messages import described
from batchnorm.models.norm_layers import display_name, uncompiled
from batchnorm.population.batches import Forward, default_forward
from batchnorm.population.result import SkippedLayer

Codes = Iterable[str] | str | None


def check(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    second: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    select: Codes = None,
    ignore: Codes = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> Report:
    """Find what is wrong with a network's batch norm: where, by how much, and what to type.

        report = bn.check(model, batches)
        print(report)

    Works on torch.nn's layers and ours. Without data, what can be seen of the layers alone; with batches, one forward
    pass over them in inference mode shows every layer's population, each batch and each sample; two more over every
    fourth batch compare inference by running, exact and batch statistics where running ones are off. The model comes
    back as it was: values, modes, hooks, gradients and random streams, also after an exception or Ctrl-C.

    Args:
        model: any module; DistributedDataParallel's inner module is what runs.
        batches: what `recalibrate` takes; with a loss, pairs (input, target). Give batches as large as in training:
            some checks are about that.
        second: other data, to compare with: validation, or what comes in deployment.
        forward: `forward(model, batch)` runs the model and returns its output; by default as in `recalibrate`.
        loss: `loss(output, target)` gives one number.
        optimizer: what trains the model.
        select: codes, or beginnings of codes, of the checks to run: "BN3", or ["BN1", "BN301"]. All by default.
        ignore: likewise, those to leave out.
        memory_limit: bytes of suspended activations, as in `recalibrate`.
        progress: called as `progress(done, total)`, as in `recalibrate`.

    Returns:
        The report: findings, what hurts most first; layers; what inference gives by which statistics.

    Raises:
        OptionError: a code that no check has, a loss without batches, or batches that are no pairs with a loss.
        CountError: batches without samples.
        Anything that the batches, the model, `forward` or `loss` raises.
    """
    from batchnorm.diagnosis.observing import observe  # here, so that importing the package does not import greenlet

    checks = selected(select, ignore)
    inner = uncompiled(model.module if isinstance(model, DistributedDataParallel) else model)
    check_one_population(inner, "check")
    for name, value in (("loss", loss), ("second", second)):
        if value is not None and batches is None:
            raise OptionError(f"got {name} without batches; there is nothing to compute it with. Give batches, too")
    subject = subject_of_model(inner, optimizer=optimizer, loss=loss, forward=forward or default_forward)
    if batches is not None:
        subject.data = observe(inner, batches, forward=subject.forward, memory_limit=memory_limit, progress=progress)
        if second is not None:
            subject.second = observe(inner, second, forward=subject.forward, memory_limit=memory_limit)
        _look(subject, subject.data, {check.code for check in checks})

    def again() -> Report:
        """Without data that can be read only once."""
        data, other = (None if given is None or iter(given) is given else given for given in (batches, second))
        return check(
            model,
            data,
            second=None if data is None else other,
            forward=forward,
            loss=None if data is None else loss,
            optimizer=optimizer,
            select=select,
            ignore=ignore,
            memory_limit=memory_limit,
        )

    return _report(subject, checks, again)


def check_state_dict(state: Mapping[str, Any], *, select: Codes = None, ignore: Codes = None) -> Report:
    """`check` of what a state_dict alone shows: layers are known by running_mean and running_var."""
    return _report(subject_of_state_dict(state), selected(select, ignore), None)


def _look(subject: Subject, data: Observation, codes: set[str]) -> None:
    """What is computed from data besides the pass over them."""
    subject.example = data.kept[0] if data.kept else None
    if subject.loss is not None and data.kept:
        gap.target_of(data.kept[0])  # said at once, not where it happens to be needed
    for layer in subject.layers:
        observed, ours = data.layers.get(layer.name), layer.ours
        if observed is None or not observed.exact or (ours is not None and ours.frozen.normalization):
            continue
        if (far := gap.distance_of(layer, observed)) is not None:
            subject.far[layer.name] = far
    if "BN301" in codes and not is_fresh(subject) and any(map(is_far, subject.far.values())):
        subject.gap = gap.measure(subject, subject.far, is_worth_it=lambda found: gap_severity(found) is not None)
    if subject.loss is not None and "BN403" in codes and data.kept:
        try:
            subject.gradients = training_gradients(subject, data.kept[0])
        except Exception as error:  # in training a model may return something else, or need more
            why = f"no gradients, because a training pass raised {type(error).__name__}: {described(error)}"
            data.skipped = [*data.skipped, SkippedLayer(display_name(""), why)]
        data.passes += 1 / max(data.batches, 1)


def _report(subject: Subject, checks: Sequence[Check], again: Callable[[], Report] | None) -> Report:
    there = {
        "state": True,
        "model": subject.model is not None,
        "data": subject.data is not None,
        "second": subject.second is not None,
        "optimizer": subject.optimizer is not None,
        "loss": bool(subject.gradients),
    }
    findings = [finding for check in checks if there[check.needs] for finding in check.run(subject)]
    data, found = subject.data, subject.gap
    observed = {} if data is None else data.layers
    report = Report(
        findings,
        [_reported(layer, observed.get(layer.name), subject.far.get(layer.name)) for layer in subject.layers],
        skipped=[*_unseen(subject.model), *(() if data is None else data.skipped)],
        batches=0 if data is None else data.batches,
        samples=None if data is None else data.samples,
        passes=0.0 if data is None else data.passes,
        attribution=None if found is None else found.attribution,
        measure="output" if found is None else found.measure,
        modes=None if found is None else found.modes,
    )
    if again is None or subject.model is None:
        return report
    model = subject.model
    with_fix: Report = replace(report, fixer=lambda: fix(model, subject, with_fix, again))
    return with_fix


def _unseen(model: nn.Module | None) -> list[SkippedLayer]:
    """Layers that run without calling Python, so that nothing can be seen of them."""
    if model is None:
        return []
    scripted = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    return [
        SkippedLayer(display_name(path), "TorchScript, whose layers cannot be seen: check the model as it was before")
        for path, module in scripted
        if "running_mean" in dict(module.named_buffers(recurse=False))
    ]


def _reported(layer: LayerState, observed: ObservedLayer | None, far: gap.Far | None) -> ReportedLayer:
    population = None if observed is None else observed.population
    if far is None and observed is not None:
        far = gap.distance_of(layer, observed)
    return ReportedLayer(
        layer.name,
        "" if layer.module is None else type(layer.module).__name__,
        layer.num_channels,
        None if observed is None else observed.input.shape,
        None if population is None else population.count.item(),
        None if far is None else far.shift.cpu(),
        None if far is None else far.log_ratio.cpu(),
    )
