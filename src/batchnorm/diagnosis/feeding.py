"""Which linear layers feed batch-norm layers alone, so that the scale of their weights makes no difference."""

from __future__ import annotations

from batchnorm.diagnosis.graph import graph
from batchnorm.diagnosis.subject import Subject
from batchnorm.models.norm_layers import NormLayer, named_norm_layers, uncompiled
from batchnorm.modules import BatchNorm
from batchnorm.surgery import linear, scale_shift
from batchnorm.surgery.chains import Flow
from batchnorm.surgery.linear import LinearLayer


def scale_invariant(subject: Subject) -> dict[NormLayer, LinearLayer]:
    """By batch-norm layer, the linear layer right before it: a multiple of its weight has the same output in training.

    Nothing without an example that the model runs on, and nothing for what cannot be traced. Not for layers whose
    weight has other readers, nor where training normalises by something else than the batch.
    """
    known = graph(subject)
    if subject.model is None or known is None or not known.seen:
        return {}
    flow, model = known.flow, uncompiled(subject.model)
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
