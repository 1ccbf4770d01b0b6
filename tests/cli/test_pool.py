"""`batchnorm pool`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import batchnorm as bn
from batchnorm.cli.main import main
from cli.commands import fails
from support.populations import made

pytestmark = pytest.mark.usefixtures("project")


def written(path: str, seed: int) -> dict[str, Any]:
    state = made("residual", seed).state_dict()
    if path.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("names", [("a.pt", "b.pth", "c.safetensors"), ("a.safetensors", "b.safetensors", "c.pt")])
def test_it_is_the_function(names: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    states = [written(name, seed) for seed, name in enumerate(names[:2])]
    assert main(["pool", *names[:2], "--counts", "100, 300", "--output", names[2]]) == 0
    out = capsys.readouterr().out
    assert out.startswith("statistics pooled: bn1, bn2, bn3, bn4\nfrom the first alone: ")
    assert "bn1.bias" in out
    read = load_file(names[2]) if names[2].endswith(".safetensors") else torch.load(names[2], weights_only=True)
    expected = bn.pool_statistics(states, [100, 300]).state_dict
    assert read.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in read.items())
    made("residual").load_state_dict(read)


def test_tied_weights_become_safetensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    from batchnorm.loading.state_dict import load_state_dict

    torch.save(Tied().state_dict(), "a.pt")
    assert main(["pool", "a.pt", "a.pt", "--counts", "1,1", "--output", "b.safetensors"]) == 0
    load_state_dict(Tied(), Path("b.safetensors"))


def test_the_output_may_be_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    expected = bn.pool_statistics([written("a.pt", 0), written("b.pt", 1)], [1, 1]).state_dict
    assert main(["pool", "a.pt", "b.pt", "--counts", "1,1", "--output", "a.pt"]) == 0
    assert torch.equal(torch.load("a.pt", weights_only=True)["bn1.running_var"], expected["bn1.running_var"])


def test_what_did_not_match_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x\x1b.running_mean": torch.zeros(2), "x\x1b.running_var": torch.ones(2), **written("b.pt", 0)}, "a.pt")
    assert main(["pool", "a.pt", "b.pt", "--counts", "1,1", "--output", "c.pt"]) == 0
    assert r"not pooled: x\x1b (source 1 does not have it)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a.pt", "b.pt", "--counts", "1", "--output", "c.pt"], "got --counts 1 for 2 files"),
        (["a.pt", "b.pt", "--counts", "1,-1", "--output", "c.pt"], "got --counts 1,-1 for 2 files"),
        (["a.pt", "b.pt", "--counts", "1,nan", "--output", "c.pt"], "got --counts 1,nan"),
        (["a.pt", "b.pt", "--counts", "0,0", "--output", "c.pt"], "counts that are all 0"),
        (["a.pt", "none.pt", "--counts", "1,1", "--output", "c.pt"], "cannot read none.pt"),
        (["a.pt", "b.pt", "--counts", "1,1", "--output", "c.txt"], "must end with"),
        (["a.pt", "b.pt", "--counts", "1,1", "--output", "no/c.pt"], "cannot write to no/c.pt"),
        (["a.txt", "b.pt", "--counts", "1,1", "--output", "c.pt"], "must end with"),
        (["linear.pt", "linear.pt", "--counts", "1,1", "--output", "c.pt"], "without a batch-norm layer"),
        (["a.pt", "b.pt", "--output", "c.pt"], "--counts"),
        (["--counts", "1,1", "--output", "c.pt"], "FILE"),
    ],
)
def test_errors_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("a.pt", "b.pt")):
        written(name, seed)
    torch.save(nn.Linear(2, 2).state_dict(), "linear.pt")
    assert complaint in fails(capsys, "pool", *arguments)
    assert not Path("c.pt").exists()
