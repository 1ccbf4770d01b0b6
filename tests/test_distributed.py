"""Processes that work together: one answer, the same bits in all, and the same error instead of a hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm as bn
import recalibration_scenarios
from batchnorm.distributed import Group
from batchnorm.errors import OptionError
from support import processes, tolerances
from support.comparison import close
from support.populations import images, layers, made

Found = list[dict[str, Any]]
SCRIPT = recalibration_scenarios.__file__
ALL = [name for name in recalibration_scenarios.SCENARIOS if name != "killed"]


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.long), 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two and three processes found, in all scenarios."""
    return processes.run(ALL, request.param, tmp_path_factory.mktemp("ranks"), timeout=150, script=SCRIPT)


def one_process(method: str) -> list[torch.Tensor]:
    model = made("residual")
    torch.manual_seed(0)
    bn.recalibrate(model, images(*recalibration_scenarios.SIZES), method=method)
    return [t for x in layers(model).values() for t in (x.running_mean, x.running_var)]


def test_alone_there_is_nobody_to_wait_for() -> None:
    group = Group()
    assert (group.rank, group.size) == (0, 1)
    tensor = torch.ones(2)
    assert group.all_gather("here", [tensor]) == ("here", [[tensor]])
    with pytest.raises(LookupError), group.reporting():
        raise LookupError


def test_meeting(found: Found) -> None:
    size = len(found)
    for rank, at in enumerate(f["meeting"] for f in found):
        assert (at["rank"], at["size"], at["place"], at["nowhere"]) == (rank, size, "there", None)
        assert [t[0].tolist() for t in at["tensors"]] == [[float(r)] * (r + 1) for r in range(size)]


@pytest.mark.parametrize("method", ["exact", "pooled", "average", "again", "data parallel"])
def test_one_answer_and_the_same_bits(found: Found, method: str) -> None:
    """Shares are uneven, and one is empty."""
    n = sum(recalibration_scenarios.SIZES)
    counts = {"numbers": (len(recalibration_scenarios.SIZES), n, [36 * n, 36 * n, 4 * n, n])}
    single = one_process(method if method in ("pooled", "average") else "exact")
    for at in (f[method] for f in found):
        assert at["error"] is None
        assert at["numbers"] == counts["numbers"]
        for a, b, c in zip(at["statistics"], found[0][method]["statistics"], single, strict=True):
            assert torch.equal(a, b)
            # Where there is dropout, each process draws numbers of its own.
            if method != "average" or len(a) == 6:
                close(a, c, tolerances.PARTS)


def test_max_samples_is_of_each_process(found: Found) -> None:
    assert [f["max_samples"]["numbers"][1] for f in found] == [3 * len(found)] * len(found)


@pytest.mark.parametrize("scenario", ["no data", "no data pooled"])
def test_no_data_anywhere_is_the_same_error_everywhere(found: Found, scenario: str) -> None:
    for at in (f[scenario] for f in found):
        assert at["error"][0] == "CountError"
        assert at["error"][1].startswith("got 0 batches without a sample")
        assert at["unchanged"]


@pytest.mark.parametrize(
    ("scenario", "places"),
    [
        ("other order", ("at a", "at b")),
        ("early end", ("at b", "at the end of the forward pass")),
        ("other methods", ('at the beginning of method "exact"', 'at the beginning of method "pooled"')),
    ],
)
def test_another_order_is_the_same_error_everywhere(found: Found, scenario: str, places: tuple[str, str]) -> None:
    others, odd = ("rank 0", "rank 1") if len(found) == 2 else ("ranks 0, 2", "rank 1")
    if scenario == "other methods" and len(found) == 3:
        others, odd = "rank 0", "ranks 1, 2"
    for at in (f[scenario] for f in found):
        kind, message = at["error"]
        assert kind == "OrderError"
        assert f"{others} {places[0]}" in message
        assert f"{odd} {places[1]}" in message
        assert at["unchanged"]


def test_pooled_needs_no_order(found: Found) -> None:
    for at in (f["other order pooled"] for f in found):
        assert at["error"] is None


@pytest.mark.parametrize(
    ("scenario", "error"),
    [
        ("failing", ("LookupError", "no such file")),
        ("failing pooled", ("LookupError", "no such file")),
        ("failing inside", ("LookupError", "broken")),
        ("wrong option", ("OptionError", "got max_samples=0; it must be a positive number of samples, or None")),
    ],
)
def test_an_error_of_one_is_told_to_all(found: Found, scenario: str, error: tuple[str, str]) -> None:
    for rank, at in enumerate(f[scenario] for f in found):
        assert at["unchanged"]
        if rank == 1:
            assert at["error"] == error
        else:
            assert at["error"][0] == "ProcessError"
            assert f"rank 1 with {error[0]}: {error[1]}" in at["error"][1]


def test_a_group_of_some(found: Found) -> None:
    single = one_process("exact")
    for at in (f["subgroup"] for f in found[:2]):
        assert at["error"] is None
        for a, b in zip(at["statistics"], single, strict=True):
            close(a, b, tolerances.PARTS)
    for at in (f["subgroup"] for f in found[2:]):
        assert at["error"][0] == OptionError.__name__
        assert "a process group that this process is not in" in at["error"][1]
        assert at["unchanged"]


def test_a_checkpoint_of_each(found: Found) -> None:
    single, size = one_process("pooled"), len(found)
    batches = len(recalibration_scenarios.SIZES) // size
    for rank, at in enumerate(f["kept"] for f in found):
        assert at["first"][0] == ("LookupError" if rank == 1 else "ProcessError")
        assert at["files"] == [f"progress{size}.{r}" for r in range(size)]
        assert at["ran"] == (batches - 1 if rank == 1 else 0)
        for a, b in zip(at["statistics"], single, strict=True):
            close(a, b, tolerances.PARTS)


@pytest.mark.long
def test_a_process_that_is_killed_is_an_error_in_the_others(tmp_path: Path) -> None:
    found = processes.run(["killed"], 3, tmp_path, timeout=90, script=SCRIPT)
    assert found[1] is None
    for at in (found[0], found[2]):
        assert at is not None
        kind, message = at["killed"]["error"]
        assert kind == "ProcessError"
        assert "another process of the group is gone, or later than the group's timeout" in message
        assert at["killed"]["unchanged"]
