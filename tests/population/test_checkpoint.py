"""Progress in a file: a run that was killed goes on, and no bit of the result changes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import NonFiniteError, OptionError
from batchnorm.population import checkpoint
from support.populations import everything, images, layers, made

ROOT = Path(__file__).parents[2]
SIZES = (4, 3, 5, 2, 6)


@pytest.fixture(autouse=True)
def _at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)


class StopError(Exception):
    """In place of a kill."""


def reading(read: list[int], stop: int | None = None) -> Iterator[Tensor]:
    for i, batch in enumerate(images(*SIZES)):
        if i == stop:
            raise StopError
        read.append(i)
        yield batch


class Noisy(nn.Module):
    """Draws random numbers in inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = made("residual")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.rand_like(x))


def noisy() -> Noisy:
    torch.manual_seed(5)
    return Noisy()


def pooled(model: nn.Module, batches: Any, path: Path | None = None, **options: Any) -> bn.Recalibration:
    return bn.recalibrate(model, batches, method="pooled", checkpoint=path, **options)


@pytest.mark.parametrize("stop", range(1, len(SIZES)))
def test_it_goes_on_where_it_was(tmp_path: Path, stop: int) -> None:
    expected = noisy()
    whole = pooled(expected, images(*SIZES))
    path = tmp_path / "progress"
    with pytest.raises(StopError):
        pooled(noisy(), reading([], stop), path)
    assert path.exists()
    model, ran, told = noisy(), [], []
    model.register_forward_hook(lambda m, args, y: ran.append(len(args[0])))
    result = pooled(model, reading([]), path, progress=lambda *done: told.append(done[0]))
    assert ran == list(SIZES[stop:])
    assert told == [4 * i for i in range(stop + 1, len(SIZES) + 1)]
    for name, layer in layers(model).items():
        assert torch.equal(layer.running_mean, layers(expected)[name].running_mean)
        assert torch.equal(layer.running_var, layers(expected)[name].running_var)
    assert (result.batches, result.samples) == (whole.batches, whole.samples)
    assert not list(tmp_path.iterdir())


def test_it_is_written_from_time_to_time_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 1000.0)
    path = tmp_path / "progress"
    seen: list[bool] = []
    monkeypatch.setattr(checkpoint.Checkpoint, "remove", lambda self: seen.append(path.exists()))
    pooled(made("plain"), images(*SIZES), path, progress=lambda *_: seen.append(path.exists()))
    assert seen == [False] * len(SIZES) + [True]
    assert torch.load(path, weights_only=True)["read"] == len(SIZES)


def test_a_failed_run_keeps_what_was_good(tmp_path: Path) -> None:
    path, batches = tmp_path / "progress", images(*SIZES)
    batches[2][0] = torch.nan
    with pytest.raises(NonFiniteError, match="in batch 2"):
        pooled(made("plain"), batches, path)
    model, expected = made("plain"), made("plain")
    pooled(model, images(*SIZES), path)
    pooled(expected, images(*SIZES))
    assert torch.equal(model[1].running_var, expected[1].running_var)


def half_done(path: Path, model: nn.Module | None = None, **options: Any) -> None:
    with pytest.raises(StopError):
        pooled(model or made("plain"), reading([], 3), path, **options)


