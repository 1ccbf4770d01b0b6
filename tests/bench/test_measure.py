from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.bench import contenders, measure, suites

CASE = suites.Case("test", (16, 5, 6, 6), suites.LAST, "float32")


@pytest.fixture(scope="module")
def rows() -> list[measure.Row]:
    before = measure.SECONDS
    measure.SECONDS = 0.01
    try:
        return measure.run([CASE], peers=None, compile=False, warm=False, advance=lambda row: None)
    finally:
        measure.SECONDS = before


def test_a_row_for_every_phase(rows: list[measure.Row]) -> None:
    assert [row.phase for row in rows] == list(contenders.PHASES)
    for row in rows:
        assert set(row.seconds) == {"ours", "torch", "floor"}
        assert all(seconds > 0 for seconds in row.seconds.values())
        assert row.ratio("torch") == row.seconds["torch"] / row.seconds["ours"]
        assert row.ratio("jax") is None


def test_json_has_the_machine_the_versions_and_the_date(rows: list[measure.Row], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    measure.write_json(path, rows, warm=False)
    document = json.loads(path.read_text())
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["cores"] > 0
    assert document["date"].startswith("20")
    assert [row["phase"] for row in document["rows"]] == list(contenders.PHASES)


class Wrong(contenders.TorchModule):
    """A contender whose gradient of the weight is off."""

    def answer(self) -> list[torch.Tensor]:
        y, dx, dweight, dbias = super().answer()
        return [y, dx, dweight * 1.1 + 1, dbias]


def test_a_wrong_answer_stops_the_run() -> None:
    right, wrong = contenders.TorchModule("ours", contenders.ours), Wrong("wrong", contenders.torch_nn)
    for contender in (right, wrong):
        contender.load(CASE)
    measure.compare(CASE, [right, right])
    with pytest.raises(measure.AnswersDifferError, match=r"wrong on .* dweight differs"):
        measure.compare(CASE, [right, wrong])


def test_shares_and_means() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert measure.wrong_share(a, torch.tensor([1.0, 2.0, 3.0, 5.0]), 0.01) == 0.25
    assert measure.geometric_mean([2.0, 8.0]) == pytest.approx(4)


def test_the_peak_is_that_of_the_work() -> None:
    """In a process of its own, whose memory holds nothing that was freed before and serves again."""
    size = 64 << 20
    code = (
        f"import torch; from batchnorm.bench import measure; print(measure.peak(lambda: torch.ones({size} // 4).sum()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    if sys.platform == "linux":
        assert 0.9 * size < int(run.stdout) < 1.5 * size


def test_warm_outputs_keep_their_pages() -> None:
    code = (
        "import resource, torch; from batchnorm.bench import measure; measure.keep_freed_memory()\n"
        "work = lambda: torch.ones(64 << 20, dtype=torch.uint8)\n"
        "for _ in range(9): work()\n"  # the heap grows to what it needs
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(run.stdout) < 1000  # fresh pages would be 16,384 each time
