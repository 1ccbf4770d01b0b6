"""The shared library: found, loaded, asked for its instruction sets; and what holds without it."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from batchnorm.kernels import cpu

WITHOUT = """
import importlib.util, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "batchnorm._native" else found(name, *a)
import batchnorm as bn
from batchnorm.kernels import cpu
print(bn.kernels())
assert not cpu.AVAILABLE and cpu.levels() == () and cpu.level() == ""
try:
    cpu.use_level("avx2")
except ValueError as error:
    assert "this machine has ()" in str(error)
x = torch.randn(8, 3, 5, requires_grad=True)
layer = bn.BatchNorm1d(3, activation="relu")
with cpu.resizable_outputs():
    layer(x).sum().backward()
expected = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())
torch.testing.assert_close(layer(x), expected(x))
y, count, mean, m2 = torch.ops.batchnorm.forward(x.detach(), None, None, None, 1e-5, 1, "relu")
torch.testing.assert_close(y, expected(x).detach())
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_without_the_extension_everything_works_and_the_table_says_so() -> None:
    done = run(WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "cpu      float32    reference" in done.stdout
    assert "No native kernels: this installation has no native extension" in done.stdout


def test_an_extension_that_does_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_text("not a library")
    spec = ModuleSpec("batchnorm._native", None, origin=str(broken))
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: spec)
    assert cpu._load().startswith("the native extension does not load: ")


def test_the_level_in_use_is_the_one_that_was_chosen(level: str) -> None:
    assert cpu.AVAILABLE
    assert cpu.UNAVAILABLE_REASON == ""
    assert level in cpu.levels()
    assert cpu.level() == level
    with pytest.raises(ValueError, match="got level 'mmx'; this machine has"):
        cpu.use_level("mmx")
    assert cpu.level() == level


def test_the_best_level_is_in_use_at_first() -> None:
    done = run("from batchnorm.kernels import cpu; print(cpu.level() == cpu.levels()[-1])")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("when", ["inference", "compiling", "fake", "vmap"])
def test_levels_and_memory_can_be_set_anywhere(when: str, level: str) -> None:
    seen = []

    def work(x: torch.Tensor) -> torch.Tensor:
        cpu.use_level(cpu.levels()[0])
        with cpu.resizable_outputs():
            seen.append((cpu.level(), torch.ops.batchnorm._cpu_output_pool()))
        cpu.use_level(level)
        return x

    match when:
        case "inference":
            with torch.inference_mode():
                work(torch.ones(2))
        case "compiling":
            torch.compile(work, backend="eager")(torch.ones(2))
        case "fake":
            with FakeTensorMode():
                work(torch.ones(2))
        case "vmap":
            torch.func.vmap(torch.func.grad(lambda x: work(x) * 2))(torch.ones(2))
    assert seen == [(cpu.levels()[0], False)]
    assert cpu.level() == level
    assert torch.ops.batchnorm._cpu_output_pool()


LEAK = """
import torch
import batchnorm

def kilobytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4

x = torch.zeros(2, 1)
one = torch.ones(1, dtype=torch.float64)
def work():
    for _ in range(40_000):
        torch.ops.batchnorm.normalize(x, one, one, None, None, None, 1e-5, 1, "leaky_relu")
work()
before = kilobytes()
work()
print(kilobytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_the_name_of_an_activation_is_freed() -> None:
    done = run(LEAK)
    assert int(done.stdout) < 1000, done.stderr  # 48 bytes a call would be 1,900


AGAIN = """
import importlib.util, torch
import batchnorm as bn
from batchnorm.kernels import cpu
cpu.use_level(cpu.levels()[0])
torch.ops.load_library(importlib.util.find_spec("batchnorm._native").origin)
assert cpu._load() == ""
print(cpu.level() == cpu.levels()[0], bn.BatchNorm1d(3)(torch.randn(4, 3)).shape)
"""


def test_the_library_may_be_loaded_again() -> None:
    done = run(AGAIN)
    assert done.stdout.strip() == "True torch.Size([4, 3])", done.stderr
