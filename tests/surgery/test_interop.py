"""Layers from and to other libraries: against their formulas in float64, and ONNX's own runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CountError, OptionError
from batchnorm.surgery.interop import CONVENTIONS, Convention, from_convention, to_convention
from support import oracle, tolerances
from support.comparison import close
from support.networks import used

LIBRARIES = list(CONVENTIONS)


def draw(library: str, *shape: int) -> np.ndarray:
    """(N, H, W, C), or (N, C, H, W) for ONNX."""
    x = np.random.default_rng(0).normal(1, 2, shape)
    return x.transpose(0, 3, 1, 2) if library == "onnx" else x


def layer_of(library: str, **changes: Any) -> dict[str, Any]:
    """One of the library's layers."""
    names = CONVENTIONS[library]
    values = {names.weight: [0.5, 2.0, -1.0], names.bias: [1.0, 0.0, 3.0]}
    values |= {names.running_mean: [0.1, -2.0, 5.0], names.running_var: [0.5, 1.0, 9.0]}
    return {**values, **changes}


def stepped(names: Convention, values: dict[str, Any], x: np.ndarray, momentum: float) -> dict[str, np.ndarray]:
    """The library's statistics after one training step, by its formula: momentum weighs the old, variance is biased."""
    n, mean, m2 = oracle.moments(x, axis=1 if names.axis is None else -1)
    old = {name: np.array(values[name]) for name in (names.running_mean, names.running_var)}
    new = {names.running_mean: mean, names.running_var: m2 / n}
    return {name: momentum * old[name] + (1 - momentum) * new[name] for name in old}


@pytest.mark.parametrize("momentum", [None, 0.8])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_training_step_is_the_librarys(library: str, momentum: float | None) -> None:
    names, x = CONVENTIONS[library], draw(library, 4, 2, 3, 3)
    values = layer_of(library, **({} if momentum is None else {"momentum": momentum}))
    layer = from_convention(library, values, batch_count=24)
    layer(torch.from_numpy(x).float())
    found = to_convention(layer, library, batch_count=24)
    for name, expected in stepped(names, values, x, momentum or names.momentum).items():
        close(found[name], expected)


@pytest.mark.parametrize("changes", [{}, {"epsilon": 0.1}])
@pytest.mark.parametrize("library", LIBRARIES)
def test_inference_is_the_librarys(library: str, changes: dict[str, float]) -> None:
    names, x = CONVENTIONS[library], draw(library, 4, 2, 3, 3)
    values = layer_of(library, **changes)
    arrays = [np.array(values[name]) for name in (names.running_mean, names.running_var, names.weight, names.bias)]
    eps = {"keras": 1e-3, "flax": 1e-5, "onnx": 1e-5}[library] if not changes else 0.1
    expected = oracle.preactivation(x, *arrays, None, eps, 1 if library == "onnx" else -1)
    y = from_convention(library, values).eval()(torch.from_numpy(x).float())
    close(y, expected)


def test_onnx_runs_what_it_is_given() -> None:
    layer, x = used(nn.BatchNorm2d(3, eps=1e-3, momentum=0.3)), draw("onnx", 4, 2, 3, 3).astype(np.float32)
    values = to_convention(layer, "onnx")
    inputs = ["scale", "B", "input_mean", "input_var"]
    node = onnx.helper.make_node(
        "BatchNormalization", ["X", *inputs], ["Y"], epsilon=values["epsilon"], momentum=values["momentum"]
    )
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("X", kind, x.shape)],
        [onnx.helper.make_tensor_value_info("Y", kind, x.shape)],
        [onnx.numpy_helper.from_array(values[name].numpy(), name) for name in inputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"X": x})
    close(torch.from_numpy(y), layer(torch.from_numpy(x)))


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("library", ["keras", "flax"])
def test_there_and_back(library: str, parameters: tuple[str, ...]) -> None:
    names, values = CONVENTIONS[library], layer_of(library, axis=1, momentum=0.75, epsilon=0.5)
    for parameter in {"weight", "bias"} - set(parameters):
        del values[getattr(names, parameter)]
    found = to_convention(from_convention(library, values, batch_count=9), library, batch_count=9)
    assert found.keys() == values.keys()
    for name, value in values.items():
        close(found[name], value, relative=tolerances.AGAINST_TORCH[torch.float32][0])


