"""The pictures are what their numbers say, and the numbers are measured as they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pictures
import small_batches
from batchnorm.study.dataset import Data, digits

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = 32  # images: two steps an epoch


@pytest.fixture(scope="module")
def few() -> Data:
    data = digits()
    train, test = (type(p)(p.indices[:FEW], p.inputs[:FEW], p.labels[:FEW]) for p in (data.train, data.test))
    return replace(data, train=train, test=test)


def test_the_pictures_are_those_of_the_numbers() -> None:
    """After a change of numbers or of what draws: python benchmarks/pictures.py."""
    drawn = pictures.drawn()
    assert drawn.keys() == {path.name for path in pictures.PICTURES.glob("*.svg")}
    for name, text in drawn.items():
        assert (pictures.PICTURES / name).read_text() == text, f"{name} is out of date"
        assert len(text) < 60_000
        assert re.search("<title>.+</title><desc>.+</desc>", text)


def test_a_page_shows_each_with_words_for_those_who_cannot_see_it() -> None:
    pages = "\n".join(path.read_text() for path in pictures.DOCS.glob("*.md"))
    shown = {name: words for words, name in re.findall(r"!\[([^]]*)\]\(pictures/(\w+\.svg)\)", pages)}
    assert {path.name for path in pictures.PICTURES.glob("*.svg")} <= shown.keys()
    assert all(len(words) > 50 for words in shown.values())


PAGE = """
### float32, fresh outputs

| shape | layout | forward, ms | x torch | both, ms | x torch | x compile | x jax | x tensorflow | floor | inference |
|---|---|---|---|---|---|---|---|---|---|---|
| (10, 50) | channels first | 1.0 | 9.00 | 2.0 | 6.00 | 4.00 | 3.00 | 12.00 | 0.29 | 10.596 |
| (1, 1, 1000, 1000) | channels last | 1.0 | 9.00 | 2.0 | 1.50 | 3.00 |  |  | 0.29 | 10.596 |

- the end
"""


def test_speeds_are_read_from_the_table_and_related_to_torch() -> None:
    ours, *others = pictures.speed(PAGE).curves
    assert (ours.x, ours.middle) == ([0.002, 4.0], [6.0, 1.5])
    speeds = {curve.label: list(zip(curve.x, curve.middle, strict=True)) for curve in others}
    assert speeds == {
        "torch.compile": [(0.002, 1.5), (4.0, 0.5)],
        "JAX": [(0.002, 2.0)],
        "TensorFlow": [(0.002, 0.5)],
    }


def test_recalibration_is_measured_on_copies(few: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on as if nobody had looked, and the copies' statistics are other ones."""
    monkeypatch.setattr(pictures, "EVERY", 4)
    monkeypatch.setattr(pictures, "SEEDS", 2)
    numbers = pictures.measured_recalibration(few)
    assert numbers["step"] == [4, 8]
    for seed, (running, exact) in enumerate(zip(numbers["running"], numbers["exact"], strict=True)):
        *_, (_, steps, model) = small_batches.training(few, pictures.BATCH_SIZE, seed)
        assert steps == 8
        end = small_batches.score(model, few.test.inputs, few.test.labels)[0]
        assert running[-1] == round(end, 2)
        assert running != exact
    chart = pictures.recalibration(numbers)
    assert chart.curves[1].middle[0] == pytest.approx(sum(values[0] for values in numbers["exact"]) / 2)


def test_the_gap_is_that_of_a_check(few: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHECKED", 3)
    numbers = pictures.measured_gap(few)
    assert [name for name, *_ in numbers["layers"]] == ["1", "3.bn1", "3.bn2", "4.bn1", "4.bn2", "5.bn1", "5.bn2"]
    model = next(model for step, _, model in small_batches.training(few, pictures.BATCH_SIZE, 0) if step == 3)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model.eval()(few.train.inputs), few.train.labels)
    assert numbers["loss"]["running"] == pytest.approx(loss.item(), abs=1e-3)
    chart = pictures.gap(numbers)
    largest = max(numbers["layers"], key=lambda entry: entry[1])
    assert f"layer {largest[0]} closes {100 * largest[1]:.0f} %" in chart.description


def test_everything_is_written_anew(few: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"EVERY": 4, "SEEDS": 2, "CHECKED": 3, "PICTURES": tmp_path, "digits": lambda: few}.items():
        monkeypatch.setattr(pictures, name, value)
    pictures.main(["--measure"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "recalibration.json",
        "recalibration.svg",
        "gap.json",
        "gap.svg",
        "speed.svg",
    }
