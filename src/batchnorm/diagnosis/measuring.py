"""From what was heard of layers to numbers: one copy from each device, then float64 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._torch import buffers_of, parameters_of
from batchnorm.diagnosis.listening import Heard
from batchnorm.diagnosis.records import SPREADS, LayerRecord, Spread
from batchnorm.kernels.reference import statistics_dtype
from batchnorm.modules import BatchNorm

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_PLAIN = (Tensor, nn.Parameter)

Key = tuple[int, str]  # a layer's number, and the name of one of its tensors


@dataclass(frozen=True, eq=False)
class Measured:
    """A record, and what it summarises: (C,) float64 on the CPU, by the names of the record's spreads."""

    record: LayerRecord
    vectors: Mapping[str, Tensor]


class Packed:
    """Copies of tensors as they are now, which stay on their devices until they are asked for: nothing waits.

    Args:
        tensors: floating or integer tensors, by key.
    """

    def __init__(self, tensors: Mapping[Key, Tensor]) -> None:
        by_device: dict[torch.device, dict[Key, Tensor]] = {}
        for key, tensor in tensors.items():
            by_device.setdefault(tensor.device, {})[key] = tensor.detach()
        self._parts = [
            (
                {key: tensor.numel() for key, tensor in group.items()},
                torch.cat([tensor.reshape(-1).to(statistics_dtype(device)) for tensor in group.values()]),
            )
            for device, group in by_device.items()
        ]

    def unpacked(self) -> dict[Key, Tensor]:
        """The copies as float64 vectors on the CPU: the only wait for the devices."""
        return {
            key: vector
            for sizes, flat in self._parts
            for key, vector in zip(sizes, flat.cpu().double().split(list(sizes.values())), strict=True)
        }


class Snapshot:
    """What layers were when a forward pass ended.

    Args:
        step: the step's number.
        heard: the layers that it called.
    """

    @torch.no_grad()
    def __init__(self, step: int, heard: Sequence[Heard]) -> None:
        self.step = step
        self._heard = heard
        self._packed = Packed(_named(map(_state, heard)))

    @torch.no_grad()
    def measured(self, optimizer: torch.optim.Optimizer | None, before: Mapping[str, Measured]) -> list[Measured]:
        """The records, in the model's order.

        Args:
            optimizer: whose step just ended; None where none is known.
            before: by layer's name, what was measured last.
        """
        gradients = Packed(_named(map(_gradients, self._heard))).unpacked()
        rates = {
            id(p): float(group["lr"])
            for group in (optimizer.param_groups if optimizer else ())
            for p in group["params"]
        }
        found = self._packed.unpacked() | gradients
        return [
            _measured(
                self.step,
                heard,
                {name: vector for (number, name), vector in found.items() if number == i},
                None if heard.linear_weight is None else rates.get(id(heard.linear_weight)),
                before.get(heard.name),
            )
            for i, heard in enumerate(self._heard)
        ]


def _named(tensors: Any) -> dict[Key, Tensor]:  # noqa: ANN401 - an iterator of dicts
    return {
        (i, name): tensor
        for i, of_layer in enumerate(tensors)
        for name, tensor in of_layer.items()
        if type(tensor) in _PLAIN and not tensor.is_meta
    }


def _state(heard: Heard) -> dict[str, Tensor | None]:
    layer, moments = heard.layer, heard.moments
    buffers, parameters = buffers_of(layer), parameters_of(layer)
    assert moments is not None
    return {
        "count": moments.count,
        "batch_mean": moments.mean,
        "m2": moments.m2,
        "highest": heard.highest,
        "running_mean": buffers.get("running_mean"),
        "running_var": buffers.get("running_var"),
        "weight": parameters.get("weight"),
        "bias": parameters.get("bias"),
        "skipped": layer.num_batches_skipped if isinstance(layer, BatchNorm) else None,
        "linear_norm": None if heard.linear_weight is None else torch.linalg.vector_norm(heard.linear_weight),
    }


