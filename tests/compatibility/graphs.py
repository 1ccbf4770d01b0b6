"""Tools that turn a model into a graph."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm.errors import TransformError
from compatibility.rows import row
from compatibility.subjects import OURS, batch, converted, fused, inside, plain, same, step
from support.comparison import close

LAYERS = 3  # of batch norm, in each network
LEAVES = ["conv", "norm", "relu", "block.conv1", "block.bn1", "block.relu", "block.conv2", "block.bn2", "block.relu"]


@row(
    "torch.fx, `symbolic_trace`",
    "torch",
    "layers are leaves, as torch.nn's, with an activation inside too; a call with a residual is a function that gets "
    "the layer; of a fused model, the graph before",
)
def symbolic_trace() -> None:
    x, expected = batch(), plain()(batch())
    for make in OURS:
        traced = fx.symbolic_trace(make())
        close(traced(x), expected)
        leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        if make is inside:
            assert {"norm", "block.bn1"} < set(leaves)
            assert [node.target for node in traced.graph.nodes if node.op == "get_attr"] == ["block.bn2"]
        else:
            assert leaves == [*LEAVES, "head"]
        same(step(fx.symbolic_trace(make()), x), step(plain(), x))


def features(extract: Any) -> None:
    """What a feature extractor hands out, by the names of torch.nn's model."""
    nodes = ["norm", "block.bn1", "block"]
    expected = extract(plain(), nodes)
    for make in (converted, fused):
        for name, value in extract(make(), nodes).items():
            close(value, expected[name], name=name)
    assert expected["norm"].min() < 0
    written = extract(inside(), nodes)
    for name in ("norm", "block.bn1"):
        close(written[name], expected[name].relu(), name=name)
    close(written["block"], expected["block"])


@row(
    "torchvision, `create_feature_extractor`",
    "torchvision",
    "the same nodes as of torch.nn's model, before activations; a layer's node is its output, with what is inside",
)
def torchvision_features() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    assert get_graph_node_names(converted()) == get_graph_node_names(fused()) == get_graph_node_names(plain())
    features(lambda net, nodes: create_feature_extractor(net, nodes).eval()(batch()))


@row("timm, `FeatureGraphNet`", "timm", "likewise")
def timm_features() -> None:
    from timm.models import FeatureGraphNet

    class Named(nn.Module):
        """What timm asks of a network: which modules have features."""

        def __init__(self, net: nn.Module, nodes: list[str]) -> None:
            super().__init__()
            self.net = net
            self.feature_info = [{"num_chs": 8, "reduction": 1, "module": f"net.{node}"} for node in nodes]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

    def extract(net: nn.Module, nodes: list[str]) -> dict[str, Tensor]:
        extractor = FeatureGraphNet(Named(net, nodes), out_indices=tuple(range(len(nodes))))
        return dict(zip(nodes, extractor(batch()), strict=True))

    features(extract)


def to_onnx(net: nn.Module, **options: Any) -> tuple[Tensor, Counter[str]]:
    """What onnxruntime computes with an exported model, and the model's operators."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/net.onnx"
        torch.onnx.export(net, (batch(),), file, **options)
        session = onnxruntime.InferenceSession(file)
        (y,) = session.run(None, {session.get_inputs()[0].name: batch().numpy()})
        return torch.from_numpy(y), Counter(node.op_type for node in onnx.load(file).graph.node)


def onnx_alike(whole: dict[str, Any], **options: Any) -> None:
    """Models of ours export as torch.nn's; `whole` keeps the exporter from folding."""
    expected = plain()(batch())
    for keep, count in (({}, 0), (whole, LAYERS)):
        operators = to_onnx(plain(), **options, **keep)[1]
        for make in OURS:
            y, ours = to_onnx(make(), **options, **keep)
            close(y, expected)
            assert ours["BatchNormalization"] == count
            assert ours == operators