def test_other_statistics_do_not_matter_and_other_weights_do(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    half_done(path)
    model = made("plain")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    before = everything(model)
    with pytest.raises(OptionError, match=r"that does not fit: its model, weights, layers or processes differ"):
        pooled(model, images(*SIZES), path)
    assert everything(model) == before
    with pytest.raises(OptionError, match="does not fit"):
        pooled(made("residual"), images(*SIZES), path)
    with pytest.raises(OptionError, match=r"it is of 3 batches, and there are fewer"):
        pooled(made("plain"), images(*SIZES[:2]), path)
    model = made("plain")
    model[1].running_mean.fill_(3)
    pooled(model, images(*SIZES), path)


@pytest.mark.parametrize("content", [b"", b"no such file", b"PK\x03\x04"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "progress"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"does not fit: it cannot be read"):
        pooled(made("plain"), images(*SIZES), path)
    assert path.read_bytes() == content
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(OptionError, match=r"does not fit: it is not such a file"):
        pooled(made("plain"), images(*SIZES), path)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import batchnorm as bn
from batchnorm.population import checkpoint
from support.populations import images, made
checkpoint.SECONDS_BETWEEN = 0.0
def reading():
    for i, batch in enumerate(images(4, 3, 5, 2, 6)):
        if i == 3:
            print("three", flush=True)
            time.sleep(600)
        yield batch
bn.recalibrate(made("residual"), reading(), method="pooled", checkpoint=sys.argv[1])
"""


def test_sigkill(tmp_path: Path) -> None:
    path, tests = tmp_path / "progress", str(ROOT / "tests")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path), tests], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "three\n"
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        run.kill()
    model, expected, ran = made("residual"), made("residual"), []
    model.register_forward_hook(lambda m, args, y: ran.append(len(args[0])))
    pooled(model, images(*SIZES), path)
    assert ran == list(SIZES[3:])
    pooled(expected, images(*SIZES))
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert not list(tmp_path.iterdir())


def _with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """As somebody who knows how would edit it."""
    return content | {"digest": checkpoint._digest(content)}


@pytest.mark.parametrize(
    "change",
    [
        {"read": None},
        {"read": -1},
        {"read": True},
        {"used": "2"},
        {"samples": 1.5},
        {"calls": []},
        {"done": torch.ones(2)},
        {"random": []},
        {"random": [torch.zeros(3)]},
        {"random": None},
        {"random": [torch.zeros(3, dtype=torch.uint8)]},
        {"random": [torch.zeros_like(torch.get_rng_state())]},
        {"moments": []},
        {"moments": [torch.zeros(3)]},
        {"moments": [(torch.tensor(3), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))]},
        {"identity": 3},
        {"identity": None},
        {"extra": 1},
        {3: 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("known", [True, False])
def test_a_field_that_somebody_edited(tmp_path: Path, change: dict[Any, Any], known: bool) -> None:
    path = tmp_path / "progress"
    half_done(path)
    content = torch.load(path, weights_only=True) | change
    if known:
        with contextlib.suppress(Exception):  # of what has no digest
            content = _with_digest(content)
    torch.save(content, path)
    model = made("plain")
    before = everything(model)
    with pytest.raises(OptionError, match="progress"):
        pooled(model, images(*SIZES), path)
    assert everything(model) == before


@pytest.mark.parametrize(
    "name", ["format", "identity", "read", "used", "samples", "calls", "done", "random", "moments", "digest"]
)
def test_a_field_that_is_missing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "progress"
    half_done(path)
    content = torch.load(path, weights_only=True)
    del content[name]
    torch.save(content, path)
    with pytest.raises(OptionError, match="progress"):
        pooled(made("plain"), images(*SIZES), path)


@pytest.mark.parametrize("field", ["mean", "m2", "count"])
def test_statistics_that_were_edited(tmp_path: Path, field: str) -> None:
    path = tmp_path / "progress"
    half_done(path)
    content = torch.load(path, weights_only=True)
    content["moments"][0][("count", "mean", "m2").index(field)].add_(1)
    torch.save(content, path)
    with pytest.raises(OptionError, match="its content does not match its checksum"):
        pooled(made("plain"), images(*SIZES), path)
    content["moments"][0][2].neg_()
    torch.save(_with_digest(content), path)
    with pytest.raises(OptionError, match="its field moments is not what"):
        pooled(made("plain"), images(*SIZES), path)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """Every file loads and gives the same statistics, or is refused: where a bit means nothing, it may be flipped."""
    path, expected = tmp_path / "progress", made("plain")
    half_done(path)
    whole = path.read_bytes()
    pooled(expected, images(*SIZES))
    right = {name: value.tolist() for name, value in expected.state_dict().items()}
    random, refused = Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        model = made("plain")
        try:
            pooled(model, images(*SIZES), path)
        except OptionError:
            refused += 1
        else:
            assert {name: value.tolist() for name, value in model.state_dict().items()} == right
    assert refused > 20


@pytest.mark.parametrize("name", ["folder", "n" * 300, "no/file", "file/inside"])
def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    read: list[int] = []
    with pytest.raises(OptionError, match="cannot write to"):
        pooled(made("plain"), reading(read), tmp_path / name)
    assert read == []


def test_a_link_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "progress", tmp_path / "there" / "file"
    link.symlink_to(target)
    half_done(link)
    assert link.is_symlink()
    assert torch.load(target, weights_only=True)["read"] == 3
    pooled(made("plain"), images(*SIZES), link)
    assert not target.exists()
