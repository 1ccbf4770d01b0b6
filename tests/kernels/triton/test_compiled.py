"""What kernels compile to for devices that are not here: next to no spills, few registers, wide loads and stores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled.py")
MOST_REGISTERS = 200  # of 255: with 128 threads to a program, two fit a multiprocessor, and no compiler has to spill
# Bytes of stack, at most: NVIDIA's compiler spills two registers where that makes room for one program more. It does so
# here, and of unaligned tensors, where addresses take registers.
STACK = {("sm_120", "first,float16", "sums_kernel"): 8}
STACK_UNALIGNED = 8
# What goes through all of the input; others read what there is for each channel and split.
READERS = ("moments_kernel", "sums_kernel")
WRITERS = ("normalize_kernel", "input_kernel", "whole_forward_kernel", "whole_backward_kernel")
LAUNCHES = {
    "moments_kernel": 17,
    "finish_moments_kernel": 9,
    "normalize_kernel": 17,
    "sums_kernel": 17,
    "finish_sums_kernel": 9,
    "input_kernel": 20,
    "whole_forward_kernel": 19,
    "whole_backward_kernel": 19,
    "commit_kernel": 2,
}


# Of two, everything; of the others, which differ little from the first, training steps: it takes minutes.
ARCHITECTURES = {"sm_90": (), "gfx942": (), "sm_80": ("steps",), "sm_120": ("steps",)}
LAUNCHES_OF_STEPS = {
    "moments_kernel": 6,
    "finish_moments_kernel": 3,
    "normalize_kernel": 6,
    "sums_kernel": 6,
    "finish_sums_kernel": 3,
    "input_kernel": 6,
    "whole_forward_kernel": 6,
    "whole_backward_kernel": 6,
}


def run_script(architecture: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), architecture, *ARCHITECTURES[architecture]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)


Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The script's runs for all architectures that are asked for, as many at once as there are cores."""
    asked = [name for name in ARCHITECTURES if any(name in item.nodeid for item in request.session.items)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run_script, name) for name in asked}


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_wide_loads(architecture: str, runs: Runs) -> None:
    run = runs[architecture].result()
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    assert Counter(kernel for _, kernel, *_ in rows) == (LAUNCHES_OF_STEPS if ARCHITECTURES[architecture] else LAUNCHES)
    for case, kernel, *numbers in rows:
        registers, stack, loads, stores = map(int, numbers)
        unaligned = case.endswith("unaligned")
        most = STACK_UNALIGNED if unaligned else STACK.get((architecture, case, kernel), 0)
        assert stack <= most, (case, kernel, stack)
        assert registers <= MOST_REGISTERS, (case, kernel, registers)
        if unaligned and architecture.startswith("sm_"):  # AMD's may load 16 bytes from anywhere
            assert loads == 0, (case, kernel, loads)
        elif not unaligned and kernel in READERS + WRITERS:
            assert loads > 0, (case, kernel)
        if kernel in WRITERS:
            assert stores > 0, (case, kernel)
