"""Memory that outputs leave is used again, and never while anybody can see it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import cpu

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")), "torch_from_blob"),
    reason="before 2.11 torch cannot be told what to do when a tensor is freed, so that there is no pool",
)
native = torch.ops.batchnorm
LARGE, SMALL = (8, 16, 64, 64), (8, 16, 8, 8)  # 2 MiB and 32 KiB of float32


@pytest.fixture(autouse=True)
def empty() -> None:
    """What other tests left idle is not to be found: a block of theirs may fit as well."""
    native._cpu_set_output_pool_limit(0)
    native._cpu_set_output_pool_limit(native._cpu_memory_limit("") // 8)  # as at first


def normalized(shape: tuple[int, ...]) -> Tensor:
    assert cpu.AVAILABLE
    x = torch.randn(shape)
    statistics = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    y: Tensor = native.normalize(x, *statistics, None, None, None, 0.0, 1, None)
    torch.testing.assert_close(y, x)
    return y


def test_the_next_output_lies_where_the_last_one_lay() -> None:
    y = normalized(LARGE)
    address = y.data_ptr()
    del y
    first, second = normalized(LARGE), normalized(LARGE)
    assert first.data_ptr() == address
    assert second.data_ptr() != address


@pytest.mark.parametrize(
    "keep",
    [lambda y: y[1:], lambda y: y.detach(), lambda y: y.numpy(), lambda y: y.untyped_storage()],
    ids=["view", "detached", "numpy", "storage"],
)
def test_memory_that_is_still_seen_is_not_used_again(keep: object) -> None:
    y = normalized(LARGE)
    address, before = y.data_ptr(), y.clone()
    kept = keep(y)  # type: ignore[operator]
    del y
    assert normalized(LARGE).data_ptr() != address
    if isinstance(kept, Tensor):
        assert torch.equal(kept, before[-len(kept) :])
    del kept
    assert normalized(LARGE).data_ptr() == address


def test_a_block_serves_what_is_a_little_smaller_and_no_less() -> None:
    y = normalized((16, 64, 64, 61))
    address = y.data_ptr()
    del y
    assert normalized((16, 64, 64, 30)).data_ptr() != address
    assert normalized((15, 64, 64, 61)).data_ptr() == address


def test_outputs_go_where_other_tensors_go(tmp_path: object) -> None:
    y = normalized(LARGE)
    before = y.clone()
    torch.save(y, f"{tmp_path}/y.pt")
    assert torch.equal(torch.load(f"{tmp_path}/y.pt"), before)
    assert torch.equal(y.share_memory_(), before)


def test_outputs_can_be_resized_where_that_is_wanted() -> None:
    with pytest.raises(RuntimeError, match="not resizable"):
        normalized(LARGE).untyped_storage().resize_(0)
    with cpu.resizable_outputs():
        y = normalized(LARGE)
        with cpu.resizable_outputs():
            pass
        assert normalized(LARGE).untyped_storage().resizable()
    y.untyped_storage().resize_(0)
    assert not normalized(LARGE).untyped_storage().resizable()


PROCESS = """
import os, resource, sys, torch, batchnorm
x, one = torch.ones(8, 16, 64, 64), torch.ones(16, dtype=torch.float64)

def normalized():
    return torch.ops.batchnorm.normalize(x, one, one, None, None, None, 0.0, 1, None)

def faults(kept):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept.append(normalized())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def several(n):
    return [normalized() for _ in range(n)]

