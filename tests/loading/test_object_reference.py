"""References to the user's own code."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import greenlet
import pytest

from batchnorm.errors import ShapeError, UsageError
from batchnorm.loading.object_reference import blaming, resolve

CODE = """
print("executed")
def two():
    return 2
class Things:
    @staticmethod
    def three():
        return 3
number = 4
"""


def refusal(reference: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(reference, "MODEL")
    return str(caught.value)


def test_a_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "deep").mkdir()
    (project / "deep" / "things.py").write_text(CODE)
    two = resolve("deep/things.py:two", "MODEL")
    assert two() == 2
    assert resolve(f"{project}/deep/things.py:Things.three", "MODEL")() == 3
    assert capsys.readouterr().out == "executed\n", "once, whatever the way to it is called"
    assert pickle.loads(pickle.dumps(two)) is two


def test_a_file_imports_its_neighbours(project: Path) -> None:
    (project / "deep").mkdir()
    (project / "deep" / "neighbour.py").write_text("two = lambda: 2")
    (project / "deep" / "things.py").write_text("from neighbour import two")
    assert resolve("deep/things.py:two", "MODEL")() == 2


def test_a_module_of_the_current_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as a console script finds it
    (project / "pack").mkdir()
    (project / "pack" / "things.py").write_text(CODE)
    assert resolve("pack.things:two", "MODEL")() == 2


def test_a_module_that_is_installed() -> None:
    assert resolve("os.path:join", "MODEL")("a") == "a"


@pytest.mark.parametrize("reference", ["things.py", "things", ":two", "things.py:", "things.py:two()", "a.py:1"])
def test_another_form(reference: str) -> None:
    assert refusal(reference).startswith(f"got MODEL {reference}; it must be package.module:callable or path/file.py:")


def test_what_is_not_there(project: Path) -> None:
    (project / "things.py").write_text(CODE)
    assert "No such file" in refusal("nothing.py:two")
    assert "No module named 'nothing'" in refusal("nothing.deep:two")
    assert "things.py has no five" in refusal("things.py:five")
    assert "it must be callable, and is of type int" in refusal("things.py:number")


def test_a_file_with_the_name_of_a_module(project: Path) -> None:
    (project / "json.py").write_text(CODE)
    known = sys.modules["json"]
    assert "Rename the file" in refusal("json.py:two")
    assert sys.modules["json"] is known


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this' ({file}, line 1)"),
        ("\ndef two(:", "SyntaxError: "),
        ("import math\n\n1 / 0", "ZeroDivisionError: division by zero ({file}, line 3)"),
    ],
)
def test_a_file_that_raises_says_where(code: str, part: str, project: Path) -> None:
    (project / "things.py").write_text(code)
    message = refusal("things.py:two")
    assert message.startswith("importing things.py raised ")
    assert part.format(file=project / "things.py") in message
    assert "things" not in sys.modules, "half a module is no module"


def test_blame_is_the_line_that_led_into_a_library(project: Path) -> None:
    (project / "things.py").write_text("import torch\ndef two():\n    torch.nn.Linear(2, 2)(torch.ones(3))\n")
    with pytest.raises(UsageError, match=r"^this raised RuntimeError: .*things\.py, line 3\)$"), blaming("this"):
        resolve("things.py:two", "MODEL")()


def test_our_own_errors_and_interrupts_stay() -> None:
    for error in (ShapeError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, blaming("this"):
            raise error
        assert caught.value is error


class MuteError(BaseException):
    def __str__(self) -> str:
        raise MuteError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(0), "this raised SystemExit: 0 ("),
        (SystemExit(), "this raised SystemExit: without a message ("),
        (GeneratorExit(), "this raised GeneratorExit: "),
        (StopIteration(3), "this raised StopIteration: 3 ("),
        (MuteError(), "this raised MuteError: its message cannot be printed, that raises MuteError ("),
        (RuntimeError("API call failed at tensors.hpp, line 8"), "this raised RuntimeError: API call failed ("),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_users_code_raises(error: BaseException, message: str) -> None:
    with pytest.raises(UsageError) as caught, blaming("this"):
        raise error
    assert str(caught.value).startswith(message)


def test_the_end_of_a_suspended_pass_is_no_error() -> None:
    with pytest.raises(greenlet.GreenletExit), blaming("this"):
        raise greenlet.GreenletExit


def test_a_module_that_raises_when_it_is_asked(project: Path) -> None:
    (project / "things.py").write_text("def __getattr__(name): raise SystemExit(name)")
    assert "raised SystemExit: two (" in refusal("things.py:two")
