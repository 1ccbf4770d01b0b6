"""Work shared out among processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from batchnorm.errors import ProcessError
from batchnorm.study.workers import compute, cores


class Square:
    """Work with something in it; it names its process and torch's threads."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __call__(self, task: int) -> tuple[float, int, int]:
        if task == -1:
            raise ArithmeticError("minus one")
        if task == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(self.held.sum()) * task**2, os.getpid(), torch.get_num_threads()


WORK = Square(torch.ones(3))


@pytest.mark.parametrize("processes", [1, 2])
def test_every_task_is_done_once_on_one_core(processes: int) -> None:
    done = dict(compute(WORK, range(9), processes))
    assert {position: value for position, (value, _, _) in done.items()} == {i: 3.0 * i**2 for i in range(9)}
    assert {threads for _, _, threads in done.values()} == {1}
    workers = {worker for _, worker, _ in done.values()}
    if processes == 1:
        assert workers == {os.getpid()}
    else:
        assert os.getpid() not in workers
        assert 1 < len(workers) <= processes
        assert gone(workers)


def gone(workers: set[int], within: float = 5.0) -> bool:
    """Whether none of the processes is left, after a while at most."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            return True
        time.sleep(0.05)
    return False


def test_threads_are_given_back(threads: None) -> None:
    torch.set_num_threads(2)
    list(compute(WORK, range(2), 1))
    assert torch.get_num_threads() == 2


def test_nothing_to_do() -> None:
    assert list(compute(WORK, [], 2)) == []


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_an_error_is_the_callers(processes: int) -> None:
    with pytest.raises(ArithmeticError, match="minus one"):
        list(compute(WORK, [1, 2, -1, 3, 4], processes))


@pytest.mark.long
def test_a_worker_that_dies_is_an_error_that_says_so() -> None:
    with pytest.raises(ProcessError, match=r"ended with exit code -9 .* run the same command again to go on"):
        list(compute(WORK, [1, 2, -2, 3, 4], 2))


class Unreadable:
    """Work that ends the process that unpickles it, before that reads its first task."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)

    def __call__(self, task: int) -> int:
        return task


@pytest.mark.long
def test_a_worker_that_dies_before_it_reads_its_task_is_such_an_error_too() -> None:
    with pytest.raises(ProcessError, match="ended with exit code 3 "):
        list(compute(Unreadable(), [1, 2], 2))


@pytest.mark.long
def test_stopping_early_stops_the_workers() -> None:
    results = compute(WORK, list(range(1000)), 2)
    workers = {next(results)[1][1] for _ in range(4)}
    results.close()  # type: ignore[attr-defined]  # a generator
    assert gone(workers)


ORPHANS = """
import os, time
from batchnorm.study.workers import compute

def slow(task):
    print(os.getpid(), flush=True)
    time.sleep(0.3)

if __name__ == "__main__":
    list(compute(slow, list(range(1000)), 2))
"""


@pytest.mark.long
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(6)}
    assert len(workers) == 2
    parent.kill()
    parent.communicate()
    assert gone(workers)


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


KILLED = """
import os, signal
from batchnorm.errors import ProcessError
from batchnorm.study.workers import compute

class Large:
    def __init__(self):
        self.much = b"x" * 5_000_000
    def __call__(self, task):
        return task

if __name__ != "__main__":
    os.kill(os.getpid(), signal.SIGKILL)  # in a worker: while it starts
try:
    list(compute(Large(), [1, 2, 3], 2))
except ProcessError as error:
    print(error)
"""


def test_a_worker_that_is_killed_while_it_starts_is_an_error_that_says_so(tmp_path: Path) -> None:
    """With more data than fits into a pipe: nobody waits for it to be read."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert "ended with exit code -9 " in run.stdout, run.stderr
    assert run.stderr == ""


class Pausing:
    """Says which process it is in."""

    def __call__(self, task: int) -> int:
        return os.getpid()


def test_a_worker_that_is_killed_between_tasks_is_such_an_error_too() -> None:
    results = compute(Pausing(), list(range(100)), 2)
    victim = next(results)[1]
    time.sleep(0.3)  # it has the next task by then, or its answer is on the way
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(ProcessError, match="ended with exit code -9 "):
        list(results)


class OddError(Exception):
    """Can be pickled, and not read back."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__("odd")


class Odd:
    def __call__(self, task: int) -> int:
        if task == 1:
            raise OddError(1, 2)
        return task


def test_an_error_that_cannot_travel_is_told() -> None:
    with pytest.raises(ProcessError, match="OddError in a process: odd"):
        list(compute(Odd(), [0, 1, 2], 2))
