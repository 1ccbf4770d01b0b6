"""Remedies that cannot change what a correct network computes: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm._torch import buffers_of, children_of, parameters_of
from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.result import Fix, Fixed
from batchnorm.diagnosis.subject import Subject
from batchnorm.models.buffers import SavedBuffers
from batchnorm.models.modes import set_training
from batchnorm.models.norm_layers import NormLayer, named_norm_layers
from batchnorm.modules import BatchNorm
from batchnorm.population.batches import default_forward
from batchnorm.population.interrupts import shielded
from batchnorm.population.layers import Layer
from batchnorm.surgery.biases import remove_dead_biases
from batchnorm.surgery.convert import convert
from batchnorm.surgery.freeze import freeze

if TYPE_CHECKING:
    from batchnorm.diagnosis.report import Report


def fix(model: nn.Module, subject: Subject, report: Report, again: Callable[[], Report]) -> Fixed:
    """Put right what findings of a report are about, as far as it is safe, and check again.

    Args:
        model: in place.
        subject: what was checked.
        report: what was found.
        again: the same check.

    Returns:
        What was done, and the report after.
    """
    findings = [finding for finding in report.findings if CHECKS[finding.code].fixed]
    work = _Work(model, subject)
    with shielded(), _all_or_none(model):
        done = [(finding, what) for finding in findings if (what := REMEDIES[finding.code](work, finding))]
        after = again() if done else report
    if not done:
        return Fixed((), report)
    return Fixed(tuple(_entry(finding, what, report, after) for finding, what in done), replace(after, before=report))


def _entry(finding: Finding, what: str, before: Report, after: Report) -> Fix:
    numbers = []
    for report in (before, after):
        off = {layer.name: layer.off for layer in report.layers}.get(finding.layer)
        numbers.append("" if off is None else f"off by {off:.3g}")
    return Fix(finding.code, finding.layer, what, *(numbers if "statistics" in what else ("", "")))


class _Work:
    """The model, and what is known of it."""

    def __init__(self, model: nn.Module, subject: Subject) -> None:
        self.model = model
        self.subject = subject
        self.freed: set[str] | None = None
        self.settled: dict[str, float] | None = None

    def layer(self, name: str) -> NormLayer:
        """The layer of that name, by now."""
        return dict(named_norm_layers(self.model))[name]

    def ours(self, name: str) -> BatchNorm:
        """Likewise, one of ours: the model is converted if need be."""
        if not isinstance(self.layer(name), BatchNorm):
            convert(self.model)
        layer = self.layer(name)
        assert isinstance(layer, BatchNorm)
        return layer


def _settle(work: _Work, finding: Finding) -> str | None:
    """Exact statistics in all layers, as `recalibrate` sets them: the data have shown them already.

    Not without data, and not where it is only said that a model is fresh.
    """
    if finding.severity == "info":
        return None
    if work.settled is None:
        work.settled = {name: count for name in work.subject.far if (count := _set_exact(work, name)) is not None}
    count = work.settled.get(finding.layer)
    return None if count is None else f"statistics set to those of {count:.0f} values"


def _set_exact(work: _Work, name: str) -> float | None:
    """How many values a layer's statistics are of now; None where it keeps those that it has."""
    assert work.subject.data is not None
    observed, module = work.subject.data.layers[name], work.layer(name)
    mean, var = buffers_of(module).get("running_mean"), buffers_of(module).get("running_var")
    frozen = isinstance(module, BatchNorm) and module.frozen.statistics
    if frozen or observed.population is None or mean is None or var is None:
        return None
    Layer(name, module, mean, var).settle(observed.population.mean, observed.variance)
    return float(observed.population.count)


def _widen(work: _Work, finding: Finding) -> str:
    """Statistics in float32; torch.nn's layers of half precision cannot have these, ours can."""
    layer = work.ours(finding.layer)
    for name in ("running_mean", "running_var"):
        buffer = buffers_of(layer)[name]
        assert buffer is not None
        buffers_of(layer)[name] = buffer.float()
    return "statistics in float32, in a layer of ours"


def _freeze(work: _Work, finding: Finding) -> str:
    layer = work.ours(finding.layer)
    freeze(layer, affine=False)
    return "frozen"


def _one_mode(work: _Work, finding: Finding) -> str:
    """Inference for a layer that was left in training mode; what stands still in a network that trains is frozen."""
    if work.layer(finding.layer).training:
        set_training(work.layer(finding.layer), False)
        return "in inference mode, as the network"
    return _freeze(work, finding)


def _remove_bias(work: _Work, finding: Finding) -> str | None:
    """All at once, by the first finding."""
    example = work.subject.example
    if example is None or work.subject.forward is not default_forward:
        return None
    if work.freed is None:
        inputs: Any = example[0] if isinstance(example, (tuple, list)) else example
        report = vars(work.model).get("report")
        freed = remove_dead_biases(work.model, inputs)
        work.freed = {entry.layer for entry in vars(freed)["report"].entries if entry.done}
        vars(work.model).pop("report", None)
        if report is not None:
            vars(work.model)["report"] = report
    return "its dead bias is gone" if finding.layer in work.freed else None


def _convert(work: _Work, finding: Finding) -> str:
    work.ours(finding.layer)
    return "converted to a layer of ours"


REMEDIES: dict[str, Callable[[_Work, Finding], str | None]] = {
    "BN001": _settle,
    "BN002": _settle,
    "BN004": _settle,
    "BN005": _widen,
    "BN105": _one_mode,
    "BN106": _freeze,
    "BN201": _remove_bias,
    "BN301": _settle,
    "BN307": _convert,
}


@contextmanager
def _all_or_none(model: nn.Module) -> Iterator[None]:
    """After an exception, every module has the class, attributes, parameters, buffers, children and values it had."""
    modules = [(module, type(module)) for module in model.modules()]
    buffers = SavedBuffers(model)
    before = [
        (d, dict(d))
        for m, _ in modules
        for d in (vars(m), parameters_of(m), buffers_of(m), children_of(m))
        if d is not None
    ]
    values: list[tuple[Tensor, Tensor]] = [
        (p, p.detach().clone()) for m, _ in modules for p in parameters_of(m).values() if p is not None and _is_small(p)
    ]
    try:
        yield
    except BaseException:
        for module, kind in modules:
            module.__class__ = kind
        for current, was in before:
            current.clear()
            current.update(was)
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        buffers.restore()
        raise


def _is_small(parameter: Tensor) -> bool:
    """Whether a remedy may write to it: biases, gamma and beta; weights are never touched."""
    return parameter.dim() <= 1 and not parameter.is_meta and not torch.nn.parameter.is_lazy(parameter)
