"""Batch normalization folded into the linear layers beside it, for scale_shift."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from batchnorm._torch import children_of
from batchnorm.choosing import settle
from batchnorm.errors import OptionError
from batchnorm.models.hooks import forward_hooks, has_hooks
from batchnorm.models.modes import inference
from batchnorm.models.nested import tensors
from batchnorm.models.norm_layers import NormLayer, display_name, named_norm_layers, uncompiled
from batchnorm.surgery import linear, scale_shift
from batchnorm.surgery.chains import Chain, Flow, find_chains
from batchnorm.surgery.comparing import ALTOGETHER, difference, outputs
from batchnorm.surgery.exported import as_module
from batchnorm.surgery.fuse import unfuse
from batchnorm.surgery.linear import LinearLayer
from batchnorm.surgery.observing import forward, observe
from batchnorm.surgery.recognising import linear_layers
from batchnorm.surgery.report import Entry, attach, check_free
from batchnorm.surgery.tracing import is_leaf, regions, seen_call

_ALONE = "a scale and shift"
_APART = f"as {_ALONE}"
LARGE_SCALE = 1e4  # with torch's eps, a variance cannot give more than 316


def fold(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,  # noqa: ANN401 - what the model takes
    *,
    domain: str | int | Mapping[str, float] | None = None,
) -> nn.Module:
    """A copy of a model for inference, in which batch-norm layers are part of the linear layers beside them.

        (W x + b) scale + shift = (scale W) x + (b scale + shift),    scale = weight / sqrt(var + eps)

    after a convolution, a transposed one or Linear, and likewise before one where that is exact: before Linear, and
    before a convolution that does not pad with zeros. Such a module is known by what it calls, of whatever class it is:
    it returns what one of torch's functions makes of its own weight and bias. A layer that stands elsewhere becomes a
    `ScaleShift`. Weights are computed in float64 and rounded once. Modules that compute a layer's activation stay where
    it was.

    Who feeds whom is read from graphs: of the whole model where torch.fx can trace it, else of the largest parts that
    it can. The code of `forward` is not replaced. Every fold is run on the example inputs beside the original layers;
    of one that changes its output by more than rounding, the layers become a `ScaleShift`, or stay where that is not
    right either. What is not folded says why in the report: a layer whose input has other readers, shared parameters,
    hooks, (N, L, C) after Linear, no running statistics.

    Args:
        model: any module, or a program of torch.export, made in inference mode; it is not changed.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dict of keywords.
        domain: of a model whose layers have several domains, the one to fold: a name, a number or the weights of a
            mixture, as `batchnorm.domain` takes them.

    Returns:
        A new module in inference mode, with a `report`: for each layer into what it was folded, or why not; the largest
        difference of the outputs from the original's.

    Raises:
        OptionError: `example_inputs` is something else or verifies nothing, the model has a `report` of its own, or a
            layer needs a `domain`, or knows no such one.
    """
    if isinstance(model, ExportedProgram):
        model = as_module(model)
    model = uncompiled(model)
    check_free(model)
    folded = _copied(model)
    settle(folded, domain)
    norms = {norm: path for path, norm in named_norm_layers(folded)}
    with linear_layers(folded) as known:
        calls, returned = observe(folded, example_inputs)
    _check_examples(example_inputs, returned)
    found = regions(
        folded,
        lambda module: seen_call(calls, module),
        modes=(False,),
        leaf=lambda module: isinstance(known.get(module), LinearLayer) or is_leaf(module),
    )
    flow = Flow(folded, found, calls, known)
    why: dict[NormLayer, str] = {}
    for norm, path in norms.items():
        if reason := _why_left(flow, norm):
            why[norm] = reason
        elif norm not in flow.sites:
            why[norm] = found.reason(path)
    chains, alone = find_chains(flow, [norm for norm in flow.sites if norm in norms and norm not in why])
    alone |= {norm: why.pop(norm) for norm in norms if norm in why and not _why_left(flow, norm)}
    done: dict[NormLayer, str] = {}
    folded, off = _verified(folded, [_of_chain(flow, chain) for chain in chains], example_inputs, done)
    lone = [_of_layer(norm, f"{_ALONE}, because {reason}") for norm, reason in (alone | off).items()]
    folded, off = _verified(folded, lone, example_inputs, done)
    why |= off
    reason, error = _why_undo(folded, example_inputs, list(tensors(returned)))
    if reason:
        folded, done, why = _copied(model), {}, dict.fromkeys(norms, reason)
    _warn_of_scales({path: norm for norm, path in norms.items() if norm in done})
    entries = [
        Entry(path, norm in done, what, _APART if norm in done and what.startswith(_ALONE) else "")
        for norm, path in norms.items()
        for what in [done.get(norm) or why[norm]]
    ]
    return attach(folded, "folded", entries, error)


@dataclass
class _Fold:
    """One change, not made yet.

    Attributes:
        first: the module where its input comes in.
        last: the module whose output it has to give.
        norms: the layers that go.
        what: what becomes of them.
        stand_in: computes the last one's output from the first one's arguments, args and kwargs, and the last one's
            kwargs.
        put_into: makes the change in a model, and returns the model.
    """

    first: nn.Module
    last: nn.Module
    norms: list[NormLayer]
    what: str
    stand_in: Callable[[tuple[Any, ...], dict[str, Any], dict[str, Any]], Tensor]
    put_into: Callable[[nn.Module], nn.Module]


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in inference mode."""
    with warnings.catch_warnings():
        # torch's own, about how the graphs of exported programs are copied.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        copied = uncompiled(_deepcopied(uncompiled(model)).eval())
    for parent in list(copied.modules()):
        for name, child in children_of(parent).items():
            if child is not None:
                children_of(parent)[name] = uncompiled(child)
    unfuse(copied)  # what is folded has nothing left to fuse, and only the class's own forward tells who reads what
    return copied


