"""Models as programs in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import UsageError
from batchnorm.loading.program import SUFFIXES, check_program_path, save_program

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Sum(nn.Module):
    """Two inputs, one of which has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * scale
        return y


class Fixed(nn.Linear):
    """Not for batches of any other size."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.ones(4, 1)


class Broken(nn.Linear):
    """Looks at its input's values."""

    def forward(self, input: Tensor) -> Tensor:
        return input if float(input.sum()) > 0 else -input


def inputs(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.tensor(2.0)


@pytest.mark.parametrize("named", [False, True])
def test_arguments_and_keywords(tmp_path: Path, named: bool) -> None:
    model, path = Sum().eval(), tmp_path / "sum.pt2"

    def given(n: int) -> Any:
        x, scale = inputs(n)
        return {"x": x, "scale": scale} if named else (x, scale)

    save_program(model, given(4), path)
    program = torch.export.load(path).module()
    for n in (2, 4, 9):
        own = given(n)
        actual, expected = (m(**own) if named else m(*own) for m in (program, model))
        assert torch.equal(actual, expected)


def test_what_the_model_fixes_stays_fixed(tmp_path: Path) -> None:
    model, path = Fixed(3, 2).eval(), tmp_path / "fixed.pt2"
    save_program(model, torch.randn(4, 3), path)
    program = torch.export.load(path).module()
    x = torch.randn(4, 3)
    assert torch.equal(program(x), model(x))
    with pytest.raises(AssertionError):
        program(torch.randn(5, 3))


def test_a_file_stays_where_a_model_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("the old one")
    with pytest.raises(UsageError, match="Write its weights instead"):
        save_program(Broken(3, 2), torch.randn(4, 3), path)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_can_be_written(tmp_path: Path, suffix: str) -> None:
    check_program_path(tmp_path / f"net{suffix}")
    with pytest.raises(UsageError, match="cannot write to"):
        check_program_path(tmp_path / "no" / f"net{suffix}")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end with \.pt2, \.onnx, \.safetensors, \.pt, \.pth"):
        check_program_path(tmp_path / "net")
