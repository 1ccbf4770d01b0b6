"""The operators: schemas, fakes and registration hold for every sample; the table of kernels tells the truth."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm
from batchnorm import activations, call, layout, ops
from batchnorm.kernels import cpu, fallback, reference, slices, triton
from support import oracle, tolerances
from support.comparison import close
from support.samples import OperatorCase, operator_cases


@pytest.mark.parametrize("name", ops.OPERATIONS)
@pytest.mark.parametrize("case", operator_cases(), ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # opcheck's own tracing machinery
@pytest.mark.parametrize("domains", [None, 2])
def test_opcheck(case: OperatorCase, name: str, domains: int | None) -> None:
    sample = case.sample
    t = sample.tensors()
    _, mean, m2 = reference.batch_moments(t["x"], sample.layout.channel_dim)
    var = m2 / (t["x"].numel() / sample.layout.channels)
    domain = None
    if domains is not None:
        samples = t["x"].shape[1 if sample.layout.channel_dim == 0 else 0]
        if sample.layout.channel_dim == 0 or name in ("normalize_", "forward_commit"):
            pytest.skip("has no domains")
        domain = torch.arange(samples) % domains
        mean, m2, var = (statistic.repeat(domains, 1) for statistic in (mean, m2, var))
    values = t | {
        "domain": domain if name != "commit" else domains and 1,
        "domains": domains or 1,
        "mean": mean,
        "m2": m2,
        "count": torch.tensor(9) if domains is None else torch.tensor([9] * domains),
        "running_mean": torch.zeros(mean.shape[-1:]),
        "running_var": torch.ones(mean.shape[-1:]),
        "num_batches_tracked": torch.tensor(3) if case.optional else None,
        "momentum": 0.1 if case.optional else None,
        "var": var,
        "mean_dz": mean if case.optional else None,
        "mean_dz_xhat": var if case.optional else None,
        "eps": 1e-5,
        "channel_dim": sample.layout.channel_dim,
        "activation": sample.activation,
    }
    positions = layout.observed_shape(t["x"].shape, sample.layout.channel_dim % t["x"].dim())
    values["mask"] = None if case.mask is None else (torch.rand(positions) > 0.3).to(case.mask)
    values["num_batches_skipped"] = torch.zeros(mean.shape[-1:], dtype=torch.int64) if case.optional else None
    arguments = tuple(values[key] for key in inspect.signature(getattr(reference, name)).parameters)
    result = torch.library.opcheck(getattr(torch.ops.batchnorm, name).default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_the_schema_is_the_references_signature(name: str) -> None:
    schema = getattr(torch.ops.batchnorm, name).default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(getattr(reference, name)).parameters)
    changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert changed == list(ops.OPERATIONS[name])


def test_native_is_for_the_cpu() -> None:
    x = torch.zeros(2, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert ops.select(x.to(dtype)).forward is torch.ops.batchnorm.forward.default


def test_other_devices_have_torchs_operators() -> None:
    x = torch.zeros(2, 3, device="meta")
    for chosen in (ops.select(x), ops.select(x, None, "relu"), ops.select(x.double())):
        assert chosen.forward is fallback.forward
        assert chosen.differentiable
    for chosen in (ops.select(x, torch.ones(2, device="meta")), ops.select(x[:0])):
        assert chosen.forward is slices.operation("forward")
        assert chosen.eager


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    x = torch.zeros(2, 3)
    assert ops.select(x[:0]).forward is slices.operation("forward")
    assert ops.select(x, torch.ones(2, 3)).forward is slices.operation("forward")  # a value for every value
    assert ops.select(x, torch.ones(2)).forward is torch.ops.batchnorm.forward.default
    assert ops.select(x, None, "relu").forward is torch.ops.batchnorm.forward.default
    assert ops.select(x, None, "an activation without a kernel").forward is slices.operation("forward")
    chosen = []
    torch.func.vmap(lambda v: (chosen.append(ops.select(v)), v)[1])(x)
    assert chosen == [ops.DIFFERENTIABLE]


def test_a_distributed_tensor_goes_through_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = distribute_module(batchnorm.BatchNorm1d(3, activation="silu"), mesh)
        alone = batchnorm.BatchNorm1d(3, activation="silu")
        x = torch.randn(6, 3)
        for training in (True, False):
            y = layer.train(training)(distribute_tensor(x, mesh, [Shard(0)]))
            close(y.full_tensor().detach(), alone.train(training)(x).detach())
        for name, value in alone.state_dict().items():
            close(layer.state_dict()[name].full_tensor(), value, name=name)
    finally:
        dist.destroy_process_group()


def test_an_activation_that_only_the_reference_knows_works(monkeypatch: pytest.MonkeyPatch) -> None:
    row = activations.Activation("double", lambda z: 2 * z, lambda dy, z: 2 * dy, torch.nn.Identity, ())
    monkeypatch.setitem(activations.ACTIVATIONS, "double", row)
    monkeypatch.setattr(call, "_KNOWN", {*call._KNOWN, "double"})
    x = torch.randn(6, 3, requires_grad=True)
    plain, doubled = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3, activation="double")
    torch.testing.assert_close(doubled(x), 2 * plain(x))
    for layer, factor in ((plain, 2.0), (doubled, 1.0)):
        layer.zero_grad()
        (layer(x) * torch.arange(3)).sum().backward()
        assert layer.bias.grad is not None
        torch.testing.assert_close(factor * layer.bias.grad, 12.0 * torch.arange(3))


def test_levels(level: str) -> None:
    assert f"cpu      float32    native ({level})" in str(batchnorm.kernels())
    with pytest.raises(ValueError, match="got level 'mmx'; this machine has"):
        cpu.use_level("mmx")
    assert f"native ({level})" in str(batchnorm.kernels())


def test_the_table_has_a_row_for_every_dtype() -> None:
    table = batchnorm.kernels()
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    assert [(row.device, row.dtype) for row in table] == [
        *(("cpu", dtype) for dtype in dtypes),
        *(("cuda", dtype) for dtype in dtypes),
        ("others", "all"),
    ]
    assert [row.implementation for row in table[4:]] == ["triton", "torch", "triton", "triton", "torch"]
    assert len(str(table).splitlines()) == 1 + len(table)


class OnCuda:
    """Stands for a tensor there, as far as a choice looks at it."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.device = x, torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.x, name)


