"""The training step in C++: bit for bit what the one in Python gives, whatever autograd is asked for."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm import functional
from batchnorm.kernels import cpu
from support.training_steps import FUNCTION, NODE, Seen, assert_equal_both_ways, both, step, way

pytestmark = pytest.mark.skipif(
    not cpu.AUTOGRAD, reason=f"no training step in C++ was compiled for torch {torch.__version__}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_step_is_the_one_in_python(dtype: torch.dtype, activation: str | None, residual: bool) -> None:
    assert_equal_both_ways(lambda: step(dtype=dtype, activation=activation, residual=residual))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "options",
    [{"mask": True}, {"affine": False}, {"momentum": None}, {"shape": (4, 3)}, {"shape": (2, 3, 4, 5)}],
    ids=str,
)
def test_options(activation: str | None, options: dict[str, Any]) -> None:
    assert_equal_both_ways(lambda: step(activation=activation, residual=True, **options))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("domain", [[0, 2, 2, 0, 0, 2], [0] * 6], ids=str)  # one without samples keeps its statistics
@pytest.mark.parametrize(
    "options",
    [{}, {"own_affine": True}, {"mask": True}, {"affine": False}, {"momentum": None}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_samples_of_several_domains(activation: str | None, domain: list[int], options: dict[str, Any]) -> None:
    assert_equal_both_ways(lambda: step(activation=activation, residual=True, domain=domain, **options))


@pytest.mark.parametrize("requires", [(True, False), (False, True), (False, False)])
def test_what_requires_a_gradient_of_several_domains(requires: tuple[bool, bool]) -> None:
    node = NODE if any(requires) else FUNCTION
    assert_equal_both_ways(
        lambda: step(activation="relu", residual=True, requires=requires, domain=[0, 1, 2] * 2, node=node)
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("requires", [(True, False), (False, True), (False, False)])
def test_what_requires_a_gradient(activation: str | None, requires: tuple[bool, bool], affine: bool) -> None:
    node = NODE if any(requires) else FUNCTION  # of a frozen input the sums alone are needed
    assert_equal_both_ways(
        lambda: step(activation=activation, residual=True, requires=requires, affine=affine, node=node)
    )


@pytest.mark.parametrize("part", ["affine", "statistics"])
def test_frozen_parts(part: str) -> None:
    def run() -> list[Tensor | None]:
        layer = bn.BatchNorm1d(3, activation="relu")
        bn.freeze(layer, **{name: name == part for name in ("normalization", "statistics", "affine")})
        x = torch.randn(6, 3, requires_grad=True)
        layer(x).square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    assert_equal_both_ways(run)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any]) -> None:
    def run() -> list[Tensor | None]:
        with context():
            return step()

    assert_equal_both_ways(run)


@pytest.mark.parametrize("wanted", ["everything", "x", "weight", "a graph", "nothing", "inference"])
def test_dispatch_modes_see_the_same_operators(wanted: str) -> None:
    def run() -> list[str]:
        layer, x = bn.BatchNorm1d(3, activation="silu"), torch.randn(6, 3, requires_grad=True)
        contexts = {"nothing": torch.no_grad, "inference": torch.inference_mode}
        inputs = {"x": [x], "weight": [layer.weight]}.get(wanted, [x, *layer.parameters()])
        with contexts.get(wanted, nullcontext)(), Seen() as seen:
            y = layer(x)
            if y.requires_grad:
                torch.autograd.grad(y, inputs, torch.ones(6, 3), create_graph=wanted == "a graph")
        return [name for name in seen.names if "detach" not in name]  # of Python's outputs, which are wrapped again

    actual, expected = both(run)
    assert actual == expected
    assert actual[0] == "batchnorm.forward_commit.default"


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_of_the_second_order(activation: str | None, masked: bool) -> None:
    x, r = (torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(5, 2) > 0.3 if masked else None

    def function(*inputs: Tensor) -> Tensor:
        x, weight, bias, residual = inputs
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        y = functional.batch_norm(x, mean, var, weight, bias, True, residual=residual, activation=activation, mask=mask)
        assert NODE in y.grad_fn.name()
        return y

    assert torch.autograd.gradcheck(function, (x, weight, bias, r))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, r))


def test_dispatch_modes_see_the_same_operators_for_several_domains() -> None:
    def run() -> list[str]:
        layer, x = bn.BatchNorm1d(3, domains=("a", "b")), torch.randn(6, 3, requires_grad=True)
        with bn.domain(layer, [0, 1] * 3), Seen() as seen:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], torch.ones(6, 3))
        return [name for name in seen.names if "detach" not in name]

    actual, expected = both(run)
    assert actual == expected
    assert actual[:3] == ["batchnorm.forward.default", *["batchnorm.commit.default"] * 2]


@pytest.mark.parametrize("own", [False, True])
def test_derivatives_of_the_second_order_of_several_domains(own: bool) -> None:
    layer = bn.BatchNorm1d(3, activation="silu", domains=("a", "b"), own_affine=own, dtype=torch.float64)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        assert NODE in y.grad_fn.name()
        return y

    names = [name for name, _ in layer.named_parameters()]
    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    with bn.domain(layer, [0, 1, 0, 0, 1, 1, 1]):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_several_domains(reentrant: bool) -> None:
    def run() -> list[Tensor | None]:
        layer, x = bn.BatchNorm1d(3, activation="silu", domains=("a", "b")), torch.randn(6, 3, requires_grad=True)
        with bn.domain(layer, [0, 1] * 3):
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    assert_equal_both_ways(run)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("wanted", ["x", "weight", "residual", "all"])
def test_gradients_that_are_asked_for(activation: str | None, wanted: str) -> None:
    def run() -> list[Tensor | None]:
        layer = bn.BatchNorm1d(3, activation=activation)
        x, r = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
        everything = {"x": x, "weight": layer.weight, "bias": layer.bias, "residual": r}
        inputs = list(everything.values()) if wanted == "all" else [everything[wanted]]
        dy = torch.randn(6, 3)
        found = [
            gradient
            for create_graph in (False, True)
            for gradient in torch.autograd.grad(layer(x, residual=r), inputs, dy, create_graph=create_graph)
        ]
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in found if g.requires_grad) + x.sum() * 0, x)
        return [*(g.detach() for g in found), *second]

    assert_equal_both_ways(run)


def test_the_graph_is_kept_or_gone() -> None:
    def run() -> list[Tensor | None]:
        layer, x = bn.BatchNorm1d(3, activation="relu"), torch.randn(6, 3, requires_grad=True)
        y = layer(x)
        first, second = (torch.autograd.grad(y, x, torch.ones(6, 3), retain_graph=keep)[0] for keep in (True, False))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x, torch.ones(6, 3))
        return [first, second]

    assert_equal_both_ways(run)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_saved_tensors(activation: str | None) -> None:
    def run() -> list[Tensor | None]:
        saved: list[Tensor | None] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.clone()) or len(saved), lambda i: saved[i - 1]
        ):
            results = step(activation=activation, residual=True, mask=True)
        return [*(t.detach() for t in saved if t is not None), *results]

    assert_equal_both_ways(run)


def test_a_change_in_place_is_noticed() -> None:
    for changed in ("x", "weight", "residual"):
        layer = bn.BatchNorm1d(3, activation="relu")
        x, r = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
        inputs = {"x": x * 1, "residual": r * 1}
        y = layer(inputs["x"], residual=inputs["residual"])
        with torch.no_grad():
            (inputs | {"weight": layer.weight})[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_running_statistics_may_move_before_the_backward_pass() -> None:
    def run() -> list[Tensor | None]:
        layer, x = bn.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
        y = layer(x)
        layer(x.detach() + 5)
        y.square().sum().backward()
        return [x.grad, *layer.buffers()]

    assert_equal_both_ways(run)


@pytest.mark.parametrize("how", ["reentrant", "not", "selective: all", "selective: nothing"])
def test_checkpointing(how: str) -> None:
    policy = CheckpointPolicy.MUST_SAVE if how.endswith("all") else CheckpointPolicy.PREFER_RECOMPUTE
    selective = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)
    options = {"context_fn": selective} if "selective" in how else {}

    def run() -> list[Tensor | None]:
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), bn.BatchNorm1d(3, activation="silu"), torch.nn.Linear(3, 2))
        x = torch.randn(6, 4, requires_grad=True)
        checkpoint(net, x, use_reentrant=how == "reentrant", **options).square().sum().backward()
        return [x.grad, *(p.grad for p in net.parameters()), *net.buffers()]

    assert_equal_both_ways(run)


def test_hooks_on_the_node() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    y = bn.BatchNorm1d(3)(x)
    seen: list[int] = []
    y.grad_fn.register_prehook(lambda gradients: seen.append(len(gradients)))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2, *inputs[1:]))
    (doubled,) = torch.autograd.grad(y, x, torch.eye(6, 3), retain_graph=True)
    with way(python=True):
        (expected,) = torch.autograd.grad(bn.BatchNorm1d(3)(x), x, torch.eye(6, 3))
    assert torch.equal(doubled, 2 * expected)
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_names_the_node() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    with torch.autograd.detect_anomaly():
        y = bn.BatchNorm1d(3)(x)
        dy = torch.full((6, 3), float("nan"))
        with (
            pytest.raises(RuntimeError, match=r"BatchNorm.* returned nan values"),
            pytest.warns(UserWarning, match="forward call that caused the error"),
        ):
            y.backward(dy)


def test_a_gradient_that_is_not_there_is_zero() -> None:
    assert_equal_both_ways(lambda: list(torch.autograd.grad(*unused())))


def unused() -> tuple[Tensor, Tensor]:
    """A scalar whose gradient with respect to the layer's output is undefined, and the layer's input."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.sum()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    x = torch.randn(6, 3, requires_grad=True)
    return Nothing.apply(bn.BatchNorm1d(3)(x)), x


