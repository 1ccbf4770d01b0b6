"""The operators: schemas, fakes and registration hold for every sample; the table of kernels tells the truth."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm import layout, ops
from batchnorm.kernels import reference
from support import oracle, tolerances
from support.samples import OperatorCase, operator_cases


@pytest.mark.parametrize("name", ops.SCHEMAS)
@pytest.mark.parametrize("case", operator_cases(), ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # opcheck's own tracing machinery
def test_opcheck(case: OperatorCase, name: str) -> None:
    sample = case.sample
    t = sample.tensors()
    _, mean, m2 = reference.batch_moments(t["x"], sample.layout.channel_dim)
    var = m2 / (t["x"].numel() / sample.layout.channels)
    values = t | {
        "mean": mean,
        "m2": m2,
        "count": torch.tensor(9),
        "running_mean": torch.zeros_like(mean),
        "running_var": torch.ones_like(mean),
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
    values["num_batches_skipped"] = torch.zeros(mean.shape, dtype=torch.int64) if case.optional else None
    arguments = tuple(values[key] for key in inspect.signature(getattr(reference, name)).parameters)
    result = torch.library.opcheck(getattr(torch.ops.batchnorm, name).default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_the_reference_has_the_schemas_parameters(name: str) -> None:
    schema = getattr(torch.ops.batchnorm, name).default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(getattr(reference, name)).parameters)


def test_native_is_for_the_cpu() -> None:
    x = torch.zeros(2, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert ops.implementation(x.to(dtype)) is torch.ops.batchnorm
    assert ops.implementation(x.to("meta")) is reference


def test_levels(level: str) -> None:
    assert f"cpu      float32    native ({level})" in str(batchnorm.kernels())
    with pytest.raises(ValueError, match="got level 'mmx'; this machine has"):
        ops.use_cpu_level("mmx")
    assert f"native ({level})" in str(batchnorm.kernels())


def test_the_table_has_a_row_for_every_dtype() -> None:
    table = batchnorm.kernels()
    assert [row.dtype for row in table] == ["float32", "float64", "bfloat16", "float16", "all"]
    assert table[-1].implementation == "reference"
    assert len(str(table).splitlines()) == 1 + len(table)


WITHOUT = """
import importlib.util, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "batchnorm._native" else found(name, *a)
import batchnorm as bn
from batchnorm import layout, ops
print(bn.kernels())
assert ops.cpu_levels() == ()
x = torch.randn(8, 3, 5, requires_grad=True)
layer = bn.BatchNorm1d(3, activation="relu")
layer(x).sum().backward()
expected = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())
torch.testing.assert_close(layer(x), expected(x))
y, count, mean, m2 = torch.ops.batchnorm.forward(x.detach(), None, None, None, 1e-5, 1, "relu")
torch.testing.assert_close(y, expected(x).detach())
"""


def test_without_the_extension_everything_works_and_the_table_says_so() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "cpu      float32    reference" in run.stdout
    assert "No native kernels: this installation has no native extension" in run.stdout


def test_an_extension_that_does_not_load_is_told(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = f"{tmp_path}/_native.so"
    with open(broken, "w") as file:
        file.write("not a library")
    spec = importlib_spec(broken)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: spec)
    native, reason = ops._load_native()
    assert native is None
    assert reason.startswith("the native extension does not load: ")


def importlib_spec(path: str) -> object:
    from importlib.machinery import ModuleSpec

    return ModuleSpec("batchnorm._native", None, origin=path)


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
    held = torch.zeros(5, dtype=torch.int64)
    # Statistics that were loaded with a counter of 0 weigh as one batch.
    after = None if batches is None else batches + 1 + (momentum is None and batches == 0)
    factor = momentum if momentum is not None else (0.0 if after is None else 1 / after)
    before = [t.double().numpy() for t in running]
    expected = oracle.commit((before[0], before[1]), count.item(), mean.numpy(), m2.numpy(), factor)
    implementation.commit(*running, tracked, held, count, mean, m2, momentum)
    for actual, e in zip(running, expected, strict=True):
        relative, absolute = tolerances.ONE_ROUNDING[dtype]
        np.testing.assert_allclose(actual.double().numpy(), e, rtol=relative, atol=max(absolute, tolerances.BLEND))
    assert tracked is None or tracked == after
    assert held.tolist() == [0] * 5


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
    running, held = (torch.zeros(4), torch.ones(4)), torch.zeros(4, dtype=torch.int64)
    mean, m2 = torch.ones(4).double(), torch.ones(4).double()
    mean[1], m2[1], m2[3] = bad, float("nan"), bad
    for _ in range(2):
        implementation.commit(*running, None, held, torch.tensor(3), mean, m2, 0.5)
    assert held.tolist() == [0, 2, 0, 2]
    assert running[0].tolist() == [0.75, 0, 0.75, 0]
    assert running[1].tolist() == [0.625, 1, 0.625, 1]


@IMPLEMENTATIONS
@pytest.mark.parametrize(("count", "tracked", "held"), [(0, 5, 0), (0.0, 5, 0), (1, 6, 1), (0.5, 6, 1)])
def test_commit_of_too_little(implementation: Any, count: float, tracked: int, held: int) -> None:
    running, counter, held_back = (torch.zeros(2), torch.ones(2)), torch.tensor(5), torch.zeros(2, dtype=torch.int64)
    n = torch.tensor(count, dtype=torch.int64 if isinstance(count, int) else torch.float64)
    implementation.commit(*running, counter, held_back, n, torch.ones(2).double(), torch.zeros(2).double(), 0.1)
    assert running[0].tolist() == [0, 0]
    assert running[1].tolist() == [1, 1]
    assert counter == tracked
    assert held_back.tolist() == [held, held]
