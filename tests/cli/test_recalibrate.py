"""`batchnorm recalibrate`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import batchnorm as bn
from batchnorm.cli.main import main
from cli.commands import fails, start
from support import tolerances
from support.comparison import close
from support.populations import assert_consistent, images, made

CODE = """
import os, sys, time
import torch
from torch import nn
from support.populations import images, made
def net():
    return made("residual")
def other():
    return nn.BatchNorm2d(3)
def data():
    return images(4, 3, 5, 2, 6, 2)
def shuffled():
    return torch.utils.data.DataLoader(torch.cat(data()), batch_size=4, shuffle=True)
def wide():
    return [torch.zeros(2, 7, 6, 6)]
def waiting():
    yield data()[0]
    print("waiting", flush=True)
    time.sleep(100)
def failing():
    yield from data()[:3]
    if os.environ["RANK"] == "1":
        raise LookupError("no such picture")
    yield from data()[3:]
"""
SIZES = (4, 3, 5, 2, 6, 2)


@pytest.fixture(autouse=True)
def code(project: Path) -> None:
    (project / "my.py").write_text(CODE)


def run(*arguments: str) -> None:
    assert main(["recalibrate", "my.py:net", *arguments]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The complaint about a call that does not succeed, and leaves no file."""
    before = {path.name for path in Path().iterdir()}
    line = fails(capsys, "recalibrate", *arguments)
    assert {path.name for path in Path().iterdir()} - before <= {"__pycache__"}
    return line


def by_hand(**options: Any) -> dict[str, Tensor]:
    model = made("residual")
    bn.recalibrate(model, images(*SIZES), **options)
    return model.state_dict()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        close(tensor, expected[name], tolerance, name=name)


def test_the_weights_are_those_of_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    run("--data", "my.py:data", "--output", "new.safetensors")
    captured = capsys.readouterr()
    assert captured.err == "", "no progress bar where there is no terminal"
    assert captured.out.startswith("exact statistics of 4 layers from 6 batches with 22 samples\n")
    read = load_file("new.safetensors")
    assert_same(read, by_hand())
    model = made("residual")
    model.load_state_dict(read)
    assert_consistent(model, images(*SIZES))


@pytest.mark.parametrize("method", ["pooled", "average"])
def test_another_method(method: str) -> None:
    run("--data", "my.py:data", "--output", "new.pt", "--method", method)
    assert_same(torch.load("new.pt", weights_only=True), by_hand(method=method))


def test_weights_and_arrays_from_files() -> None:
    model = made("residual", seed=5)
    torch.save(model.state_dict(), "old.pt")
    old = Path("old.pt").read_bytes()
    x = torch.cat(images(*SIZES))
    np.savez("x.npz", x=x.numpy().astype(np.float64), y=np.zeros(len(x)))
    run("--data", "x.npz", "--batch-size", "5", "--weights", "old.pt", "--output", "new.pt")
    bn.recalibrate(model, x.split(5))
    assert_same(torch.load("new.pt", weights_only=True), model.state_dict())
    assert Path("old.pt").read_bytes() == old


def test_the_output_may_be_the_input() -> None:
    torch.save(made("residual", seed=5).state_dict(), "w.pt")
    run("--data", "my.py:data", "--weights", "w.pt", "--output", "w.pt")
    model = made("residual", seed=6)
    model.load_state_dict(torch.load("w.pt", weights_only=True))
    assert_consistent(model, images(*SIZES))