def _gradients(heard: Heard) -> dict[str, Tensor | None]:
    parameters = parameters_of(heard.layer)
    return {
        f"{name}_gradient": None if parameter is None else parameter.grad
        for name in ("weight", "bias")
        for parameter in [parameters.get(name)]
    }


def _measured(
    step: int, heard: Heard, found: dict[str, Tensor], rate: float | None, before: Measured | None
) -> Measured:
    """One layer's record.

    Args:
        step: its step.
        heard: the layer.
        found: its tensors, by name.
        rate: the learning rate of the linear layer's weight.
        before: what was measured of the layer last.
    """
    count, eps = float(found["count"]), vars(heard.layer)["eps"]  # `layer.eps` may refuse to be read
    vectors = {name: found[name] for name in SPREADS if name in found}
    batch_mean, batch_var = found["batch_mean"], found["m2"] / count
    vectors["batch_var"] = batch_var
    mean, var = found.get("running_mean"), found.get("running_var")
    old = {} if before is None else before.vectors
    if mean is not None and var is not None:
        vectors["shift"] = (batch_mean - mean) / (var + eps).sqrt()
        if count > 1:
            vectors["log_variance_ratio"] = ((found["m2"] / (count - 1) + eps) / (var + eps)).log()
        if "running_mean" in old and "running_var" in old:
            vectors["drift"] = (mean - old["running_mean"]) / (old["running_var"] + eps).sqrt()
            vectors["log_variance_drift"] = ((var + eps) / (old["running_var"] + eps)).log()
    noise = None
    if before is not None:
        expected = batch_var / count + old["batch_var"] / before.record.count
        noise = _root_mean((batch_mean - old["batch_mean"]).square() / expected)
    norm = float(found["linear_norm"]) if "linear_norm" in found else 0.0
    spreads: dict[str, Any] = dict.fromkeys(SPREADS) | _spreads(vectors)
    record = LayerRecord(
        step,
        heard.name,
        batch_mean.numel(),
        heard.calls,
        int(count) if count.is_integer() else count,
        noise=noise,
        weight_gradient=_norm(found.get("weight_gradient")),
        bias_gradient=_norm(found.get("bias_gradient")),
        dead=_dead(found),
        effective_learning_rate=None if rate is None or not norm else _finite(rate / norm**2),
        non_finite=int((~(batch_mean.isfinite() & batch_var.isfinite())).sum()),
        skipped=int(found["skipped"].max()) if "skipped" in found and found["skipped"].numel() else None,
        **spreads,
    )
    return Measured(record, vectors)


def _spreads(vectors: Mapping[str, Tensor]) -> dict[str, Spread | None]:
    """How each of some (C,) vectors is spread, of what is finite in it."""
    values = torch.stack(list(vectors.values()))
    levels = torch.tensor(_QUANTILES, dtype=values.dtype)
    rows = torch.nanquantile(torch.where(values.isfinite(), values, torch.nan), levels, dim=1).T.tolist()
    return {name: None if row[0] != row[0] else Spread(*row) for name, row in zip(vectors, rows, strict=True)}


def _dead(found: Mapping[str, Tensor]) -> float | None:
    """`LayerRecord.dead`; None where there is neither gamma nor a gradient to tell by."""
    gradients = [found[name] for name in ("weight_gradient", "bias_gradient") if name in found]
    weight, highest = found.get("weight"), found.get("highest")
    dead = torch.zeros_like(found["batch_mean"], dtype=torch.bool)
    if weight is not None:
        dead |= weight == 0
    if gradients and highest is not None:
        dead |= (highest <= 0) & torch.stack(gradients).eq(0).all(0)
    elif weight is None:
        return None
    return float(dead.double().mean())


def _root_mean(squares: Tensor) -> float | None:
    """The root of the mean of what is finite; None of nothing."""
    finite = squares[squares.isfinite()]
    return float(finite.mean().sqrt()) if finite.numel() else None


def _norm(vector: Tensor | None) -> float | None:
    return None if vector is None else _finite(float(torch.linalg.vector_norm(vector)))


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
