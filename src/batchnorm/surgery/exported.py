"""An exported program as a module whose linear and batch-norm layers are modules again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from batchnorm._torch import buffers_of, children_of, parameters_of
from batchnorm.models.attributes import attribute_at
from batchnorm.modules import BatchNorm

Operands = dict[str, Any]
# What a program puts between a buffer and its use.
_SAME_VALUES = ("aten.detach.default", "aten.clone.default", "aten.alias.default")


def as_module(program: ExportedProgram) -> nn.Module:
    """A program's module, with layers for its operators of convolution, Linear and batch norm in inference.

    Parameters and buffers are the program's own. A layer has its old path where the path of its parameters shows it. An
    operator whose weights are computed, or whose statistics are the batch's, stays an operator.
    """
    exported = program.module()
    assert isinstance(exported, fx.GraphModule)
    # Without the class that refuses .eval(): it would mean nothing to a graph, but it does to layers.
    module = fx.GraphModule(exported, exported.graph)
    made: dict[object, str] = {}
    for node in list(module.graph.nodes):
        build = _BUILDERS.get(str(node.target))
        operands = None if build is None else _operands(module, node)
        if build is None or operands is None:
            continue
        key = (
            str(node.target),
            tuple(sorted((k, id(v) if isinstance(v, Tensor) else str(v)) for k, v in operands.items())),
        )
        x, residual = operands.pop("input"), operands.pop("residual", None)
        if key not in made:
            layer = build(x.meta["val"].dim(), operands)
            if layer is None:
                continue
            made[key] = _insert(module, layer.eval(), node)
        with module.graph.inserting_before(node):
            keywords = {} if residual is None else {"residual": residual}
            call = module.graph.call_module(made[key], (x,), keywords)
        call.meta = {**node.meta}
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "call_module", "output"))
    module.recompile()
    return module


def _operands(module: nn.Module, node: fx.Node) -> Operands | None:
    """An operator's operands by name, weights and statistics as tensors; None where one of these is computed."""
    schema = node.target._schema  # type: ignore[union-attr]  # an operator
    operands = {argument.name: argument.default_value for argument in schema.arguments}
    operands |= dict(zip(operands, node.args, strict=False)) | node.kwargs
    operands["input"] = operands.pop("x", operands.get("input"))
    for name, value in operands.items():
        if isinstance(value, fx.Node) and name not in ("input", "residual"):
            stored = _stored(value)
            if stored is None:
                return None
            operands[name] = attribute_at(module, str(stored.target))
    return operands


def _stored(node: fx.Node) -> fx.Node | None:
    """The node that reads the parameter or buffer that another has the values of."""
    while str(node.target) in _SAME_VALUES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "get_attr" else None


def _insert(module: fx.GraphModule, layer: nn.Module, node: fx.Node) -> str:
    """Put a layer where its parameters are, if there is nothing else; else beside everything.

    Returns:
        Its path.
    """
    stored = [s for argument in node.args[1:] if isinstance(argument, fx.Node) and (s := _stored(argument)) is not None]
    owners = {str(s.target).rpartition(".")[0] for s in stored}
    path = owners.pop() if len(owners) == 1 else ""
    holder = module.get_submodule(path)
    if not path or children_of(holder) or not parameters_of(holder).keys() <= parameters_of(layer).keys():
        path = f"{node.name}_layer"
    parent, _, name = path.rpartition(".")
    children_of(module.get_submodule(parent))[name] = layer
    return path


def _with(layer: nn.Module, operands: Operands) -> nn.Module:
    """A layer with the operands that are tensors for its parameters and buffers."""
    for name in ("weight", "bias"):
        value = operands[name]
        keep = value is None or isinstance(value, nn.Parameter)
        parameters_of(layer)[name] = value if keep else nn.Parameter(value, requires_grad=False)
    for name in ("running_mean", "running_var"):
        if name in buffers_of(layer):
            buffers_of(layer)[name] = operands[name]
    return layer


def _convolution(cls: type[nn.Module], transposed: bool) -> Callable[[int, Operands], nn.Module | None]:
    options = ("stride", "padding", "dilation", "groups", *(("output_padding",) if transposed else ()))

    def build(rank: int, operands: Operands) -> nn.Module | None:
        weight, groups = operands["weight"], operands["groups"]
        if rank != weight.dim():
            return None
        first, second = weight.shape[0], weight.shape[1] * groups
        channels = (first, second) if transposed else (second, first)
        sizes = {k: v if isinstance(v, int | str) else _sizes(v, rank - 2) for k in options for v in [operands[k]]}
        return _with(cls(*channels, tuple(weight.shape[2:]), **sizes, device="meta"), operands)

    return build


def _sizes(value: list[int], dims: int) -> tuple[int, ...]:
    """One number stands for all dimensions."""
    return tuple(value) if len(value) == dims else tuple(value) * dims


def _linear(_: int, operands: Operands) -> nn.Module:
    out, into = operands["weight"].shape
    return _with(nn.Linear(into, out, device="meta"), operands)


def _norm(rank: int, operands: Operands) -> nn.Module | None:
    if operands["training"] or operands["running_mean"] is None:
        return None
    cls = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
    return _with(cls(len(operands["running_mean"]), eps=operands["eps"], device="meta"), operands)


def _our_norm(_: int, operands: Operands) -> nn.Module:
    layer = BatchNorm(
        len(operands["mean"]),
        eps=operands["eps"],
        channel_dim=operands["channel_dim"],
        activation=operands["activation"],
        device="meta",
    )
    return _with(layer, {**operands, "running_mean": operands["mean"], "running_var": operands["var"]})


_BUILDERS: dict[str, Callable[[int, Operands], nn.Module | None]] = {
    "aten.conv1d.default": _convolution(nn.Conv1d, False),
    "aten.conv1d.padding": _convolution(nn.Conv1d, False),
    "aten.conv2d.default": _convolution(nn.Conv2d, False),
    "aten.conv2d.padding": _convolution(nn.Conv2d, False),
    "aten.conv3d.default": _convolution(nn.Conv3d, False),
    "aten.conv3d.padding": _convolution(nn.Conv3d, False),
    "aten.conv_transpose1d.default": _convolution(nn.ConvTranspose1d, True),
    "aten.conv_transpose2d.input": _convolution(nn.ConvTranspose2d, True),
    "aten.conv_transpose3d.input": _convolution(nn.ConvTranspose3d, True),
    "aten.linear.default": _linear,
    "aten.batch_norm.default": _norm,
    "batchnorm.normalize.default": _our_norm,
}
