"""Memory that outputs leave is used again, and never while anybody can see it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import cpu

native = torch.ops.batchnorm
LARGE, SMALL = (8, 16, 64, 64), (8, 16, 8, 8)  # 2 MiB and 32 KiB of float32


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
    import os

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
