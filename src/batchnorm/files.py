"""Files: what is read may be anything, and what is written appears as a whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from batchnorm.errors import BatchNormError, UsageError
from batchnorm.messages import described

_NAME = 32  # characters of a file's name that a temporary one repeats; names may be 255 bytes long


class _Boundary:
    """Inside, a file is at work whose content is nobody's here: whatever that raises becomes one error of ours.

    A class: `contextlib.contextmanager` lets a StopIteration pass where the error made of it is a RuntimeError too.

    Args:
        path: the file.
        error: the kind to raise.
        system: what cannot be done, where the system says so.
        otherwise: the same where anything else does.
        regular: whether it has to be a regular file: opening a pipe would wait for a writer.
    """

    def __init__(
        self, path: Path, error: type[BatchNormError], system: str, otherwise: str, *, regular: bool = False
    ) -> None:
        self._path, self._error, self._system, self._otherwise = path, error, system, otherwise
        self._regular = regular
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        if self._regular:
            # What cannot be looked at, or is not there, cannot be opened either, which says why.
            with contextlib.suppress(OSError, ValueError):
                if what := _no_file(self._path.stat().st_mode):
                    raise self._error(f"cannot {self._system} {self._path}: it is {what}")
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, wrong: BaseException | None, _: TracebackType | None) -> None:
        self._warnings.__exit__(kind, wrong, _)
        if wrong is None or isinstance(wrong, (BatchNormError, KeyboardInterrupt)):
            return
        # Not only Exceptions: a panic of a library in Rust is none.
        if isinstance(wrong, OSError):
            raise self._error(f"cannot {self._system} {self._path}: {wrong.strerror or described(wrong)}") from wrong
        reason = described(wrong) if wrong.args else type(wrong).__name__
        raise self._error(f"cannot {self._otherwise} {self._path}: {reason}") from wrong


def reading(
    path: Path, error: type[BatchNormError] = UsageError, *, verb: str = "read"
) -> AbstractContextManager[None]:
    """Inside, a file is read that somebody else may have written or damaged: libraries raise anything at all then.

    Warnings are left out: of a file that is read they say nothing, and an error says what matters.

    Args:
        path: the file.
        error: the kind to raise.
        verb: what cannot be done where the file can be read, but its content is wrong.

    Raises:
        BatchNormError: of the kind `error`, naming the file, for any exception but this package's own and Ctrl-C.
    """
    return _Boundary(path, error, "read", verb, regular=True)


def writing(path: Path, error: type[BatchNormError] = UsageError) -> AbstractContextManager[None]:
    """Inside, a file is written.

    Raises:
        BatchNormError: of the kind `error`, naming the file, for any exception but this package's own and Ctrl-C.
    """
    return _Boundary(path, error, "write to", "write to")


def check_writable(path: Path, error: type[BatchNormError] = UsageError, *, size: int = 0) -> None:
    """Check that a file can be written to a path, before work is done that would be lost: by writing beside it.

    Args:
        path: the file, which may be there.
        error: the kind to raise.
        size: about how many bytes there will be.

    Raises:
        BatchNormError: of the kind `error`; it cannot.
    """
    try:
        target = _target(path)
        with _temporary(target) as temporary:
            temporary.write_bytes(b"\n")  # a full disk takes a file without content
        free = shutil.disk_usage(target.parent).free
    except (OSError, ValueError) as wrong:
        reason = getattr(wrong, "strerror", None) or described(wrong)
        raise error(
            f"cannot write to {path}: {reason}; it must be a file in a folder that is there and can be written to"
        ) from wrong
    if size > free:
        raise error(f"cannot write to {path}: it will have {size:,} bytes, and {free:,} are free there. Make room")


@contextmanager
def replacing(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """An empty temporary file to write to, which takes the place of `path` at the end, if there is no error.

    Each writer has its own, in the same folder; of several the last one stays, whole. A symbolic link stays, and its
    target is replaced. An old file's permissions stay; a new one has those that the user's umask leaves.

    Args:
        path: the file.
        suffix: what the temporary name must end with, for libraries that go by it.

    Raises:
        OSError: it cannot be written.
    """
    target = _target(path)
    with _temporary(target, suffix) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the content is on the disk before the name is
        temporary.chmod(_mode(target))  # until now it was for its owner alone
        os.replace(temporary, target)


@contextmanager
def steady(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, whose errors are raised at the end: torch's writer in C++ aborts the process for one.

    Raises:
        OSError: the first that a write raised.
    """
    with path.open("wb", buffering=0) as file:
        sink = _Sink(file)
        try:
            yield sink
        except Exception as error:
            raise sink.error or error from None
        if sink.error is not None:
            raise sink.error


class _Sink(io.BytesIO):
    """Hands on all that is written, keeps nothing but the first error. What torch takes for a file has this base."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any, /) -> int:  # noqa: ANN401 - whatever has bytes
        """Write, or do as if."""
        rest = memoryview(content).cast("B")
        size = rest.nbytes
        try:
            while rest and self.error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return size


def write_text(path: Path, content: str) -> None:
    """Put a text file in place, as a whole or not at all; until then an old file of that name stays.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _target(path: Path) -> Path:
    """Where the file itself is, which a link leads to.

    Raises:
        OSError: something that is no file is there.
    """
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        if what := _no_file(target.lstat().st_mode):  # a link is left where links go round in a circle
            raise OSError(f"it is {what}")
    return target


def _no_file(mode: int) -> str:
    """What something is that is no regular file; "" for one that is."""
    if stat.S_ISREG(mode):
        return ""
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"


@contextmanager
def _temporary(target: Path, suffix: str = "") -> Iterator[Path]:
    """A new file beside `target`, gone at the end."""
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # a name that is too long is refused now, not when it is to be used
    # Named before it is made: an interrupt between the two would leave a file that nobody knows of.
    temporary = target.parent / f".{target.name[:_NAME]}.{os.urandom(16).hex()}{suffix}"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield temporary
    finally:
        try:
            temporary.unlink(missing_ok=True)
        finally:  # another interrupt may have come before it was gone
            temporary.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """The old file's permissions, or those that the user gives to new files."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