def cuda_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """The operator for CUDA, with a kernel that only notes that it was called, and what it noted."""
    noted: list[str] = []
    monkeypatch.setattr(triton, "operation", lambda name: lambda *_: noted.append(name))
    monkeypatch.setattr(slices, "operation", lambda name: lambda *_: noted.append(f"reference: {name}"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton, "failure", lambda device: "")
    monkeypatch.setattr(ops, "_TABLE", dict(ops._TABLE))
    return ops._on_cuda(name), noted


def test_an_operator_takes_anything_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, noted = cuda_operator("forward", monkeypatch)
    x, options = torch.zeros(2, 3), (None, None, None, 1e-5, 1)
    taken: list[tuple[Any, ...]] = [
        (OnCuda(x), *options, None),
        (OnCuda(x.bfloat16()), *options, "gelu", torch.ones(2)),
        (OnCuda(x.double()), *options, None),
        (OnCuda(x[:0]), *options, None),
        (OnCuda(x), *options, "unknown", None),
        (OnCuda(x), *options, None, torch.ones(2, 3)),
        (OnCuda(x.view(2, 3, *[1] * 15)), *options, None),
    ]
    for arguments in taken:
        operator(*arguments)
    assert noted == ["forward"] * 2 + ["reference: forward"] * 5
    operator, noted = cuda_operator("commit", monkeypatch)
    operator(OnCuda(torch.zeros(3).double()))
    assert noted == ["commit"]


def test_kernels_that_do_not_run_are_told_once_and_not_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, noted = cuda_operator("forward", monkeypatch)
    monkeypatch.setattr(triton, "failure", lambda device: "OSError: no C compiler")
    given: Any = (OnCuda(torch.zeros(2, 3)), None, None, None, 1e-5, 1, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    operator(*given)  # where it cannot be tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match=r"do not run on cuda; torch's batch norm .* OSError: no C compiler"):
        operator(*given)
    operator(*given)
    assert noted == ["forward", "reference: forward", "reference: forward"]
    assert ops.select(given[0]).forward is fallback.forward
    assert {row.implementation for row in ops.kernels() if row.device == "cuda"} == {"torch"}
    assert ops.select(torch.zeros(2, 3)).forward is torch.ops.batchnorm.forward.default


IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [reference, torch.ops.batchnorm], ids=["reference", "native"]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", tolerances.ONE_ROUNDING)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("count", [torch.tensor(7), torch.tensor(7.5, dtype=torch.float64)], ids=["int", "weights"])
@pytest.mark.parametrize("batches", [None, 0, 4])
def test_commit_is_the_oracles(
    implementation: Any, dtype: torch.dtype, momentum: float | None, count: Tensor, batches: int | None
) -> None:
    mean, m2 = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    running = torch.randn(5).to(dtype), torch.rand(5).to(dtype)
    tracked = None if batches is None else torch.tensor(batches)
    skips = torch.zeros(5, dtype=torch.int64)
    # Statistics that were loaded with a counter of 0 weigh as one batch.
    after = None if batches is None else batches + 1 + (momentum is None and batches == 0)
    factor = momentum if momentum is not None else (0.0 if after is None else 1 / after)
    before = [t.double().numpy() for t in running]
    expected = oracle.commit((before[0], before[1]), count.item(), mean.numpy(), m2.numpy(), factor)
    implementation.commit(*running, tracked, skips, count, mean, m2, momentum)
    for actual, e in zip(running, expected, strict=True):
        relative, absolute = tolerances.ONE_ROUNDING[dtype]
        np.testing.assert_allclose(actual.double().numpy(), e, rtol=relative, atol=max(absolute, tolerances.BLEND))
    assert tracked is None or tracked == after
    assert skips.tolist() == [0] * 5


@IMPLEMENTATIONS
def test_the_first_batch_replaces_initial_statistics(implementation: Any) -> None:
    running, tracked = (torch.zeros(2), torch.ones(2)), torch.tensor(0)
    mean, m2 = torch.tensor([3.0, 4.0]).double(), torch.tensor([6.0, 12.0]).double()
    implementation.commit(*running, tracked, None, torch.tensor(4), mean, m2, None)
    assert running[0].tolist() == [3, 4]
    assert running[1].tolist() == [2, 4]
    assert tracked == 1


@IMPLEMENTATIONS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_commit_holds_back_what_is_not_finite(implementation: Any, bad: float) -> None:
    running, skips = (torch.zeros(4), torch.ones(4)), torch.zeros(4, dtype=torch.int64)
    mean, m2 = torch.ones(4).double(), torch.ones(4).double()
    mean[1], m2[1], m2[3] = bad, float("nan"), bad
    for _ in range(2):
        implementation.commit(*running, None, skips, torch.tensor(3), mean, m2, 0.5)
    assert skips.tolist() == [0, 2, 0, 2]
    assert running[0].tolist() == [0.75, 0, 0.75, 0]
    assert running[1].tolist() == [0.625, 1, 0.625, 1]


@IMPLEMENTATIONS
@pytest.mark.parametrize(("count", "tracked", "skips"), [(0, 5, 0), (0.0, 5, 0), (1, 6, 1), (0.5, 6, 1)])
def test_commit_of_too_little(implementation: Any, count: float, tracked: int, skips: int) -> None:
    running, counter, skipped = (torch.zeros(2), torch.ones(2)), torch.tensor(5), torch.zeros(2, dtype=torch.int64)
    n = torch.tensor(count, dtype=torch.int64 if isinstance(count, int) else torch.float64)
    implementation.commit(*running, counter, skipped, n, torch.ones(2).double(), torch.zeros(2).double(), 0.1)
    assert running[0].tolist() == [0, 0]
    assert running[1].tolist() == [1, 1]
    assert counter == tracked
    assert skipped.tolist() == [skips, skips]


FUSED = """
import importlib.util, sys, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "batchnorm._native" else found(name, *a)
import batchnorm as bn
seen = []
def backend(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd
    def compiler(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(graph, inputs)
backend = backend if sys.argv[1] == "graphs" else "inductor"
for activation, masked in ((None, True), ("gelu", False), ("mish", True)):
    mask = torch.rand(8, 5) > 0.3 if masked else None
    x, residual = torch.randn(8, 3, 5), torch.randn(8, 3, 5)
    eager = bn.BatchNorm1d(3, activation=activation)
    compiled = bn.BatchNorm1d(3, activation=activation)
    step = torch.compile(compiled, backend=backend, fullgraph=True)
    results = []
    for layer, call in ((eager, eager), (compiled, step)):
        leaf = x.clone().requires_grad_()
        y = call(leaf, residual=residual, mask=mask)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    for actual, expected in zip(*reversed(results)):
        torch.testing.assert_close(actual, expected)
    assert compiled.num_batches_tracked == 1
ours = {name for name in seen if "batchnorm" in name}
assert sys.argv[1] != "graphs" or (seen and ours == {"batchnorm.unless_repeated.default"}), seen
"""


@pytest.mark.parametrize("how", ["graphs", pytest.param("inductor", marks=pytest.mark.long)])
def test_without_kernels_a_compiled_graph_is_plain_torch_and_can_be_fused(how: str) -> None:
    run = subprocess.run([sys.executable, "-c", FUSED, how], capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.long  # compiles C++
def test_a_compiled_graph_copies_no_tensor_into_another_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor lays convolutions out channels last. Beside them, what it compiles itself is the weights' layout, x's,
    the loss's gradient and the bias's."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # code of another day is not what is asked for
    net = nn.Sequential(nn.Conv2d(3, 8, 3), batchnorm.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 4, 3))
    expected, x = copy.deepcopy(net), torch.randn(2, 3, 6, 6)

    def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> Tensor:
        y = call(x)
        y.square().sum().backward()
        return y.detach()

    y, codes = run_and_get_code(lambda: step(net, torch.compile(net, fullgraph=True)))
    close(y, step(expected, expected))
    for name, parameter in net.named_parameters():
        close(parameter.grad, expected.get_parameter(name).grad)
    assert len(codes) == 2, "forward and backward"
    loops = [sorted(set(re.findall(r"cpp_fused\w*", code))) for code in codes]
    assert [len(names) for names in loops] == [2, 1], loops


def calls_before_the_operator(layer: batchnorm.BatchNorm, x: Tensor) -> list[str]:
    """The Python functions that a call of a layer goes through up to its first operator, that one's own included."""
    layer(x)
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and not (called and called[-1].startswith("_ops.py")):
            called.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_few_calls_lie_between_a_layer_and_its_operator(training: bool, gradients: bool) -> None:
    """Each takes up to a tenth of a microsecond, and small inputs feel ten of them."""
    layer, x = batchnorm.BatchNorm1d(4, activation="relu").train(training), torch.randn(8, 4)
    with torch.set_grad_enabled(gradients):
        called = calls_before_the_operator(layer, x)
    assert called[-1].startswith("_ops.py"), called
    assert len(called) <= (15 if training else 16 if gradients else 13), called
