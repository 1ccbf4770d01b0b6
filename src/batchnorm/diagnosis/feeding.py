"""Which linear layers feed batch-norm layers alone, so that the scale of their weights makes no difference."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.diagnosis.subject import Subject
from batchnorm.models.devices import device_types
from batchnorm.models.norm_layers import NormLayer, named_norm_layers, uncompiled
from batchnorm.modules import BatchNorm
from batchnorm.population.interrupts import caller
from batchnorm.population.transaction import transaction
from batchnorm.surgery import linear, scale_shift
from batchnorm.surgery.chains import Flow
from batchnorm.surgery.linear import LinearLayer
from batchnorm.surgery.observing import observe
from batchnorm.surgery.recognising import linear_layers
from batchnorm.surgery.tracing import regions, seen_call


def scale_invariant(subject: Subject) -> dict[NormLayer, LinearLayer]:
    """By batch-norm layer, the linear layer right before it: a multiple of its weight has the same output in training.

    It takes one inference pass of the subject's example. Nothing without a model or an example, and nothing for what
    cannot be traced. Not for layers whose weight has other readers, nor where training normalises by something else
    than the batch.
    """
    if subject.model is None or subject.example is None:
        return {}
    model = uncompiled(subject.model)
    if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
        return {}
    example = subject.example
    if subject.data is not None:
        subject.data.passes += 1 / max(subject.data.batches, 1)

    def forward(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - what models take and return
        with caller():
            return subject.forward(model, batch)

    with transaction(model, (), device_types(model)), linear_layers(model) as known:
        calls, _ = observe(model, example, forward)
    flow = Flow(
        model,
        regions(model, lambda module: seen_call(calls, module), modes=(True, False)),
        calls,
        known,
        training=True,
    )
    found = {norm: _before(flow, norm) for _, norm in named_norm_layers(model)}
    return {norm: layer for norm, layer in found.items() if layer is not None}


def _before(flow: Flow, norm: NormLayer) -> LinearLayer | None:
    if norm not in flow.sites or not scale_shift.known(norm):
        return None
    if isinstance(norm, BatchNorm) and norm.frozen.normalization:
        return None
    source = flow.only_source(norm)[0]
    layer = None if source is None else flow.linear(source)
    if not isinstance(layer, LinearLayer) or not linear.is_of_torch(layer.module):
        return None
    return None if flow.why_not_changed(layer) or flow.why_not_aligned(layer, norm) else layer
