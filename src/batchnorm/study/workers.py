"""Work shared out among processes that compute on one core each."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from batchnorm.errors import ProcessError
from batchnorm.messages import described
from batchnorm.study.training import one_thread

T = TypeVar("T")
R = TypeVar("R")
_PATIENCE = 10.0  # seconds for the system to tell how a process ended that has closed its pipe


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
        ProcessError: a worker died, or cannot be started.
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
    started: list[tuple[Connection, BaseProcess]] = []

    def give(connection: Connection, process: BaseProcess) -> None:
        following = next(waiting, None)
        if following is not None:
            busy[connection] = (following[0], process)
            with _alive(process):
                connection.send(following[1])

    try:
        # Forked children of a process with threads can hang, and torch has threads.
        context = multiprocessing.get_context("spawn")
        for _ in range(min(processes, len(tasks))):
            parent_end, child_end = context.Pipe()
            # Not the work: what a process is started with goes through a pipe that this end holds open on both sides,
            # so that a child that is killed before it has read more than fits would be waited for without end.
            process: BaseProcess = context.Process(target=_serve, args=(child_end,), daemon=True)
            try:
                process.start()
            except OSError as error:
                raise ProcessError(f"no process to compute with could be started: {described(error)}") from error
            child_end.close()  # so that this process notices when the child is gone
            started.append((parent_end, process))
        for connection, process in started:
            with _alive(process):
                connection.send_bytes(shared)
            give(connection, process)
        while busy:
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                position, process = busy.pop(ready)
                with _alive(process):
                    result, failure = pickle.loads(ready.recv_bytes())
                if failure is not None:
                    raise failure
                give(ready, process)
                yield position, result
    finally:
        for _, worker in started:
            worker.kill()
        for connection, worker in started:
            worker.join()
            connection.close()


@contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """Inside, a worker is spoken to, which may be gone: whichever way the pipe says so, it is one error.

    Raises:
        ProcessError: it is gone.
    """
    try:
        yield
    except (EOFError, OSError) as error:  # also with half a message, or one that it had not read yet
        process.join(_PATIENCE)
        raise ProcessError(
            f"a process that computed ended with exit code {process.exitcode} (a negative one is a signal, -9 often a "
            "lack of memory). What was done is stored; run the same command again to go on"
        ) from error


def _serve(connection: Connection) -> None:
    """A worker's life: the work, tasks in, results out, until the pipe's other end is closed or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    with suppress(EOFError, OSError), one_thread():
        work = pickle.loads(connection.recv_bytes())
        while True:
            connection.send_bytes(_answer(work, connection.recv()))


def _answer(work: Callable[[Any], Any], task: object) -> bytes:
    """A result or an error, as a pair, one of which is None."""
    try:
        return pickle.dumps((work(task), None))
    except Exception as error:
        try:
            answer = pickle.dumps((None, error))
            pickle.loads(answer)  # some can be written, and not read
        except Exception:
            return pickle.dumps((None, ProcessError(f"{type(error).__name__} in a process: {described(error)}")))
        return answer
