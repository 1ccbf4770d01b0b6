"""Files that others wrote, and files that appear as a whole."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm import files
from batchnorm.errors import OptionError, ShapeError, UsageError
from batchnorm.files import check_writable, reading, replacing, steady, write_text, writing


class PanicError(BaseException):
    """As libraries in Rust have them."""


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        MemoryError(),
        RecursionError(),
        PanicError(),
        UnprintableError(),
        StopIteration(),
        SystemExit(0),
    ],
)
@pytest.mark.parametrize("context", [reading, writing])
def test_whatever_is_raised_names_the_file(error: BaseException, context: object) -> None:
    for kind in (UsageError, OptionError):
        with (
            pytest.raises(kind, match=r"^cannot (read|write to) some file: .") as caught,
            context(Path("some file"), kind),
        ):  # type: ignore[operator]
            raise error
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ShapeError("ours"), KeyboardInterrupt()])
@pytest.mark.parametrize("context", [reading, writing])
def test_our_own_errors_and_interrupts_stay(error: BaseException, context: object) -> None:
    with pytest.raises(type(error)) as caught, context(Path("file")):  # type: ignore[operator]
        raise error
    assert caught.value is error


def test_an_error_of_the_system_is_told_in_its_words() -> None:
    with pytest.raises(UsageError, match=r"^cannot read no: No such file or directory$"), reading(Path("no")):
        Path("no").read_bytes()


def test_new_files_are_for_whom_the_user_says(tmp_path: Path) -> None:
    write_text(tmp_path / "new", "x")
    (tmp_path / "by hand").write_text("x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_an_old_files_permissions_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path, there: bool) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    if there:
        target.write_text("old")
    link.symlink_to(Path("folder") / "target")
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["target"]


def test_what_lies_beside_stays(tmp_path: Path) -> None:
    """Nothing that has a temporary name of a former version, or of another program's."""
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "file.tmp").symlink_to(other)
    write_text(tmp_path / "file", "new")
    assert other.read_text() == "mine"


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(OSError, match="No space"):
                write_text(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


MANY = """
import sys
from pathlib import Path
from batchnorm.files import replacing
for _ in range(60):
    with replacing(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(sys.argv[2].encode() * 200_000)
"""


def test_of_several_writers_the_last_one_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0" * 200_000)
    writers = [subprocess.Popen([sys.executable, "-c", MANY, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["folder", "no/file", "file/inside", "n" * 300, "loop", "pipe", "nul\0"])
def test_places_that_take_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match=r"^cannot write to "):
        check_writable(tmp_path / name)
    with pytest.raises((OSError, ValueError)):
        write_text(tmp_path / name, "new")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has such a place")
def test_a_folder_that_only_seems_to_take_files() -> None:
    with pytest.raises(OptionError, match=r"^cannot write to "):
        check_writable(Path("/proc/file"), OptionError)


def test_devices_are_left_alone() -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        check_writable(Path(os.devnull))
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("length", [200, 255])
def test_names_as_long_as_may_be(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("n" * length)
    check_writable(path)
    write_text(path, "new")
    assert os.listdir(tmp_path) == [path.name]
    path = tmp_path / ("é" * (length // 2))
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "file", size=100)
    with pytest.raises(UsageError, match=r"it will have 1,000,000,000,000,000,000 bytes, and .* are free there"):
        check_writable(tmp_path / "file", size=10**18)
    monkeypatch.setattr(files.Path, "write_bytes", lambda *_: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(UsageError, match="No space left"):
        check_writable(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_temporary_name_ends_as_it_is_asked_to(tmp_path: Path) -> None:
    with replacing(tmp_path / "net.pt2", suffix=".pt2") as temporary:
        assert temporary.suffix == ".pt2"
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["net.pt2"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_becomes_full_is_an_error_of_the_system() -> None:
    """torch's own writer would abort the process."""
    with pytest.raises(OSError, match="No space left"), steady(Path("/dev/full")) as file:
        torch.save({"a": torch.zeros(100_000)}, file)


def test_what_is_written_steadily(tmp_path: Path) -> None:
    with steady(tmp_path / "file") as file:
        assert file.write(b"ab") == 2
        assert file.write(memoryview(np.arange(3.0))) == 24
        torch.save(torch.arange(5), file)
    content = (tmp_path / "file").read_bytes()
    assert content[:26] == b"ab" + np.arange(3.0).tobytes()
    assert torch.load(io.BytesIO(content[26:]), weights_only=True).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="mine"), steady(tmp_path / "file"):
        raise ValueError("mine")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody writes to it: to open it would never end."""
    pipe, link = tmp_path / "pipe.pt", tmp_path / "link.pt"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(UsageError, match="not a regular file"), reading(path):
            raise AssertionError("it would be opened now")


# A file object that an interrupt cuts off from its `with` is closed by Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_at_any_line_leaves_no_file(tmp_path: Path, times: int) -> None:
    """Between two lines of the module, as Ctrl-C comes; and twice, at lines after each other."""
    target, lines = tmp_path / "a", 0

    def run(first: int) -> bool:
        nonlocal lines
        lines = 0

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith("batchnorm/files.py"):
                return None
            lines += event == "line"
            if event == "line" and first <= lines < first + times:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with replacing(target) as temporary:
                temporary.write_text("new")
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    reached = 1
    while run(reached):
        assert [path.name for path in tmp_path.iterdir()] in ([], ["a"])
        reached += 1
    assert reached > 15
