"""Rewritten modules: the same objects with another forward, that copy, pickle, compile and go back."""

from __future__ import annotations

import copy
import io
import pickle
import traceback

import pytest
import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.rewriting import residual_for, restore, rewrite


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tag = nn.Linear(3, 3), "mine"

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return torch.relu(self.linear(input)) + other


def doubled(module: nn.Module) -> None:
    """Have a module give twice what it gave."""
    graph = fx.Tracer().trace(module)
    (output,) = [node for node in graph.nodes if node.op == "output"]
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.mul, (output.args[0], 2)),)
    rewrite(module, graph)


X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def test_it_is_the_same_object_of_a_subclass() -> None:
    module, calls = Sum(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    parameters, state, y = list(module.parameters()), {**vars(module)}, module(X, X)
    doubled(module)
    assert isinstance(module, Sum)
    assert type(module).__name__ == "FusedSum"
    assert {name: value for name, value in vars(module).items() if name in state} == state
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert torch.equal(module(X, X), 2 * y)
    assert torch.equal(module(input=X, other=X), 2 * y)  # names of arguments stay
    assert len(calls) == 3


class Scaled(nn.Module):
    def forward(self, input: Tensor, other: Tensor, rate: float | None = None) -> Tensor:
        return input + other if rate is None else rate * other


@pytest.mark.parametrize("compiled", [False, True])
def test_optional_arguments_at_their_defaults_are_as_good_as_none(compiled: bool) -> None:
    module, graph = Scaled(), fx.Graph()
    graph.output(graph.call_function(torch.sub, (graph.placeholder("input"), graph.placeholder("other"))))
    rewrite(module, graph)
    call = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    for y in (call(X, X), call(X, X, None), call(X, X, rate=None), call(rate=None, other=X, input=X)):
        assert torch.equal(y, torch.zeros(2, 3))
    for y in (call(X, X, 3.0), call(X, X, rate=3.0), call(input=X, other=X, rate=3.0)):
        assert torch.equal(y, 3 * X)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        module(X)


def test_it_goes_back() -> None:
    module = Sum()
    y = module(X, X)
    before = {**vars(module)}
    doubled(module)
    assert torch.equal(module(X, X), 2 * y)
    assert restore(module)
    assert not restore(module)
    assert vars(module) == before
    assert type(module) is Sum
    assert torch.equal(module(X, X), y)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_keep_the_code_and_have_their_own_state(how: str) -> None:
    module = Sum()
    doubled(module)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(module)
    assert other.tag == "mine"
    assert torch.equal(other(X, X), module(X, X))
    nn.init.zeros_(other.linear.weight)
    assert not torch.equal(other(X, X), module(X, X))
    restore(other)
    assert type(other) is Sum


def test_it_compiles_in_one_graph() -> None:
    module = Sum()
    doubled(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X, X), module(X, X))


def test_a_trace_sees_its_own_forward() -> None:
    module = Sum()
    y = module(X, X)
    doubled(module)
    assert torch.equal(fx.symbolic_trace(module)(X, X), y)


def test_tracebacks_show_the_code() -> None:
    module = Sum()
    doubled(module)
    with pytest.raises(RuntimeError) as caught:
        module(torch.ones(2, 5), X)
    assert "self.linear(input" in "".join(traceback.format_tb(caught.tb))


def test_a_residual_broadcasts() -> None:
    x = torch.zeros(2, 3, 4)
    assert residual_for(x, x) is x
    assert residual_for(torch.ones(3, 1), x).shape == x.shape
    with pytest.raises(RuntimeError, match="expand"):
        residual_for(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
