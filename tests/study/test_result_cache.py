"""Results on disk."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from batchnorm.study import dispute, noise, placement, result_cache, shift
from batchnorm.study.dataset import digits
from batchnorm.study.experiment import Setting
from batchnorm.study.networks import OURS, TORCH
from batchnorm.study.result_cache import ResultCache, exclusive, fingerprint, source_files
from study.trials import Plan, run, trial

SETTING = Setting(digits(), OURS)
ARGS = ("batch norm", 0.1, 3)


def store(folder: Path, **options: object) -> ResultCache:
    experiment = trial(**options)
    return ResultCache(folder, experiment, experiment.full, SETTING)


def test_a_result_comes_back_exactly(tmp_path: Path) -> None:
    result = {"loss": 0.1 + 0.2, "tiny": 5e-324, "list": [1, None, True], "text": "é"}
    first = store(tmp_path / "deep" / "er")
    assert first.get(ARGS) is None
    first.put(ARGS, result)
    again = store(tmp_path / "deep" / "er")
    assert again.get(ARGS) == result
    for other in (("batch norm", 0.1, 4), ("batch norm", 0.10000000000000002, 3), ("batch norm", "0.1", 3)):
        assert again.get(other) is None


def test_what_is_not_a_number_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store(tmp_path).put(ARGS, {"loss": float("nan")})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "left",
    [
        "",
        '{"args": ["batch norm", 0.1, 3], "resu',
        "[]x",
        "[]",
        "null",
        "3",
        "{}",
        '{"args": ["batch norm", 0.1, 3]}',
        '{"args": ["batch norm", 0.1, 3], "result": []}',
        '{"args": ["batch norm", 0.1, 3], "result": {"loss": 3.0}}',  # edited by hand: it lacks the checksum
        "[" * 100_000,
        "9" * 10_000,
    ],
    ids=lambda value: value[:40],
)
def test_half_a_file_is_no_result(left: str, tmp_path: Path) -> None:
    results = store(tmp_path)
    results.put(ARGS, {"loss": 1.0})
    (file,) = (path for path in tmp_path.rglob("*.json"))
    file.write_text(left)
    assert results.get(ARGS) is None
    results.put(ARGS, {"loss": 2.0})
    assert results.get(ARGS) == {"loss": 2.0}


def test_a_number_that_changed_is_no_result(tmp_path: Path) -> None:
    results = store(tmp_path)
    results.put(ARGS, {"loss": 1.25})
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text().replace("1.25", "1.75"))
    assert results.get(ARGS) is None
    file.write_bytes(b"\xff\xfe")
    assert results.get(ARGS) is None


def test_a_folder_in_the_place_of_a_result_is_an_error_of_writing(tmp_path: Path) -> None:
    results = store(tmp_path)
    results.put(ARGS, {"loss": 1.25})
    (file,) = tmp_path.rglob("*.json")
    file.unlink()
    file.mkdir()
    assert results.get(ARGS) is None
    with pytest.raises(OSError, match="folder"):
        results.put(ARGS, {"loss": 1.25})


def test_a_name_is_not_trusted(tmp_path: Path) -> None:
    """A file that some other task's name happens to lead to is not its result."""
    results = store(tmp_path)
    results.put(ARGS, {"loss": 1.0})
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"args": ["plain", 0.1, 3]}))
    assert results.get(ARGS) is None


def test_other_experiments_and_plans_have_other_places(tmp_path: Path) -> None:
    store(tmp_path).put(ARGS, {"loss": 1.0})
    assert store(tmp_path, name="another").get(ARGS) is None
    assert store(tmp_path, count=9).get(ARGS) is None
    assert store(tmp_path).get(ARGS) is not None


def test_the_fingerprint_names_all_that_a_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    pixels = data.train.inputs.clone()
    pixels[3, 0, 2, 2] += 1e-3
    settings = {
        "same": Setting(digits(), OURS),
        "layers": Setting(data, TORCH),
        "data": Setting(replace(data, train=replace(data.train, inputs=pixels)), OURS),
    }
    prints = {what: fingerprint(run, Plan(), setting) for what, setting in settings.items()}
    prints["plan"] = fingerprint(run, Plan(count=7), SETTING)
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    prints["torch"] = fingerprint(run, Plan(), SETTING)
    monkeypatch.undo()
    assert prints.pop("same") == fingerprint(run, Plan(), SETTING)
    assert len({*prints.values(), fingerprint(run, Plan(), SETTING)}) == len(prints) + 1


IMPORTED = {
    dispute: "dispute loss_landscape noise_injection shift equations training networks dataset measured grid",
    noise: "noise equations",
    shift: "shift equations training",
    placement: "placement training networks dataset",
}


@pytest.mark.parametrize(
    ("experiment", "edited"),
    [(module, name) for module, names in IMPORTED.items() for name in names.split()],
    ids=lambda value: value.__name__.split(".")[-1] if isinstance(value, ModuleType) else value,
)
def test_an_edit_of_a_module_that_an_experiment_imports_changes_the_fingerprint(
    experiment: ModuleType, edited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = experiment.EXPERIMENT
    before = fingerprint(row.run, row.full, SETTING)
    edit(monkeypatch, edited)
    assert fingerprint(row.run, row.full, SETTING) != before


@pytest.mark.parametrize("edited", ["dispute", "noise_injection", "runner", "workers", "result_cache", "experiments"])
def test_an_edit_of_another_module_does_not(edited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = placement.EXPERIMENT
    before = fingerprint(row.run, row.full, SETTING)
    edit(monkeypatch, edited)
    assert fingerprint(row.run, row.full, SETTING) == before


def edit(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Pretend that a module of the study has another line."""
    read = Path.read_bytes

    def edited(path: Path) -> bytes:
        return read(path) + (b"# another line\n" if path.parts[-2:] == ("study", f"{module}.py") else b"")

    monkeypatch.setattr(Path, "read_bytes", edited)


def test_what_the_layers_compute_with_is_among_the_sources() -> None:
    names = {file.name for file in source_files(placement.run)}
    assert {"modules.py", "functional.py", "autograd.py"} <= names


IMPORTS = """
import json, batchnorm.one
from batchnorm.folder import two, name_in_the_folder
from batchnorm.three import name_in_the_module
from elsewhere import four

def later():
    import batchnorm.five as five
"""


def test_every_form_of_import_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "_FOLDER", tmp_path)
    files = ["one.py", "folder/__init__.py", "folder/two.py", "three.py", "four.py", "five.py", "six.py", "seven.py"]
    (tmp_path / "folder").mkdir()
    for name in files:
        (tmp_path / name).write_text("from batchnorm import six" if name == "five.py" else "")
    (tmp_path / "started.py").write_text(IMPORTS)
    monkeypatch.setattr(inspect, "getsourcefile", lambda _: str(tmp_path / "started.py"))
    found = [str(file.relative_to(tmp_path)) for file in source_files(run)]
    expected = ["five.py", "folder/__init__.py", "folder/two.py", "one.py", "six.py", "started.py", "three.py"]
    assert found == expected


@pytest.mark.long
def test_another_process_makes_the_same_fingerprint() -> None:
    code = "from tests.study import test_result_cache as t; print(t.fingerprint(t.run, t.Plan(), t.SETTING))"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint(run, Plan(), SETTING)


HOLD = """
import sys, time
from pathlib import Path
from batchnorm.study.result_cache import exclusive
with exclusive(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_one_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    entered = threading.Event()

    def enter() -> None:
        with exclusive(tmp_path):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.5)
    other.kill()
    other.communicate()
    assert entered.wait(10)
    waiting.join()
