"""`batchnorm check`: with the check itself replaced, and, at the end, with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchnorm.cli.main import main
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import Fix, Fixed
from cli.commands import fails, start
from diagnosis.reports import HOSTILE, finding, full, reported

CODE = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
def wrong():
    model = net()
    model[1].running_mean -= 5
    return model
def momentum():
    model = net()
    model[1].momentum = 0.99
    return model
def data():
    return [(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)) for _ in range(2)]
def failing():
    yield torch.randn(8, 1, 4, 4)
    raise LookupError("no such picture")
"""


@pytest.fixture(autouse=True)
def code(project: Path) -> None:
    (project / "my.py").write_text(CODE)


class Checked:
    """What stands in for the check: it remembers its arguments, and gives a report made before."""

    def __init__(self) -> None:
        self.report = Report([], [reported("1")])
        self.seen: dict[str, Any] = {}

    def check(self, model: nn.Module, batches: Any = None, **options: Any) -> Report:
        self.seen = {"model": model, "batches": batches, **options}
        return self.report

    def check_state_dict(self, state: Any, **options: Any) -> Report:
        self.seen = {"state": state, **options}
        return self.report


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    stand_in = Checked()
    module = ModuleType("batchnorm.diagnosis.check")
    module.check, module.check_state_dict = stand_in.check, stand_in.check_state_dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


def with_severities(*severities: Any) -> Report:
    return Report([finding(severity=severity) for severity in severities], [reported("a")])


@pytest.mark.parametrize(
    ("severities", "fail_on", "exit_code"),
    [
        ((), None, 0),
        (("info", "warning"), None, 0),
        (("error", "info"), None, 1),
        (("warning",), "warning", 1),
        (("info",), "warning", 0),
        (("info",), "info", 1),
        ((), "info", 0),
        (("error",), "never", 0),
    ],
)
def test_exit_codes(
    checked: Checked, severities: Any, fail_on: str | None, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checked.report = with_severities(*severities)
    assert main(["check", "my.py:net", *([] if fail_on is None else ["--fail-on", fail_on])]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == f"{checked.report}\n"
    assert captured.err == ""


def test_what_is_hostile_in_a_name_is_shown(checked: Checked, capsys: pytest.CaptureFixture[str]) -> None:
    checked.report = full()
    assert main(["check", "my.py:net"]) == 1
    text = capsys.readouterr().out
    assert r"x\x1b[2J<script>[red]" in text
    assert not set(text) & set(HOSTILE) & {"\x1b", "\u202e"}


def test_arguments_reach_the_check(checked: Checked) -> None:
    np.savez("x.npz", x=np.zeros((10, 1, 4, 4)), y=np.zeros(10, dtype=np.int64))
    arguments = ["--data", "x.npz", "--second", "x.npz", "--batch-size", "4", "--loss", "cross_entropy"]
    assert main(["check", "my.py:net", *arguments, "--memory-limit", "2KB"]) == 0
    seen = checked.seen
    assert isinstance(seen["model"], nn.Sequential)
    for name in ("batches", "second"):
        assert [len(x) for x, _ in seen[name]] == [4, 4, 2]
    batch = next(iter(seen["batches"]))
    assert seen["forward"](seen["model"], batch).shape == (4, 3)
    assert float(seen["loss"](torch.zeros(4, 3), batch[1])) == pytest.approx(np.log(3))
    assert (seen["select"], seen["ignore"], seen["memory_limit"]) == (None, None, 2000)
    seen["progress"](1, 2)


def test_codes_are_lists_and_prefixes(checked: Checked) -> None:
    assert main(["check", "my.py:net", "--select", "bn1, BN101", "--ignore", "BN101"]) == 0
    assert (checked.seen["select"], checked.seen["ignore"]) == (["BN1", "BN101"], ["BN101"])


def test_without_a_model_it_is_the_example(checked: Checked) -> None:
    assert main(["check"]) == 0
    assert checked.seen["model"].get_submodule("fourth.norm").momentum == 0.99
    assert len(checked.seen["batches"]) == 8
    assert checked.seen["loss"] is not None


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_of_weights_alone(checked: Checked, name: str) -> None:
    state = nn.BatchNorm1d(3).state_dict()
    torch.save(state, name) if name.endswith(".pt") else save_file(state, name)
    assert main(["check", name, "--select", "BN1"]) == 0
    assert checked.seen["state"].keys() == state.keys()
    assert checked.seen["select"] == ["BN1"]


def test_weights_of_a_model(checked: Checked) -> None:
    state = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)
    ).state_dict()
    state["1.running_mean"].fill_(7)
    torch.save(state, "w.pt")
    assert main(["check", "my.py:net", "--weights", "w.pt"]) == 0
    assert torch.equal(checked.seen["model"][1].running_mean, torch.full((4,), 7.0))


def test_files(checked: Checked, capsys: pytest.CaptureFixture[str]) -> None:
    checked.report = full()
    arguments = ["my.py:net", "--data", "my.py:data", "--ignore", "bn101", "--fail-on", "never"]
    assert main(["check", *arguments, "--html", "r.html", "--json", "r.json"]) == 0
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["counts"]["error"] == 2
    html = Path("r.html").read_text(encoding="utf-8")
    assert (
        "<code>batchnorm check my.py:net --data my.py:data --html r.html --ignore BN101 --fail-on never</code>" in html
    )
    assert "<dt>batchnorm</dt>" in html
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"my.py", "r.html", "r.json"}


