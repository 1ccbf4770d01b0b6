"""Which domain the samples are of, for the time of a context."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.call import Assignment
from batchnorm.domains import Mixture
from batchnorm.errors import OptionError
from batchnorm.layer_state import Row
from batchnorm.models.norm_layers import split_by_origin
from batchnorm.modules import BatchNorm

# A domain's name or number; one for each sample; or weights of a mixture.
Which = str | int | Sequence[str | int] | Tensor | Mapping[str, float]


@contextmanager
def domain(model: nn.Module, which: Which) -> Iterator[None]:
    r"""Inside, the samples that a model is called with are of these domains, in each of its layers that has domains.

        import torch
        import batchnorm as bn

        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        bn.convert(net, domains=("clean", "noisy"))
        x = torch.randn(4, 3, 8, 8)
        with bn.domain(net, "noisy"):
            net(x)
        with bn.domain(net, ["clean", "noisy", "noisy", "clean"]):  # each normalised by its own domain's moments
            net(x)
        net.eval()
        with bn.domain(net, {"clean": 0.7, "noisy": 0.3}):
            net(x)

    In training, samples are normalised by the moments of their domain's samples in the batch, and these move that
    domain's running statistics; a domain without samples keeps its own, `num_batches_tracked` included. In inference
    they are normalised by their domain's running statistics. By a mixture with weights w, the statistics are those of
    the population that has these parts:

        mean = Σ w mean_d,    var = Σ w (var_d + (mean_d - mean)^2)

    Inside another context of the same layers, this one counts. A forward pass that activation checkpointing repeats in
    the backward pass needs the choice there: call `backward` inside, or give `torch.utils.checkpoint.checkpoint` the
    argument `context_fn=lambda: (batchnorm.domain(model, which), batchnorm.domain(model, which))`. Repeated for other
    domains, it raises; with `use_reentrant=True` nothing can tell.

    Args:
        model: its layers of ours with domains, of all depths, are meant; all must know `which`.
        which: a domain's name, or its number from 0; a sequence of N of these or an integer tensor (N,), one for each
            sample, in any order; or a mapping from names to weights >= 0, for inference: they are divided by their sum.

    Raises:
        OptionError: no layer has domains, or one has no such domain; weights that are negative or sum to 0.
        ShapeError, from a call inside: there are not as many samples.
        CountError, from a call inside: in training, one value for each channel in a domain.

    Source: Xie et al., "Adversarial Examples Improve Image Recognition", 2020, section 4.2 (auxiliary batch norm).
    """
    layers = layers_with_domains(model)
    if not layers:
        raise OptionError(
            "got a model without a layer that has domains; there is nothing to choose. Use batchnorm.convert(model, "
            'domains=("a", "b")) first'
        )
    with preserved(layers):
        choose(layers, which)
        yield


def layers_with_domains(model: nn.Module) -> list[BatchNorm]:
    """Those that know of any, one included."""
    return [layer for layer in split_by_origin(model)[0] if layer.domains]


@contextmanager
def preserved(layers: Sequence[BatchNorm]) -> Iterator[None]:
    """At its end, layers have the choice again that they had."""
    before = [layer._row for layer in layers]
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer._row = old


def choose(layers: Sequence[BatchNorm], which: Which) -> None:
    """Tell layers which domain the samples are of.

    Raises:
        OptionError: as `domain`; no layer is told.
    """
    choices: dict[tuple[Row, ...], Row | Assignment | Mixture] = {}
    for layer in layers:
        if layer._rows not in choices:
            try:
                choices[layer._rows] = _choice(layer, which)
            except OptionError as error:
                raise error.within(layer._title()) from None
    for layer in layers:
        layer._row = choices[layer._rows]


def check_one_population(model: nn.Module, who: str) -> None:
    """A model's layers have one domain at most.

    Raises:
        OptionError: one has several, of which `who` would not know which is meant.
    """
    for layer in layers_with_domains(model):
        if len(layer.domains) > 1:
            raise OptionError(
                f"got a model whose layers have the domains {', '.join(map(repr, layer.domains))}; {who} looks at one "
                f"population. Give it a copy with one of them: batchnorm.revert(copy.deepcopy(model), "
                f'domain="{layer.domains[0]}")'
            )


def settle(model: nn.Module, which: str | int | Mapping[str, float] | None) -> None:
    """Make a choice for good: layers keep one domain's statistics and parameters, or a mixture's, and know no others.

    Layers with one domain need no choice.

    Raises:
        OptionError: there is none and a layer needs one, or a layer knows no such domain; nothing is changed.
    """
    chosen: dict[BatchNorm, tuple[Row, tuple[Tensor, Tensor] | None]] = {}
    layers = layers_with_domains(model)
    if which is not None and not layers:
        raise OptionError(f"got domain={which!r} for a model without a layer that has domains. Leave it out")
    for layer in layers:
        try:
            choice = (
                layer._rows[0] if which is None and len(layer.domains) == 1 else _choice(layer, _given(layer, which))
            )
            if isinstance(choice, Assignment):
                raise OptionError(f"got domain={which!r}; one domain is to be kept, or a mixture. Give one name")
            if isinstance(choice, Row):
                chosen[layer] = choice, None
            else:
                chosen[layer] = layer._rows[0], layer.mixture_of(choice)
        except OptionError as error:
            raise error.within(layer._title()) from None
    for layer, (row, values) in chosen.items():
        layer._drop_domains(row)
        if values is not None:
            with torch.no_grad():
                mean, var, *_ = layer.statistics_of()
                mean.copy_(values[0])
                var.copy_(values[1])


def _given(layer: BatchNorm, which: Which | None) -> Which:
    if which is None:
        raise OptionError(
            f"got no domain for a layer that has {', '.join(map(repr, layer.domains))}; it can keep one. Pass domain= "
            f"with one of these names, or with weights of a mixture"
        )
    return which


def _choice(layer: BatchNorm, which: Which) -> Row | Assignment | Mixture:
    """What a layer is told."""
    if isinstance(which, Mapping):
        return _mixture(layer, which)
    if isinstance(which, str):
        return layer.row_of(which)
    if getattr(which, "ndim", None) == 0:  # a tensor or NumPy's
        return layer.row_of(_number(which.item()))  # type: ignore[union-attr]  # they have it
    if hasattr(which, "ndim") or isinstance(which, Sequence):
        return _assignment(layer, which)
    return layer.row_of(_number(which))


def _mixture(layer: BatchNorm, weights: Mapping[str, float]) -> Mixture:
    of_each = [0.0] * len(layer.domains)
    for name, weight in weights.items():
        of_each[layer.row_of(name).number] += float(weight)
    total = sum(of_each)
    if not (all(weight >= 0 for weight in of_each) and 0 < total < float("inf")):
        raise OptionError(
            f"got weights {dict(weights)!r} of a mixture; they must be finite and >= 0, and one must be > 0. For "
            f"example the shares of the domains in the data"
        )
    return Mixture(tuple(weight / total for weight in of_each))


def _assignment(layer: BatchNorm, which: Any) -> Assignment:  # noqa: ANN401 - a sequence, a tensor or an array
    if isinstance(which, Sequence):
        which = torch.tensor([layer.row_of(one if isinstance(one, str) else _number(one)).number for one in which])
        which = which.to(torch.int64)  # of none, too
    domains = torch.as_tensor(which)
    whole = not (domains.dtype == torch.bool or domains.is_floating_point() or domains.is_complex())
    if domains.dim() != 1 or not whole:
        raise OptionError(
            f"got domains of shape {tuple(domains.shape)} and dtype {domains.dtype}; there must be one whole number "
            f"for each sample, of shape (N,). Convert labels with .long(), or give names"
        )
    domains = domains.detach().to(torch.int64).contiguous()
    number = len(layer.domains)
    here = domains.cpu()  # a device is waited for once
    try:
        samples = tuple(torch.bincount(here, minlength=number).tolist())
    except RuntimeError:  # a negative one
        samples = ()
    if len(samples) != number:
        raise OptionError(
            f"got domains from {int(here.min())} to {int(here.max())}; this layer has {number}, numbered from 0: "
            f"{', '.join(map(repr, layer.domains))}"
        )
    return Assignment(domains, samples, _mark(here))


def _mark(domains: Tensor) -> int:
    """A number from all samples' domains and their order: a sum with weights that have nothing in common."""
    weights = torch.arange(1, len(domains) + 1) * 0x1E3779B97F4A7C15  # wraps around
    return int((domains * (weights ^ (weights >> 31))).sum()) % 2**40


def _number(which: Any) -> int:  # noqa: ANN401 - checked here
    if isinstance(which, bool) or not hasattr(which, "__index__"):
        raise OptionError(
            f"got {which!r} of type {type(which).__name__} for a domain; it must be a name or a whole number"
        )
    return operator.index(which)
