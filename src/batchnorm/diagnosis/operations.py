"""What the nodes of a graph do to the activations that pass through them, as far as checks ask."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from batchnorm.models.attributes import attribute_at
from batchnorm.models.norm_layers import NormLayer
from batchnorm.surgery import linear
from batchnorm.surgery.tracing import Region, arguments

Kind = Literal[
    "input",  # of the region
    "constant",  # a parameter or buffer
    "identity",
    "scale",  # a number, or one value for each channel, multiplied or added
    "elementwise",  # the same function of every value
    "dropout",
    "norm",
    "linear",  # a convolution, its transpose, a product with a matrix
    "average",  # linear, too, without parameters: average pooling, interpolation
    "reshape",  # the same values in another shape, the order of dimensions kept
    "transpose",  # the same values in another order of dimensions
    "concatenation",
    "join",  # two tensors added or multiplied
    "item",  # one of what a module returns
    "features",  # a layer that has its features in the last dimension, and is no product
    "unknown",
]

LINEAR = (*linear.TORCH_LAYERS, nn.Bilinear)
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MODULES: tuple[tuple[tuple[type[nn.Module], ...], Kind], ...] = (
    ((NormLayer,), "norm"),
    (DROPOUT, "dropout"),
    (LINEAR, "linear"),
    ((nn.Identity,), "identity"),
    ((nn.Flatten, nn.Unflatten), "reshape"),
    (
        (
            nn.AvgPool1d,
            nn.AvgPool2d,
            nn.AvgPool3d,
            nn.AdaptiveAvgPool1d,
            nn.AdaptiveAvgPool2d,
            nn.AdaptiveAvgPool3d,
            nn.Upsample,
            nn.PixelShuffle,
            nn.ZeroPad1d,
            nn.ZeroPad2d,
            nn.ZeroPad3d,
        ),
        "average",
    ),
    (
        (
            nn.LayerNorm,
            nn.RMSNorm,
            nn.Embedding,
            nn.RNNBase,
            nn.MultiheadAttention,
            nn.Transformer,
            nn.TransformerEncoder,
            nn.TransformerDecoder,
            nn.TransformerEncoderLayer,
            nn.TransformerDecoderLayer,
        ),
        "features",
    ),
)
# Activations that look at several values at once.
_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)

_ELEMENTWISE = (
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu gelu silu mish hardswish hardsigmoid hardtanh "
    "hardtanh_ sigmoid tanh softplus softsign logsigmoid exp log log1p sqrt abs square clamp clamp_ sign sin cos prelu "
    "threshold pow"
)
_NAMES: dict[str, Kind] = {
    **dict.fromkeys(_ELEMENTWISE.split(), "elementwise"),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), "dropout"),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), "linear"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "linear"),
    **dict.fromkeys(("contiguous", "clone", "float", "double", "half", "to", "requires_grad_"), "identity"),
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), "reshape"),
    **dict.fromkeys(("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t"), "transpose"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "concatenation"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate"), "average"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean"), "average"),
    **dict.fromkeys(("add", "sub", "mul", "truediv", "div", "iadd", "isub", "imul", "itruediv"), "join"),
    **dict.fromkeys(("add_", "sub_", "mul_", "div_", "multiply", "subtract", "divide"), "join"),
    **dict.fromkeys(("layer_norm", "rms_norm", "embedding"), "features"),
    "getitem": "item",
    "neg": "scale",
}


class Operation(NamedTuple):
    """One node of a graph.

    Attributes:
        region: whose graph it is.
        node: which one.
        kind: what it does.
        module: what it calls, if that is a module.
    """

    region: Region
    node: fx.Node
    kind: Kind
    module: nn.Module | None

    @property
    def probability(self) -> float:
        """Of a dropout: how likely it is that a value is dropped in training."""
        if self.module is not None:
            return float(getattr(self.module, "p", 0.0))
        node = self.node
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return float(p) if training and isinstance(p, (int, float)) else 0.0

    @property
    def is_product(self) -> bool:
        """Whether it is a product with a matrix, which has its features in the last dimension."""
        if self.module is not None:
            return isinstance(self.module, nn.Linear)
        return self.kind == "linear" and _name(self.node) == "linear"


def operation(region: Region, node: fx.Node) -> Operation:
    """What a node is."""
    module = region.called(node)
    if module is not None:
        return Operation(region, node, _kind_of_module(module), module)
    return Operation(region, node, _kind(region, node), None)


def _kind_of_module(module: nn.Module) -> Kind:
    kind = next((kind for classes, kind in MODULES if isinstance(module, classes)), None)
    if kind == "dropout" and not getattr(module, "p", 0.0):
        return "identity"
    if kind is not None:
        return kind
    of_torch = type(module).__module__ == "torch.nn.modules.activation"
    return "elementwise" if of_torch and not isinstance(module, _NOT_ELEMENTWISE) else "unknown"


def _kind(region: Region, node: fx.Node) -> Kind:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "constant"
    kind = _NAMES.get(_name(node), "unknown")
    if kind == "join":
        tensors = [n for n in arguments(node) if n.op != "get_attr"]
        return "join" if len(tensors) > 1 else "scale"
    if kind == "item" and not isinstance(node.args[1], int):  # x[:, 0]: a part of a tensor
        return "unknown"
    if kind == "dropout" and not Operation(region, node, kind, None).probability:
        return "identity"
    return kind


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def one_a_channel(operation: Operation, channels: int) -> bool:
    """Whether a "scale" has one value, or one for each of so many channels."""
    constants = [
        attribute_at(operation.region.module, str(n.target)) for n in arguments(operation.node) if n.op == "get_attr"
    ]
    return all(isinstance(t, Tensor) and t.numel() in (1, channels) for t in constants)


def is_per_channel(module: nn.Module | None) -> bool:
    """Whether a module is a convolution that multiplies each channel by one number."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and linear.is_of_torch(module)
        and module.groups == module.in_channels == module.out_channels
        and torch.Size(module.kernel_size).numel() == 1
        and not any(module.padding)
    )