def _deepcopied(model: nn.Module) -> nn.Module:
    """A deep copy, of tensors too that were computed with gradients: weights by a hook, pruned or normed; caches.

    Raises:
        OptionError: something in the model cannot be copied, parameters that processes share for example.
    """
    computed = [tensor for module in model.modules() for tensor in tensors(vars(module)) if not tensor.is_leaf]
    try:
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
    except Exception as error:
        raise OptionError(
            f"got a model of {type(model).__qualname__} that cannot be copied: {str(error) or type(error).__name__}. "
            f"What is folded is a copy; where parameters are sharded or computed, fold the plain model"
        ) from error


def _check_examples(example_inputs: Any, returned: Any) -> None:  # noqa: ANN401 - as `forward`
    """Example inputs show something: there is a difference to see.

    Raises:
        OptionError: what comes out is empty, or nothing in it is finite.
    """
    given = [tuple(t.shape) for t in tensors(example_inputs)]
    floating = [t for t in tensors(returned) if t.is_floating_point()]
    if floating and not any(t.numel() for t in floating):
        raise OptionError(
            f"got example_inputs of shapes {given}, of which nothing comes out; what is folded is verified on them. "
            f"Pass at least one sample"
        )
    if any(not bool(t.isfinite().all()) for t in floating):
        raise OptionError(
            f"got example_inputs of shapes {given}, for which the model's outputs are not finite, folded or not; "
            f"nothing can be verified on them. Pass others, or look for what is not finite in the model's state"
        )


def _why_left(flow: Flow, norm: NormLayer) -> str | None:
    """Why a layer cannot even be a scale and shift."""
    if has_hooks(norm):
        return "it has hooks, which would not be called"
    return scale_shift.why_not(norm) or ("the example inputs do not reach it" if norm not in flow.calls else None)


def _of_layer(norm: NormLayer, what: str) -> _Fold:
    instead = scale_shift.standing_in(norm)

    def stand_in(args: Any, kwargs: Any, _: Any) -> Tensor:  # noqa: ANN401 - as the layer is called
        y: Tensor = instead(*args, **kwargs)
        return y

    return _Fold(norm, norm, [norm], what, stand_in, lambda model: _replaced(model, norm, instead))