class Plain(Tensor):
    """A subclass, which may want to see every operator as it is called from Python."""


def test_other_tensors_go_the_way_in_python() -> None:
    x = torch.randn(6, 3).as_subclass(Plain).requires_grad_()
    y = bn.BatchNorm1d(3)(x)
    assert type(y) is Plain
    assert FUNCTION in y.grad_fn.name()


def test_an_error_of_the_operator_stays_the_same() -> None:
    layer, x = bn.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    layer.running_mean = torch.zeros(3).expand(2, 3)[0].as_strided((3,), (0,))  # three channels in one place
    messages = []
    for python in (False, True):
        with way(python), pytest.raises(RuntimeError) as caught:
            layer(x)
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1]


def test_compiled_autograd() -> None:
    from torch._dynamo import compiled_autograd

    def run() -> list[Tensor | None]:
        layer = bn.BatchNorm1d(3, activation="relu")
        x, r = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
        y = layer(x, residual=r)
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            y.backward(torch.randn(6, 3))
        return [x.grad, r.grad, *(p.grad for p in layer.parameters())]

    assert_equal_both_ways(run)


@pytest.mark.parametrize(("version", "commit"), [("2.13.1", None), ("2.13.0", "0" * 40)])
def test_another_torch_does_not_load_it(version: str, commit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cpu.importlib.util.find_spec("batchnorm._native")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent
    assert cpu._load_autograd(folder) == cpu.AUTOGRAD
    monkeypatch.setattr(torch, "__version__", version)
    if commit is not None:
        monkeypatch.setattr(torch.version, "git_version", commit)
    assert cpu._load_autograd(folder) == ""


def test_a_file_that_does_not_load_is_told(tmp_path: Path) -> None:
    (tmp_path / cpu.AUTOGRAD).write_text("not a library")
    with pytest.warns(UserWarning, match="does not load, small inputs take longer"):
        assert cpu._load_autograd(tmp_path) == ""


WITHOUT = """
import pathlib, torch
real = pathlib.Path.is_file
pathlib.Path.is_file = lambda self: not self.name.startswith("_autograd-") and real(self)
import batchnorm as bn
from batchnorm.kernels import cpu
assert cpu.AVAILABLE and cpu.AUTOGRAD == ""
x = torch.randn(6, 3, requires_grad=True)
y = bn.BatchNorm1d(3)(x)
y.sum().backward()
print(y.grad_fn.name())
"""


def test_without_the_file_python_does_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == FUNCTION, done.stderr
