"""`batchnorm fold`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import batchnorm as bn
from batchnorm.cli.main import main
from cli.commands import START, fails, start
from support.comparison import close

CODE = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8) * 3 + 1)
    return model.train()
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if float(y.sum()) > 0 else -y
def alone():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
def branching():
    return Branching()
def wide():
    return nn.Linear(7, 7)
def data():
    yield torch.randn(4, 3, 8, 8), torch.zeros(4)
def nothing():
    return []
"""
# torch's own, while it exports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def code(project: Path) -> None:
    (project / "my.py").write_text(CODE)


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def expected(x: Tensor) -> Tensor:
    """The model itself, in inference."""
    names: dict[str, object] = {}
    exec(CODE, names)
    with torch.no_grad():
        output: Tensor = names["net"]().eval()(x)  # type: ignore[operator]
    return output


@pytest.mark.parametrize("example", ["2,3,8,8", "2x3x8x8", "my.py:data", "x.npz"])
def test_a_program_that_runs_by_itself(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For batches of another size than the example's, too."""
    np.savez("x.npz", x=images().numpy())
    assert main(["fold", "my.py:net", "--output", "folded.pt2", "--example", example]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 of 2 folded, outputs differ by at most ")
    assert lines[1:] == ["1  part of 0", "4  part of 3"]
    program = torch.export.load("folded.pt2").module()
    assert not any("norm" in str(node.target) for node in torch.export.load("folded.pt2").graph.nodes)
    for n in (2, 5, 7):
        close(program(images(n)), expected(images(n)))
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"my.py", "x.npz", "folded.pt2"}


def test_onnx() -> None:
    assert main(["fold", "my.py:net", "--output", "folded.onnx", "--example", "2,3,8,8"]) == 0
    session = onnxruntime.InferenceSession("folded.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    close(torch.from_numpy(y), expected(images()))


def test_a_scale_and_shift_is_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold", "my.py:alone", "--output", "folded.pt", "--example", "2,3,8,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 2 folded, 1 as a scale and shift, outputs differ by at most ")


@pytest.mark.parametrize("name", ["folded.safetensors", "folded.pt"])
def test_weights(name: str) -> None:
    assert main(["fold", "my.py:net", "--output", name, "--example", "2,3,8,8"]) == 0
    state = load_file(name) if name.endswith("safetensors") else torch.load(name, weights_only=True)
    names: dict[str, object] = {}
    exec(CODE, names)
    folded = bn.fold(names["net"](), images())  # type: ignore[operator]
    folded.load_state_dict(state)
    close(folded(images()), expected(images()))


def test_weights_to_begin_with() -> None:
    names: dict[str, object] = {}
    exec(CODE, names)
    model = names["net"]()  # type: ignore[operator]
    with torch.no_grad():
        model[4].bias.add_(3)
    torch.save(model.state_dict(), "other.pt")
    command = ["fold", "my.py:net", "--weights", "other.pt", "--output", "folded.pt2", "--example", "2,3,8,8"]
    assert main(command) == 0
    close(torch.export.load("folded.pt2").module()(images()) - 3, expected(images()))


def test_an_example_of_one_sample_stays_one() -> None:
    assert main(["fold", "my.py:net", "--output", "folded.pt2", "--example", "1,3,8,8"]) == 0
    program = torch.export.load("folded.pt2").module()
    close(program(images(1)), expected(images(1)))
    with pytest.raises(AssertionError):
        program(images(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("my.py:net", "--output", "x.gguf", "--example", "2,3,8,8"),
            "got x.gguf; the name of a folded model must end",
        ),
        (("my.py:net", "--output", "no/x.pt2", "--example", "2,3,8,8"), "cannot write to no/x.pt2"),
        (("my.py:net", "--output", "x.pt2", "--example", "my.py:nothing"), "whose first batch has no samples"),
        (("my.py:net", "--output", "x.pt2", "--example", "2;3"), "got DATA 2;3; it must be package.module:callable"),
        (("my.py:net", "--output", "x.pt2", "--example", "2,5,8,8"), "the model raised RuntimeError"),
        (
            ("my.py:branching", "--output", "x.pt2", "--example", "2,3,8,8"),
            "torch.export cannot make a program of this",
        ),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert message in fails(capsys, "fold", *arguments)
    assert not list(Path().glob("x.*"))


def test_weights_of_a_model_that_cannot_be_exported() -> None:
    assert main(["fold", "my.py:branching", "--output", "x.safetensors", "--example", "2,3,8,8"]) == 0
    assert "conv.weight" in load_file("x.safetensors")


@pytest.mark.parametrize(
    "shape", ["100000,100000,100000", "4294967296,4294967296", "9" * 5000, f"2,{'9' * 18}"], ids=len
)
def test_examples_that_no_memory_holds(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "fold", "my.py:net", "--example", shape, "--output", "a.pt")
    assert "got --example" in line
    assert ".cpp" not in line
    assert not Path("a.pt").exists()


HOSTILE = """
import sys
from torch import nn
class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
    def forward(self, x):
        sys.exit(0)
def named():
    model = nn.Sequential()
    model.add_module("\\x1b[2J\\u202e\\n漢", nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    return model
"""


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".safetensors"])
def test_users_code_of_every_kind(suffix: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "hostile.py").write_text(HOSTILE)
    output = ("--example", "2,3,4,4", "--output", f"a{suffix}")
    assert "the model raised SystemExit: 0 (" in fails(capsys, "fold", "hostile.py:Leaving", *output)
    assert "cannot load hostile.py" in fails(capsys, "fold", "my.py:net", "--weights", "hostile.py", *output)
    assert not list(project.glob("a*"))


def test_names_of_layers_are_shown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "hostile.py").write_text(HOSTILE)
    assert main(["fold", "hostile.py:named", "--example", "2,3,4,4", "--output", "a.pt"]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b[2J\u202e 漢.1" in printed
    assert len(printed.splitlines()) == 2


# Python may put a part of a module's bytecode in place where the disk is full: it is to write none.
FULL = "import resource, sys; sys.dont_write_bytecode = True; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); "


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX's")
def test_a_disk_that_becomes_full(project: Path) -> None:
    names = ["a.pt", "a.pt2", "a.safetensors"]
    started = [start("fold", "my.py:net", "--example", "2,3,8,8", "--output", n, code=FULL + START) for n in names]
    for name, process in zip(names, started, strict=True):
        output, errors = process.communicate(timeout=240)
        assert (process.returncode, output, errors.count("\n")) == (2, "", 1), errors
        assert errors.startswith(f"batchnorm: cannot write to {name}: ")
        assert "File too large" in errors
    assert not list(project.glob("*a.p*"))
