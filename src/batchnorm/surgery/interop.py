"""Layers from and to other libraries, which mean other things by the same words.

Their momentum weighs the old statistics, torch's the new ones; their running variance is made of biased variances,
torch's of unbiased ones; eps and the place of the channels differ.

Sources: the references of keras.layers.BatchNormalization, flax.linen.BatchNorm and ONNX's BatchNormalization (15).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from batchnorm._torch import BatchNormBase
from batchnorm.errors import CountError, OptionError
from batchnorm.modules import BatchNorm


class Convention(NamedTuple):
    """What a library calls a layer's values, and what they are unless it says.

    Attributes:
        weight: gamma.
        bias: beta.
        running_mean: the running mean.
        running_var: the running variance.
        axis: the dimension of the channels; None where it is always 1.
        momentum: the usual weight of the old statistics.
        epsilon: what is added to the variance, usually.
    """

    weight: str
    bias: str
    running_mean: str
    running_var: str
    axis: str | None
    momentum: float
    epsilon: float


CONVENTIONS = {
    "keras": Convention("gamma", "beta", "moving_mean", "moving_variance", "axis", 0.99, 1e-3),
    "flax": Convention("scale", "bias", "mean", "var", "axis", 0.99, 1e-5),
    "onnx": Convention("scale", "B", "input_mean", "input_var", None, 0.9, 1e-5),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_LAST = -1  # the channels, where there is an axis and nothing is said


def from_convention(library: str, values: Mapping[str, Any], *, batch_count: int | None = None) -> BatchNorm:
    """A layer of ours from another library's values.

    Args:
        library: "keras", "flax" or "onnx".
        values: by the library's own names: the running mean and variance; gamma and beta where there are any, (C,)
            tensors, arrays, variables or lists each; `momentum`, `epsilon` and `axis` where they are not the library's
            defaults.
        batch_count: how many values of each channel the variances in the running one were of, N times the positions.
            With it the running variance is multiplied by n / (n - 1), which is what training in torch would have come
            to. Without it stays as it is, and inference is what it was there.

    Returns:
        A `BatchNorm` in training mode, with the channels where the library has them.

    Raises:
        OptionError: an unknown library or name, a running statistic that is missing, or values that are not (C,)
            numbers.
        CountError: a batch_count below 2.
    """
    names = _convention(library)
    known = {*names[:4], "momentum", "epsilon"} | ({names.axis} if names.axis else set())
    missing = {names.running_mean, names.running_var} - values.keys()
    if missing or values.keys() - known:
        raise OptionError(
            f"got values {', '.join(sorted(values)) or '(none)'} of a {library} layer; there must be "
            f"{names.running_mean} and {names.running_var}, and may be {', '.join(sorted(known))}. Pass only these"
        )
    given = {ours: getattr(names, ours) for ours in _TENSORS}
    tensors = {ours: _tensor(name, values[name]) for ours, name in given.items() if values.get(name) is not None}
    mean = tensors["running_mean"]
    for ours, tensor in tensors.items():
        if tensor.shape != mean.shape:
            raise OptionError(
                f"got {given[ours]} of {len(tensor)} values beside {names.running_mean} of {len(mean)}; each has one "
                f"value a channel. Pass values of one layer"
            )
    layer = BatchNorm(
        len(mean),
        eps=float(values.get("epsilon", names.epsilon)),
        momentum=1 - float(values.get("momentum", names.momentum)),
        affine="weight" in tensors or "bias" in tensors,
        channel_dim=1 if names.axis is None else int(values.get(names.axis, _LAST)),
        dtype=mean.dtype,
    )
    for name in {"weight", "bias"} - tensors.keys():
        layer.register_parameter(name, None)
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(layer, name).copy_(tensor)
        if layer.running_var is not None and batch_count is not None:
            layer.running_var.mul_(_correction(batch_count))
    return layer


def to_convention(layer: BatchNormBase, library: str, *, batch_count: int | None = None) -> dict[str, Any]:
    """A layer's values in another library's names and meanings: the inverse of `from_convention`.

    Args:
        layer: ours or torch.nn's, with running statistics.
        library: "keras", "flax" or "onnx".
        batch_count: as in `from_convention`; the running variance is multiplied by (n - 1) / n.

    Returns:
        Tensors (C,), copies, and numbers. What the layer has not is not there, except for ONNX, which needs all four.

    Raises:
        OptionError: an unknown library; a layer without running statistics, or one with `momentum=None`, an activation
            or channels elsewhere, which the library cannot express.
        CountError: a batch_count below 2.
    """
    names = _convention(library)
    mean, var = layer.running_mean, layer.running_var
    channel_dim = getattr(layer, "channel_dim", 1)
    beyond = "no running statistics" if mean is None or var is None else ""
    beyond = beyond or ("momentum=None" if layer.momentum is None else "")
    beyond = beyond or (f"activation={layer.activation}" if getattr(layer, "activation", None) else "")
    beyond = beyond or (f"channel_dim={channel_dim}" if names.axis is None and channel_dim != 1 else "")
    if beyond or mean is None or var is None or layer.momentum is None:
        raise OptionError(f"got a layer with {beyond}; {library} has no such layer. Change it, and convert again")
    weight, bias = layer.weight, layer.bias
    if names.axis is None:
        weight, bias = (torch.full_like(mean, n) if t is None else t for n, t in ((1, weight), (0, bias)))
    tensors = {names.weight: weight, names.bias: bias, names.running_mean: mean, names.running_var: var}
    found: dict[str, Any] = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    if batch_count is not None:
        found[names.running_var] /= _correction(batch_count)
    if names.axis is not None:
        found[names.axis] = channel_dim
    return found | {"momentum": 1 - layer.momentum, "epsilon": vars(layer)["eps"]}


def _tensor(name: str, value: Any) -> torch.Tensor:  # noqa: ANN401 - tensors, arrays, lists, variables
    """A copy (C,): of arrays that cannot be written to as well, and of variables, which have their values in NumPy."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        tensor = value.detach().clone()
    else:
        if hasattr(value, "numpy"):
            value = value.numpy()
        if hasattr(value, "__array__"):
            array = value.__array__()
            # What torch does not read: JAX' bfloat16, which NumPy does not know itself, and bytes in the other order.
            value = array.astype("float32" if array.dtype.name == "bfloat16" else array.dtype.newbyteorder("="))
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"got {name} of {kind}, from which no tensor can be made: {error}. Pass a tensor, an array or a list"
            ) from error
    if tensor.dim() != 1:
        raise OptionError(
            f"got {name} of shape {tuple(tensor.shape)}; it must be (C,), one value a channel. Reshape it"
        )
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _convention(library: str) -> Convention:
    if library not in CONVENTIONS:
        raise OptionError(f"got library={library!r}; it must be one of {', '.join(map(repr, CONVENTIONS))}")
    return CONVENTIONS[library]


def _correction(batch_count: int) -> float:
    """From a biased variance of n values to the unbiased one."""
    if batch_count < 2:
        raise CountError(f"got batch_count={batch_count}; an unbiased variance needs at least 2 values. Leave it out")
    return batch_count / (batch_count - 1)
