"""Work shared out among processes that compute on one core each."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from batchnorm.errors import ProcessError
from batchnorm.study.training import one_thread

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute(work: Callable[[T], R], tasks: Sequence[T], processes: int) -> Iterator[tuple[int, R]]:
    """`work` of each task, as it comes: pairs of a task's position and its result.

    Not concurrent.futures' pool: its workers outlive a parent that is killed, and Ctrl-C waits for the work at hand.
    These end with their parent; and when the caller stops for whatever reason, they are stopped.

    Args:
        work: a picklable callable; it is sent to each process once, with what it holds.
        tasks: picklable.
        processes: how many to start; with 1, this process does the work itself.

    Raises:
        ProcessError: a worker died.
        Exception: what the work raises.
    """
    if processes == 1 or len(tasks) <= 1:
        with one_thread():
            for position, task in enumerate(tasks):
                yield position, work(task)
        return
    # As bytes: tensors would travel as handles of shared memory, which the other side may outlive.
    shared = pickle.dumps(work)
    waiting = iter(enumerate(tasks))
    busy: dict[Connection, tuple[int, BaseProcess]] = {}
    started: list[BaseProcess] = []

    def give(connection: Connection, process: BaseProcess) -> None:
        following = next(waiting, None)
        if following is not None:
            busy[connection] = (following[0], process)
            connection.send(following[1])

    try:
        # Forked children of a process with threads can hang, and torch has threads.
        context = multiprocessing.get_context("spawn")
        for _ in range(min(processes, len(tasks))):
            parent_end, child_end = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(child_end, shared), daemon=True)
            process.start()
            child_end.close()  # so that this process notices when the child is gone
            started.append(process)
            give(parent_end, process)
        while busy:
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                position, process = busy.pop(ready)
                result: R = _received(ready, process)
                give(ready, process)
                yield position, result
    finally:
        for worker in started:
            worker.kill()
        for worker in started:
            worker.join()


def _received(connection: Connection, process: BaseProcess) -> Any:  # noqa: ANN401  # what came over a pipe
    try:
        result, error = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):  # the latter with a task that it had not read yet
        process.join()
        raise ProcessError(
            f"a process that computed ended with exit code {process.exitcode} (a negative one is a signal, -9 often a "
            "lack of memory). What was done is stored; run the same command again to go on"
        ) from None
    if error is not None:
        raise error
    return result


def _serve(connection: Connection, shared: bytes) -> None:
    """A worker's life: tasks in, results out, until the other end of the pipe is closed or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    work = pickle.loads(shared)
    with one_thread():
        while True:
            try:
                task = connection.recv()
            except EOFError:
                return
            try:
                answer = pickle.dumps((work(task), None))
            except Exception as error:
                answer = pickle.dumps((None, error))
            try:
                connection.send_bytes(answer)
            except BrokenPipeError:
                return