{work}
"""


def run(work: str, **environment: str) -> str:
    command = [sys.executable, "-c", PROCESS.replace("{work}", work)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_at_most_the_limit_lies_idle() -> None:
    work = """
    addresses = {y.data_ptr() for y in several(4)}  # 8 MiB, then nobody's
    again = several(4)
    print(len(addresses & {y.data_ptr() for y in again}), again[0].untyped_storage().resizable())
    """.replace("\n    ", "\n")
    assert run(work, BATCHNORM_POOL_MIB="64").split() == ["4", "False"]
    assert run(work, BATCHNORM_POOL_MIB="0").split()[1] == "True"  # torch's own memory


def test_what_lay_idle_longest_goes_first() -> None:
    work = """
    ys = several(3)  # of 512 pages each: the limit keeps two
    last = ys[2].data_ptr()
    while ys:
        del ys[0]
    kept = []
    print(*(faults(kept) > 400 for _ in range(3)), kept[0].data_ptr() == last)
    """.replace("\n    ", "\n")
    assert run(work, BATCHNORM_POOL_MIB="4").split() == ["False", "False", "True", "True"]


def test_used_memory_has_no_page_faults() -> None:
    assert int(run("faults([]); print(faults([]))")) < 100  # of 512 pages


def test_a_forked_process_has_memory_of_its_own() -> None:
    work = """
    y = normalized()
    address = y.data_ptr()
    del y
    child = os.fork()
    y = normalized()
    assert y.data_ptr() == address
    y.fill_(5.0 if child else 7.0)
    assert (y == (5.0 if child else 7.0)).all()
    if child == 0:
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """.replace("\n    ", "\n")
    assert run("torch.set_num_threads(1)\n" + work.strip()).strip() == "0"


def test_outputs_elsewhere_are_counted_whichever_thread_leaves_first() -> None:
    first, second = cpu.resizable_outputs(), cpu.resizable_outputs()
    pooled = native._cpu_output_pool
    with ThreadPoolExecutor(1) as thread:
        first.__enter__()
        thread.submit(second.__enter__).result()
        first.__exit__(None, None, None)  # before the second, which came later
        assert not pooled()
        thread.submit(second.__exit__, None, None, None).result()
    assert pooled()


def test_many_idle_blocks_do_not_slow_the_next_output() -> None:
    # By the blocks' use and not by the clock: of many sizes each finds its own, the last used first.
    sizes = [(1, 16, 64, 64 + i) for i in range(0, 160, 20)]
    outputs = [normalized(shape) for shape in sizes for _ in range(3)]
    addresses = [y.data_ptr() for y in outputs]
    while outputs:
        del outputs[0]
    again = [normalized(shape) for shape in reversed(sizes) for _ in range(3)]
    assert [y.data_ptr() for y in again] == addresses[::-1]


@pytest.mark.parametrize("wanted", ["-1", "many", "", "1.5", "1e3", " 1", "9" * 30])
def test_a_limit_that_is_none_is_told(wanted: str) -> None:
    with pytest.warns(UserWarning, match=f"got BATCHNORM_POOL_MIB='{wanted}'; it must be a whole number of MiB"):
        cpu._limit_pool(wanted)
    assert normalized(LARGE).shape == LARGE


def control_groups(root: Path, lines: str, limits: dict[str, str]) -> int:
    """The limit that is found in a system with these files, in MiB."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, content in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    found: int = native._cpu_memory_limit(str(root))
    return found >> 20


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/a/b\n", {f"{V2}a/b/memory.max": "max\n", f"{V2}a/memory.max": f"{64 << 20}\n"}, 64),
        ("0::/a/b\n", {f"{V2}a/b/memory.max": f"{32 << 20}\n", f"{V2}a/memory.max": f"{64 << 20}\n"}, 32),
        ("0::/host/path\n", {f"{V2}memory.max": f"{16 << 20}\n"}, 16),  # inside a container
        ("0::/\n", {f"{V2}memory.max": f"{16 << 20}\n"}, 16),
        ("5:cpu,memory:/a\n0::/\n", {f"{V1}a/memory.limit_in_bytes": f"{8 << 20}\n"}, 8),
        ("5:memory:/a/b\n", {f"{V1}memory.limit_in_bytes": f"{4 << 20}\n"}, 4),
    ],
)
def test_the_limits_of_control_groups(tmp_path: Path, lines: str, limits: dict[str, str], expected: int) -> None:
    assert control_groups(tmp_path, lines, limits) == expected


@pytest.mark.parametrize("lines", ["", "0::/a\n", "garbage\n", "3:cpu:/a\n"])
def test_without_a_limit_the_machines_memory_is_it(tmp_path: Path, lines: str) -> None:
    limits = {f"{V2}a/memory.max": "max\n", f"{V2}cpu/a/memory.max": "1\n"}
    assert control_groups(tmp_path, lines, limits) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def test_idle_blocks_go_when_memory_runs_out() -> None:
    work = """
    kept = several(64)  # 128 MiB, then idle
    del kept
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
    y = torch.ops.batchnorm.normalize(torch.ones(1).expand(2**10, 16, 2**10), one, one, None, None, None, 0.0, 1, None)
    print(y.shape[0])
    """.replace("\n    ", "\n")
    assert run(work.strip(), BATCHNORM_POOL_MIB="1024").strip() == "1024"


def test_the_sums_of_many_channels_stay_small() -> None:
    work = """
    x = torch.ones(32, 2**18)  # 32 MiB
    layer = batchnorm.BatchNorm1d(2**18)
    def mebibytes(name):
        return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith(name))
    before = mebibytes("VmRSS")
    y = layer(x)
    print(mebibytes("VmHWM") - before, mebibytes("VmRSS") - before)
    """.replace("\n    ", "\n")
    peak, after = map(int, run(work.strip()).split())
    assert peak < 110  # 32 of the output, 16 of sums, numbers for each channel; sums alone may be 128
    assert after < 60
