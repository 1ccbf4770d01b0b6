"""Graphs: of the whole model or of its largest parts, believed only if they tell all, and the model as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.surgery.observing import ModuleCall, Spec, observe
from batchnorm.surgery.tracing import in_modes, plain_call, regions, seen_call, trace
from support.networks import Block, Calls, Untraceable

ONE = ModuleCall((Spec((), torch.float32),), {})
BOTH = (True, False)


def one(_: nn.Module) -> tuple[ModuleCall, str]:
    return ONE, ""


def test_the_largest_parts_are_found() -> None:
    model = Untraceable(
        Block(3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), Untraceable(Block(3)), nn.BatchNorm2d(3)
    )
    found = regions(model, one, BOTH)
    assert [region.path for region in found.traced] == ["parts.0", "parts.2.parts.0"]
    assert set(found.reasons) == {"", "parts.2"}
    assert found.reason("parts.3").startswith("the model is not traceable: symbolically traced variables")
    assert found.reason("parts.2.parts.7").startswith("parts.2 is not traceable: ")
    assert [region.where(node) for region, node, _ in found.nodes()][:2] == ["parts.0.conv1", "parts.0.bn1"]


def test_a_shared_part_is_found_once() -> None:
    block = Block(3)
    assert len(regions(Untraceable(block, block), one, BOTH).traced) == 1


def test_batch_norm_layers_and_modules_without_others_inside_are_leaves() -> None:
    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    found = regions(nn.Sequential(nn.BatchNorm2d(3), Drop()), one, BOTH)
    assert [type(module) for *_, module in found.nodes()] == [nn.BatchNorm2d, Drop]


class Asks(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return torch.cat([x] if isinstance(x, Tensor) else x, 1)


class Sets(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Keeps(nn.Module):
    """As a cache does: in a dict inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Tensor]] = [{}]

    def forward(self, x: Tensor) -> Tensor:
        return self.kept[0].setdefault(str(x.device), x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x


class Makes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


class Modal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def bare(module: nn.Module, **options: Any) -> tuple[Any, str]:
    return in_modes(module, one, BOTH, **options)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Asks(), "it asks for the type of a tensor"),
        (Sets(), "it sets last"),
        (Keeps(), "it sets kept"),
        (Makes(), "it makes tensors of its own"),
        (Modal(), "it computes something else in training than in inference"),
        (Untraceable(), ""),
        (nn.ModuleList([nn.ReLU()]), ""),
    ],
    ids=str,
)
def test_what_is_not_believed(module: nn.Module, reason: str) -> None:
    before = {**vars(module)}
    state = torch.random.get_rng_state()
    graph, said = bare(module)
    if not isinstance(module, Untraceable):
        assert (graph, said) == (None, reason)
    assert {**vars(module)} == before
    assert getattr(module, "kept", [{}]) == [{}]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tracing_changes_no_buffer() -> None:
    module = Counts()
    graph, _ = bare(module)
    assert graph is not None
    assert module.count == 0
    assert "add_" in str(graph)


def test_a_replaced_forward_is_not_traced() -> None:
    module = nn.Sequential(nn.ReLU())
    module.forward = torch.relu
    assert trace(module, ONE) == (None, "it has a forward of its own")


def test_inputs_keep_their_names() -> None:
    graph, _ = trace(Calls(lambda m, x: x + 1), ONE)
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["x"]


def test_the_only_call() -> None:
    assert plain_call(Calls(lambda m, x: x))[0] == ONE
    assert plain_call(Untraceable())[0] == ONE


def test_seen_calls() -> None:
    twice = Calls(lambda m, x: m.a(x), a=Untraceable(), b=nn.ReLU())
    calls, _ = observe(Calls(lambda m, x: m.a(x) + m.a(x, scale=2.0), a=twice.a), torch.ones(1))
    assert seen_call(calls, twice.a) == (None, "it is called in several ways")
    assert seen_call(calls, twice.b) == (None, "the example inputs do not reach it")


def test_arguments_that_are_no_tensors_are_as_seen() -> None:
    class Nested(nn.Module):
        def forward(self, xs: list[Tensor], y: Tensor | None = None, *, double: bool = False) -> Tensor:
            total = xs[0] + xs[1]
            return total * 2 if double and y is None else total

    module = Nested()
    calls, _ = observe(module, ([torch.ones(1), torch.ones(1)], None))
    graph, reason = trace(module, seen_call(calls, module)[0])
    assert reason == ""
    assert [node.op for node in graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]


def test_hooks_are_not_called() -> None:
    model, calls = nn.Sequential(Block(3)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    graph, _ = bare(model)
    assert graph is not None
    assert not calls
    model(torch.zeros(2, 3, 4, 4))
    assert calls == [1]


def test_what_is_written_in_place_is_in_the_graph() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x
        y += 1
        return x

    module = Calls(forward)
    graph, _ = bare(module)
    x = torch.zeros(1)
    y = torch.fx.GraphModule(module, graph)(x)
    assert x is y
    assert x == 1