@row(
    "torch.onnx, `export(dynamo=True)`",
    "torch",
    "the operators of torch.nn's model: a BatchNormalization for each layer with `optimize=False`; by default the "
    "exporter folds it into a convolution before it; runs in onnxruntime",
)
def onnx_of_programs() -> None:
    onnx_alike({"optimize": False}, dynamo=True, verbose=False)


@row(
    "torch.onnx, `export(dynamo=False)`",
    "torch",
    "likewise, a BatchNormalization for each layer with `do_constant_folding=False`",
)
def onnx_of_traces() -> None:
    onnx_alike({"do_constant_folding": False}, dynamo=False)


ELSEWHERE = """
import sys, torch
sys.modules["batchnorm"] = None  # an import raises
folder = sys.argv[1]
x, expected = torch.load(f"{folder}/values.pt")
for number in range(int(sys.argv[2])):
    file = f"{folder}/{number}.pt2"
    net = torch.jit.load(file) if sys.argv[3] == "jit" else torch.export.load(file).module()
    torch.testing.assert_close(net(x).detach(), expected, rtol=1.3e-6, atol=2e-5)
print("loaded")
"""


def runs_elsewhere(folder: str, count: int, kind: str) -> None:
    """`count` files run where this package cannot be imported."""
    torch.save((batch(), plain()(batch()).detach()), f"{folder}/values.pt")
    command = [sys.executable, "-c", ELSEWHERE, folder, str(count), kind]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "loaded\n", run.stderr


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """The namespaces' and names of what a program calls."""
    return {str(node.target) for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


@row(
    "torch.export in inference, `strict` or not, `run_decompositions`",
    "torch",
    "torch's own operators, batch norm too; programs load and run where this package is not installed",
)
def export() -> None:
    expected = plain()(batch())
    programs = []
    for make in OURS:
        for strict in (False, True):
            program = torch.export.export(make(), (batch(),), strict=strict)
            decomposed = program.run_decompositions()
            assert "aten.batch_norm.default" in operators(program)
            assert "aten._native_batch_norm_legit_no_training.default" in operators(decomposed)
            for one in (program, decomposed):
                assert all(name.startswith("aten.") for name in operators(one))
                close(one.module()(batch()), expected)
                programs.append(one)
    with tempfile.TemporaryDirectory() as folder:
        for number, program in enumerate(programs):
            torch.export.save(program, f"{folder}/{number}.pt2")
        runs_elsewhere(folder, len(programs), "export")


@row(
    "torch.export in training",
    "torch",
    "torch's batch norm, which moves the program's statistics as torch.nn's layers would; `mask`, ghost batches, "
    "`renorm` and layers that are frozen in part raise a `TransformError`",
)
def export_in_training() -> None:
    expected = step(plain(), batch())
    for make in OURS:
        for strict in (False, True):
            program = torch.export.export(make().train(), (batch(),), strict=strict)
            assert "aten.batch_norm.default" in operators(program)
            assert all(name.startswith("aten.") for name in operators(program))
            module: Any = program.module()
            same(step_of_program(module), expected)
    refused: dict[str, nn.Module] = {
        "ghost batches": bn.BatchNorm2d(3, virtual_batch_size=2),
        "with a correction": bn.BatchNorm2d(3, renorm=bn.Renorm()),
        "not what the layer normalises by": bn.freeze(
            bn.BatchNorm2d(3), statistics=False, affine=False, normalization=True
        ),
    }
    for words, layer in refused.items():
        with pytest.raises(TransformError, match=words):
            torch.export.export(layer, (batch(),))
    with pytest.raises(TransformError, match="a mask"):
        torch.export.export(bn.BatchNorm2d(3), (batch(),), {"mask": torch.ones(4, dtype=torch.bool)})


def step_of_program(module: nn.Module) -> dict[str, Tensor]:
    """`step`, of what cannot be switched to training: it is there for ever."""
    y = module(batch())
    y.square().sum().backward()
    results = {"output": y.detach()} | {name: b.clone() for name, b in module.named_buffers()}
    return results | {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}


@row("torch.jit, `trace`", "torch", "torch's own operators; traces load and run where this package is not installed")
def jit_trace() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, make in enumerate(OURS):
            traced = torch.jit.trace(make(), (batch(),))
            assert "aten::batch_norm" in str(traced.inlined_graph)
            assert "batchnorm::" not in str(traced.inlined_graph)
            close(traced(batch(2)), plain()(batch(2)))
            traced.save(f"{folder}/{number}.pt2")
        runs_elsewhere(folder, len(OURS), "jit")


@row(
    "torch.jit, `script`",
    "torch",
    "a `TransformError` that says what comes first",
    "`revert`, or `fold`; activations inside: `fold`",
)
def jit_script() -> None:
    expected = plain()(batch())
    for make in OURS:
        with pytest.raises(TransformError, match=r"batchnorm\.revert\(model\) or batchnorm\.fold"):
            torch.jit.script(make())
    for make in (converted, fused):
        close(torch.jit.script(bn.revert(make()))(batch()), expected)
    for make in OURS:
        close(torch.jit.script(bn.fold(make(), batch()))(batch()), expected)


@row("AOTInductor, `aoti_compile_and_package`", "torch", "compiles what torch.export made; the same output")
def ahead_of_time() -> None:
    from torch import _inductor

    for make in (fused, inside):
        program = torch.export.export(make(), (batch(),))
        with tempfile.TemporaryDirectory() as folder:
            package = _inductor.aoti_compile_and_package(program, package_path=f"{folder}/net.pt2")
            y = _inductor.aoti_load_package(package)(batch())
        close(y, plain()(batch()))


@row("torch.compile, `fullgraph=True`", "torch", "one graph, in training and in inference; statistics count once")
def compiled() -> None:
    for make in OURS:
        net = make()
        call = torch.compile(net, fullgraph=True)
        close(call(batch()), plain()(batch()))
        eager = make()
        for number in range(3):
            same(step(net, batch(number), call), step(eager, batch(number)))
        assert all(count == 3 for name, count in net.named_buffers() if name.endswith("num_batches_tracked"))


@row(
    "activation checkpointing, `checkpoint`, reentrant or not",
    "torch",
    "the gradients of a step without it; statistics count once, where torch.nn's count twice; around a compiled "
    "block too",
)
def checkpointing() -> None:
    for make in OURS:
        expected = step(make(), batch())
        for compiling in (False, True):
            for reentrant in (False, True):
                net = make()
                call = torch.compile(net) if compiling else net
                x = batch().requires_grad_()  # reentrant checkpointing needs one input that requires a gradient
                same(step(net, x, functools.partial(checkpoint, call, use_reentrant=reentrant)), expected)
    theirs = plain()
    step(theirs, batch(), functools.partial(checkpoint, theirs, use_reentrant=False))
    assert theirs.norm.num_batches_tracked == 2


def policy(saved: str, seen: set[str]) -> Callable[..., CheckpointPolicy]:
    """Save what operators give whose names have `saved` in them; `seen` gets all names."""

    def choose(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        seen.add(str(operator))
        return CheckpointPolicy.MUST_SAVE if saved in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    return choose


@row(
    "activation checkpointing, `create_selective_checkpoint_contexts`",
    "torch",
    "likewise, whichever operators are saved; ours are `torch.ops.batchnorm`'s",
)
def selective_checkpointing() -> None:
    # What is saved must not be written over: the activations and the addition in place of torch.nn's network do.
    cases = [(make, saved) for make in OURS for saved in ("conv", "nothing")]
    cases += [(make, saved) for make in (fused, inside) for saved in ("batchnorm", "")]
    for make, saved in cases:
        net = make()
        contexts = functools.partial(create_selective_checkpoint_contexts, policy(saved, seen := set[str]()))
        call = functools.partial(checkpoint, net, use_reentrant=False, context_fn=contexts)
        same(step(net, batch(), call), step(make(), batch()))
        assert "batchnorm.forward_commit.default" in seen