def test_fix_writes_the_weights_and_shows_before_and_after(
    checked: Checked, capsys: pytest.CaptureFixture[str]
) -> None:
    before = with_severities("error")

    def fix() -> Fixed:
        checked.seen["model"][1].running_mean.fill_(5)
        done = (Fix("BN301", "1", "recalibrated", "3.1 SD", "0 SD"),)
        return Fixed(done, Report([], [reported("1")], before=before))

    checked.report = Report(before.findings, before.layers, fixer=fix)
    assert main(["check", "my.py:net", "--fix", "--output", "new.pt"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Put right: 1 thing\n")
    assert ["1", "BN301", "recalibrated", "3.1", "SD", "0", "SD"] in [line.split() for line in text.splitlines()]
    for part in ("nothing found in 1 layer", "Findings before and after"):
        assert part in text
    assert torch.load("new.pt", weights_only=True)["1.running_mean"].tolist() == [5.0] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "my.py:data"], "got --data without MODEL"),
        (["--weights", "w.pt"], "got --weights without MODEL"),
        (["w.pt", "--data", "my.py:data"], "got --data and MODEL w.pt, a file of weights"),
        (["w.pt", "--fix", "--output", "x.pt"], "got --fix and MODEL w.pt, a file of weights"),
        (["w.pt"], "cannot read w.pt: No such file"),
        (["my.py:net", "--fix"], "they go together: --fix --output FILE"),
        (["my.py:net", "--output", "x.pt"], "they go together: --fix --output FILE"),
        (["my.py:net", "--fix", "--output", "x.bin"], "must end with .safetensors"),
        (["my.py:net", "--second", "my.py:data"], "got --second without --data"),
        (["my.py:net", "--loss", "mse_loss"], "got --loss without --data"),
        (["my.py:net", "--data", "my.py:data", "--loss", "nonsense"], "got LOSS nonsense"),
        (["my.py:net", "--data", "my.py:data", "--batch-size", "3"], "it is for .npz files"),
        (["my.py:net", "--select", "BN9"], "got select='BN9'"),
        (["my.py:net", "--ignore", "BN101,,"], "got ignore=''"),
        (["my.py:net", "--html", "nowhere/r.html"], "cannot write to nowhere/r.html"),
        (["my.py:net", "--json", "."], "it is a folder"),
        (["my.py:net", "--fail-on", "always"], "always"),
        (["my.py:nothing"], "has no nothing"),
        (["nothing"], "it must be package.module:callable"),
        (["my.py:net", "--memory-limit", "much"], "number of bytes"),
    ],
)
def test_wrong_use_is_one_line(
    checked: Checked, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(capsys, "check", *arguments)
    assert not checked.seen, "no work is done"
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"my.py"}


def test_a_file_without_statistics_is_named(checked: Checked, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3, "state_dict": nn.BatchNorm1d(3).state_dict()}, "w.pt")
    line = fails(capsys, "check", "w.pt")
    assert "w.pt, which has no running_mean of any layer; it begins with epoch, state_dict. Give a state_dict" in line


def test_what_the_model_raises_is_one_line(checked: Checked) -> None:
    assert main(["check", "my.py:net", "--data", "my.py:data"]) == 0
    with pytest.raises(Exception, match=r"^the model raised RuntimeError: "):
        checked.seen["forward"](checked.seen["model"], torch.zeros(2, 7))


# From here on with the check itself.


def test_the_example_shows_its_faults() -> None:
    process = start("check")
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (1, "")
    summary = output.split("\n\n")[0].splitlines()
    found = {(line.split()[1], line.split()[2]) for line in summary[1:]}
    assert {
        ("BN301", "second.norm"),
        ("BN106", "third.norm"),
        ("BN101", "fourth.norm"),
        ("BN201", "fourth.norm"),
    } <= found
    serious = {line.split()[1] for line in summary[1:] if not line.startswith("info")}
    assert serious == {"BN301", "BN106", "BN101"}


def test_a_model_and_its_momentum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my.py:momentum", "--select", "BN101", "--fail-on", "warning", "--json", "r.json"]) == 1
    assert capsys.readouterr().out.startswith("1 warning in 1 layer; no data\nwarning  BN101  1  momentum is 0.99")
    (found,) = json.loads(Path("r.json").read_text(encoding="utf-8"))["findings"]
    assert (found["code"], found["layer"], found["remedy"]) == ("BN101", "1", "model[1].momentum = 0.01")


def test_data_find_the_gap_and_fix_closes_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["my.py:wrong", "--data", "x.npz", "--loss", "cross_entropy", "--select", "BN301"]
    generator = np.random.default_rng(0)
    np.savez("x.npz", x=generator.normal(3, 2, (64, 1, 4, 4)), y=generator.integers(0, 3, 64))
    assert main(["check", *arguments]) == 1
    assert "BN301" in capsys.readouterr().out
    assert main(["check", *arguments, "--fix", "--output", "new.pt", "--html", "r.html"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Put right: ")
    assert "nothing found in 1 layer" in text
    assert "What has been put right?" in Path("r.html").read_text(encoding="utf-8")
    assert main(["check", *arguments, "--weights", "new.pt"]) == 0


def test_a_state_dict(capsys: pytest.CaptureFixture[str]) -> None:
    state = nn.BatchNorm1d(3).state_dict()
    state["running_var"][1] = -1.0
    torch.save(state, "w.pt")
    assert main(["check", "w.pt", "--select", "BN004"]) == 1
    assert "BN004" in capsys.readouterr().out


def test_data_that_fail_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "my.py:failing raised LookupError: no such picture" in fails(
        capsys, "check", "my.py:net", "--data", "my.py:failing"
    )