def test_options_reach_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = bn.recalibrate
    monkeypatch.setattr(bn, "recalibrate", lambda *args, **options: seen.update(options) or original(*args, **options))
    run("--data", "my.py:data", "--output", "a.pt", "--max-samples", "9", "--memory-limit", "1.5MB")
    assert (seen["max_samples"], seen["memory_limit"], seen["checkpoint"]) == (9, 1_500_000, None)
    run("--data", "my.py:data", "--output", "a.pt", "--method", "pooled", "--checkpoint", "progress")
    assert seen["checkpoint"] == Path("progress")


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("4096", 4096), ("2gb", 2 * 10**9), ("1.5 K", 1500)])
def test_numbers_of_bytes(text: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = bn.recalibrate

    def spy(*args: Any, memory_limit: int, **options: Any) -> Any:
        seen.append(memory_limit)
        return original(*args, **options)

    monkeypatch.setattr(bn, "recalibrate", spy)
    run("--data", "my.py:data", "--output", "a.pt", "--memory-limit", text)
    assert seen == [number]


def test_shuffled_data_come_in_the_same_order_again() -> None:
    for name in "ab":
        torch.manual_seed(ord(name))
        output = ("--output", f"{name}.pt", "--max-samples", "4")
        assert main(["recalibrate", "my.py:other", "--data", "my.py:shuffled", *output]) == 0
    assert_same(torch.load("a.pt", weights_only=True), torch.load("b.pt", weights_only=True))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "Missing argument 'MODEL'"),
        (["my.py:net"], "Missing option '--data'"),
        (["my.py:net", "--data", "my.py:data"], "Missing option '--output'"),
        (["my.py:nothing", "--data", "my.py:data", "--output", "a.pt"], "my.py has no nothing"),
        (["my.py:net", "--data", "no.npz", "--output", "a.pt"], "cannot read no.npz"),
        (["my.py:no", "--data", "my.py:data", "--output", "a.onnx"], "must end with .safetensors, .pt, .pth"),
        (["my.py:no", "--data", "my.py:data", "--output", "no/a.pt"], "cannot write to no/a.pt"),
        (["my.py:net", "--data", "my.py:data", "--output", "a.pt", "--weights", "no.pt"], "cannot read no.pt"),
        (["my.py:net", "--data", "my.py:data", "--output", "a.pt", "--method", "best"], "'best' is not one of"),
        (["my.py:net", "--data", "my.py:data", "--output", "a.pt", "--memory-limit", "2XB"], "got 2XB; it must be a"),
        (["my.py:net", "--data", "my.py:data", "--output", "a.pt", "--max-samples", "0"], "0 is not in the range"),
        (["my.py:net", "--data", "my.py:data", "--output", "a.pt", "--checkpoint", "p"], 'use method="pooled"'),
        (["my.py:net", "--data", "my.py:data", "--output", "a.pt", "--checkpoint", "no/p"], "cannot write to no/p"),
        (["my.py:net", "--data", "my.py:wide", "--output", "a.pt"], "the model raised RuntimeError: Given groups=1"),
        (["my.py:other", "--data", "my.py:net", "--output", "a.pt"], "DATA must return an iterable of batches"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in refusal(capsys, *arguments)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_an_error_names_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "my.py:net", "--data", "my.py:wide", "--output", "a.pt")
    assert line.endswith("; in the forward pass of batch 0\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_leaves_no_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    process = start("recalibrate", "my.py:net", "--data", "my.py:waiting", "--output", "new.pt")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "batchnorm: interrupted\n")
    assert not list(project.glob("new*"))


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `batchnorm recalibrate`."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "batchnorm"]
    return subprocess.run(
        [*launch, "recalibrate", "my.py:net", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_two_processes_give_what_one_gives() -> None:
    process = torchrun("--data", "my.py:data", "--output", "new.pt")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("exact statistics of 4 layers from 6 batches with 22 samples\n") == 1
    assert_same(torch.load("new.pt", weights_only=True), by_hand(), tolerances.PARTS)


@pytest.mark.long
def test_a_process_that_fails_ends_both() -> None:
    process = torchrun("--data", "my.py:failing", "--output", "new.pt")
    assert process.returncode != 0
    assert "batchnorm: my.py:failing raised LookupError: no such picture (" in process.stderr
    assert process.stdout == ""
    assert not Path("new.pt").exists()


HOSTILE = """
import sys
import torch
from torch import nn
from support.populations import images, made
def data():
    return images(4, 3)
def scripted():
    return torch.jit.trace(made("plain").eval(), images(4)[0])
def inside():
    return nn.Sequential(scripted())
class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = made("plain")
    def forward(self, x):
        sys.exit(0)
def leaving():
    sys.exit(0)
def later():
    yield data()[0]
    sys.exit(0)
class Extra(nn.Module):
    def get_extra_state(self):
        return {1}
    def forward(self, x):
        return x
def extra():
    return nn.Sequential(made("plain"), Extra())
def named():
    model = nn.Sequential()
    model.add_module("\\x1b[2J\\u202e\\n漢", made("plain"))
    return model
"""


@pytest.mark.parametrize(
    ("model", "data", "part"),
    [
        ("scripted", "data", "got MODEL hostile.py:scripted, which is TorchScript; its layers cannot be seen. Return"),
        ("inside", "data", "whose module 0.1 is TorchScript"),
        ("Leaving", "data", "the model raised SystemExit: 0 ("),
        ("leaving", "data", "hostile.py:leaving raised SystemExit: 0 ("),
        ("extra", "leaving", "_extra_state, an object of type set"),  # before any data are read
        ("named", "later", "hostile.py:later raised SystemExit: 0 ("),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_users_code_of_every_kind(
    model: str, data: str, part: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "hostile.py").write_text(HOSTILE)
    for method in ("exact", "pooled", "average"):
        arguments = (f"hostile.py:{model}", "--data", f"hostile.py:{data}", "--output", "a.safetensors")
        assert part in refusal(capsys, *arguments, "--method", method)


def test_names_of_layers_are_shown(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal that lacks some of their characters; the file is there by then."""
    (project / "hostile.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1:strict")
    process = start("recalibrate", "hostile.py:named", "--data", "hostile.py:data", "--output", "a.pt")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert r"\x1b[2J\u202e " in output
    assert len(output.splitlines()) == 4, "no line more than there are layers"
    assert Path("a.pt").exists()


def test_an_output_keeps_its_permissions_and_its_link() -> None:
    Path("there").mkdir()
    target = Path("there/w.pt")
    target.touch(0o600)
    Path("w.pt").symlink_to(target)
    run("--data", "my.py:data", "--output", "w.pt")
    assert Path("w.pt").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert_same(torch.load(target, weights_only=True), by_hand())


@pytest.mark.parametrize(
    "output", ["/proc/a.pt", "n" * 300 + ".pt", "my.py/a.pt"], ids=["no files", "long", "in a file"]
)
def test_a_place_that_takes_no_files(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot write to" in refusal(capsys, "my.py:no", "--data", "my.py:data", "--output", output)