def test_what_onnx_needs_is_there() -> None:
    found = to_convention(bn.BatchNorm2d(3, affine=False), "onnx")
    assert (found["scale"].tolist(), found["B"].tolist()) == ([1.0] * 3, [0.0] * 3)


def test_values_are_copies() -> None:
    layer = bn.BatchNorm1d(3)
    to_convention(layer, "keras")["moving_mean"].fill_(7)
    assert layer.running_mean.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "got a layer with no running statistics; onnx has no such"),
        (nn.BatchNorm1d(3, momentum=None), "with momentum=None"),
        (bn.BatchNorm1d(3, activation="relu"), "with activation=relu"),
        (bn.BatchNorm1d(3, channel_dim=-1), "with channel_dim=-1"),
    ],
)
def test_what_a_library_cannot_express(layer: nn.BatchNorm1d, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        to_convention(layer, "onnx")


def test_wrong_values() -> None:
    with pytest.raises(OptionError, match="got library='caffe'; it must be one of 'keras', 'flax', 'onnx'"):
        to_convention(nn.BatchNorm1d(3), "caffe")
    with pytest.raises(
        OptionError, match="got values gamma of a keras layer; there must be moving_mean and moving_var"
    ):
        from_convention("keras", {"gamma": [1.0]})
    with pytest.raises(OptionError, match="running_mean"):
        from_convention("keras", {**layer_of("keras"), "running_mean": [0.0]})
    with pytest.raises(CountError, match="got batch_count=1; an unbiased variance needs at least 2"):
        from_convention("keras", layer_of("keras"), batch_count=1)


class Variable:
    """As Keras': an array is inside."""

    def __init__(self, value: np.ndarray) -> None:
        self._value = value

    def numpy(self) -> np.ndarray:
        return self._value


class ArrayLike:
    """As arrays of JAX and CuPy: NumPy may ask for one of its own."""

    def __init__(self, value: np.ndarray) -> None:
        self._value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._value


KINDS: dict[str, Any] = {
    "read-only": lambda array: array,
    "variable": Variable,
    "like an array": ArrayLike,
    "backwards": lambda array: array[::-1].copy()[::-1],
    "other byte order": lambda array: array.astype(array.dtype.newbyteorder("S")),
    "bfloat16": lambda array: array.astype(ml_dtypes.bfloat16),
    "half": lambda array: array.astype(np.float16),
    "integers": lambda array: array.astype(np.int64),
    "list": lambda array: [int(value) for value in array],
    "parameter": lambda array: nn.Parameter(torch.tensor(array)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_has_values(kind: str) -> None:
    arrays = {name: np.arange(1.0, 4.0) + i for i, name in enumerate(("moving_mean", "moving_variance", "gamma"))}
    for array in arrays.values():
        array.flags.writeable = False
    layer = from_convention("keras", {name: KINDS[kind](array) for name, array in arrays.items()})
    assert layer.running_var.tolist() == [2.0, 3.0, 4.0]
    assert layer.weight.tolist() == [3.0, 4.0, 5.0]
    assert layer.running_var.is_floating_point()
    with torch.no_grad():
        layer.running_mean.zero_()
    assert arrays["moving_mean"].tolist() == [1.0, 2.0, 3.0]  # what is given is not changed


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        (object(), "got gamma of object, from which no tensor can be made: .* Pass a tensor, an array or a list"),
        (np.array(["a", "b", "c"], dtype=object), "got gamma of ndarray, from which no tensor can be made"),
        (2.0, r"got gamma of shape \(\); it must be \(C,\), one value a channel"),
        (np.ones((1, 3)), r"got gamma of shape \(1, 3\)"),
        ([1.0], "got gamma of 1 values beside moving_mean of 3; each has one value a channel"),
    ],
)
def test_what_has_no_values_of_channels(gamma: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        from_convention("keras", layer_of("keras", gamma=gamma))