def _of_chain(flow: Flow, chain: Chain) -> _Fold:
    layer, norms = chain.layer, [*chain.before, *chain.after]
    weights = linear.weights(layer)
    for norm in reversed(chain.before):
        weights = linear.before(layer, weights, scale_shift.affine(norm))
    for norm in chain.after:
        weights = linear.after(layer, weights, scale_shift.affine(norm))
    changed = copy.deepcopy(layer.module)
    layer.changed(changed, weights)
    behind = {norm: _behind(flow, norm) for norm in norms}

    def stand_in(args: Any, kwargs: Any, last: Any) -> Tensor:  # noqa: ANN401 - as the modules are called
        y: Tensor = changed(*args, **kwargs)
        return y if not chain.after else behind[chain.after[-1]](y, **last)

    def put_into(model: nn.Module) -> nn.Module:
        layer.changed(layer.module, weights)
        for norm in norms:
            model = _replaced(model, norm, behind[norm])
        return model

    first = chain.before[0] if chain.before else layer.module
    last = chain.after[-1] if chain.after else layer.module
    return _Fold(first, last, norms, f"part of {chain.path}", stand_in, put_into)


def _behind(flow: Flow, norm: NormLayer) -> nn.Module:
    """What stays of a layer whose scale and shift are elsewhere."""
    activation = scale_shift.activation(norm)
    if flow.with_keywords(norm):
        return scale_shift.ScaleShift(None, None, activation=activation).eval()
    return (activation or nn.Identity()).eval()


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A model with a module in all places of another."""
    for parent in list(model.modules()):
        for name, child in children_of(parent).items():
            if child is old:
                children_of(parent)[name] = new
    return new if model is old else model


def _verified(
    model: nn.Module,
    folds: list[_Fold],
    example_inputs: Any,  # noqa: ANN401 - as `forward`
    done: dict[NormLayer, str],
) -> tuple[nn.Module, dict[NormLayer, str]]:
    """A model with those of the changes that are right, which are noted in `done`; and what is wrong with others."""
    off: dict[NormLayer, str] = {}
    errors = _errors(model, folds, example_inputs) if folds else []
    for change, (error, tolerance) in zip(folds, errors, strict=True):
        if error <= tolerance:
            model = change.put_into(model)
            done |= dict.fromkeys(change.norms, change.what)
        else:
            off |= dict.fromkeys(change.norms, f"as {change.what} it is off by {error:.1e} on the example inputs")
    return model, off


def _errors(model: nn.Module, folds: list[_Fold], example_inputs: Any) -> list[tuple[float, float]]:  # noqa: ANN401
    """For each fold, the largest difference on the example inputs from what the model does now, and what it may be."""
    worst = [(0.0, 0.0)] * len(folds)
    inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    firsts = {change.first: i for i, change in enumerate(folds)}
    lasts = {change.last: i for i, change in enumerate(folds)}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[firsts[module]] = args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        i = lasts[module]
        error, tolerance = difference([folds[i].stand_in(*inputs.pop(i), kwargs)], [y])
        worst[i] = max(worst[i][0], error), tolerance

    with inference(model), forward_hooks(firsts, before=before), forward_hooks(lasts, after=after):
        forward(model, example_inputs)
    return worst


def _why_undo(folded: nn.Module, example_inputs: Any, expected: list[Tensor]) -> tuple[str, float]:  # noqa: ANN401
    """What is wrong with a folded model as a whole, if anything, and how far off what is returned will be."""
    try:
        error, tolerance = difference(outputs(folded, example_inputs), expected)
    except AttributeError as missing:
        return f"the model reads what is no longer there: {missing}", 0.0
    if error <= ALTOGETHER * tolerance:
        return "", error
    return f"the whole model folded is off by {error:.1e} on the example inputs", 0.0


def _warn_of_scales(norms: dict[str, NormLayer]) -> None:
    scales = {path: float(scale_shift.affine(norm).scale.abs().max()) for path, norm in norms.items()}
    large = {path: scale for path, scale in scales.items() if scale > LARGE_SCALE}
    if large:
        named = ", ".join(f"{display_name(path)} ({scale:.0e})" for path, scale in large.items())
        warnings.warn(
            f"these layers multiply a channel by more than {LARGE_SCALE:.0e}: {named}. Their running variance is next "
            f"to nothing, so that rounding comes out large, and half precision may overflow. Check these channels",
            UserWarning,
            stacklevel=3,
        )
