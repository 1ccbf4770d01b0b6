"""Biases that do nothing, because the batch norm behind them takes away the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from batchnorm.models.nested import tensors
from batchnorm.models.norm_layers import NormLayer, named_norm_layers, uncompiled
from batchnorm.modules import BatchNorm
from batchnorm.surgery import linear, scale_shift
from batchnorm.surgery.chains import Flow
from batchnorm.surgery.comparing import ALTOGETHER, difference, outputs
from batchnorm.surgery.linear import LinearLayer
from batchnorm.surgery.observing import observe
from batchnorm.surgery.recognising import linear_layers
from batchnorm.surgery.report import Entry, attach, check_free
from batchnorm.surgery.tracing import Regions, regions, seen_call


def remove_dead_biases(model: nn.Module, example_inputs: Any) -> nn.Module:  # noqa: ANN401 - what the model takes
    """Remove the biases of linear layers whose output goes to batch norm alone, in place.

        (W x + b) - mean(W x + b) = W x - mean(W x)

    In training the bias makes no difference, and its gradient is 0; in inference it is part of the running mean, which
    becomes running_mean - b. So outputs, the other gradients and the statistics to come stay the same within rounding,
    in both modes. `bias` becomes None, its key leaves the state_dict; an optimizer made before still holds it, without
    effect.

    Who feeds whom is read from graphs, as in `fold`; a part of the model counts if its graph is the same in training.
    A bias stays where it does something or others would notice: several readers, shared parameters, hooks, dropout in
    between, channels that are not the bias's, a layer that normalises by its running statistics in training.

    Args:
        model: any module.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dict of keywords. They show the
            shapes, in one pass in inference mode, and nothing else.

    Returns:
        `model`, the same object, with a `report`: for each batch-norm layer whose bias went, or why none did.

    Raises:
        OptionError: `example_inputs` is something else, or the model has a `report` of its own.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.2.
    """
    if (inside := uncompiled(model)) is not model:
        remove_dead_biases(inside, example_inputs)
        vars(model)["report"] = vars(inside)["report"]
        return model
    check_free(model)
    with linear_layers(model) as known:
        calls, returned = observe(model, example_inputs)
    found = regions(model, lambda module: seen_call(calls, module), modes=(True, False))
    flow = Flow(model, found, calls, known, training=True)
    answers, norms = dead_biases(model, found, flow), dict(named_norm_layers(model))
    why = {path: answer for path, answer in answers.items() if isinstance(answer, str)}
    dead = {path: answer for path, answer in answers.items() if isinstance(answer, LinearLayer)}
    done = {path: f"the bias of {flow.where(layer.module)} is part of the running mean" for path, layer in dead.items()}
    undo = [_remove(layer, norms[path]) for path, layer in dead.items()]
    error, tolerance = difference(outputs(model, example_inputs), list(tensors(returned)))
    if not error <= ALTOGETHER * tolerance:
        for step in undo:
            step()
        why |= dict.fromkeys(done, f"without their biases, the model is off by {error:.1e} on the example inputs")
        done, error = {}, 0.0
    return attach(
        model, "freed of a bias", (Entry(path, path in done, done.get(path) or why[path]) for path in norms), error
    )


def dead_biases(model: nn.Module, found: Regions, flow: Flow) -> dict[str, LinearLayer | str]:
    """By the paths of a model's batch-norm layers: the linear layer whose bias the layer takes away, or why none.

    Args:
        model: nothing of it is changed.
        found: its graphs, the same in both modes.
        flow: of these graphs, in training.
    """
    return {
        path: _dead_before(flow, norm) if norm in flow.sites else found.reason(path)
        for path, norm in named_norm_layers(model)
    }


def _dead_before(flow: Flow, norm: NormLayer) -> LinearLayer | str:
    """The linear layer whose bias a batch-norm layer takes away, or why there is none."""
    if not scale_shift.known(norm):
        return f"{type(norm).__qualname__} may do anything"
    if isinstance(norm, BatchNorm) and norm.frozen.normalization:
        return "it is frozen and normalises by its running statistics, so that a bias matters"
    source, reason = flow.only_source(norm)
    if source is None:
        return reason
    layer = flow.linear(source)
    if isinstance(layer, str):
        return layer
    if not linear.is_of_torch(source):
        return f"{flow.where(source)} is a {type(source).__qualname__}, which may do something else in training"
    if layer.parameters()[1] is None:
        return f"{flow.where(source)} has no bias"
    return flow.why_not_changed(layer) or flow.why_not_aligned(layer, norm) or layer


def _remove(layer: LinearLayer, norm: NormLayer) -> Callable[[], None]:
    """Remove a bias.

    Returns:
        What undoes it.
    """
    bias, mean = layer.parameters()[1], norm.running_mean
    before = None if mean is None else mean.clone()
    assert bias is not None
    layer.module.register_parameter(layer.bias, None)
    if mean is not None:
        mean.copy_(mean.double() - bias.detach().double())

    def undo() -> None:
        layer.module.register_parameter(layer.bias, bias)
        if mean is not None and before is not None:
            mean.copy_(before)

    return undo
