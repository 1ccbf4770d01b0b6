"""The experiment, and what it says about hand-made numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from batchnorm.report.document import Section
from batchnorm.study import training
from batchnorm.study.data import digits
from batchnorm.study.speed import WITH, WITHOUT, Plan, Run, Speed, run, section, summarize
from batchnorm.study.training import Curve, first_step

TINY = Plan(seeds=2, steps=12, evaluate_every=5, hidden=(16, 16), learning_rates=(0.1, 0.5))


@pytest.fixture(scope="module")
def tiny() -> Speed:
    return run(TINY, lambda done: None)


def test_the_same_seeds_give_the_same_numbers(tiny: Speed) -> None:
    assert run(TINY, lambda done: None) == tiny


def test_seeds_differ(tiny: Speed) -> None:
    first, second = (r for r in tiny.runs if r.network == WITH and r.learning_rate == 0.1)
    assert first.curve != second.curve


def test_there_is_a_run_of_each_network_rate_and_seed(tiny: Speed) -> None:
    expected = {(network, rate, seed) for network in (WITH, WITHOUT) for rate in (0.1, 0.5) for seed in (0, 1)}
    assert {(r.network, r.learning_rate, r.seed) for r in tiny.runs} == expected
    assert len(tiny.runs) == len(expected)
    for r in tiny.runs:
        assert r.curve.steps == (5, 10, 12)
        assert r.steps_to_target == first_step(r.curve.steps, r.curve.test_accuracy, TINY.target)
        # The last evaluation saw all images at once; a batch of another size may only round otherwise.
        assert abs(r.in_batches - r.curve.test_accuracy[-1]) <= 1 / 360


def test_inference_is_really_run_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network whose classes depend on how many images it sees."""
    real = training.predict

    def predict(network: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
        classes = real(network, images, batch_size)
        return {1: torch.full_like(classes, 3), 32: torch.full_like(classes, 4), None: classes}[batch_size]

    monkeypatch.setattr(training, "predict", predict)
    shares = torch.bincount(digits().test.labels) / 360
    for r in run(replace(TINY, seeds=1), lambda done: None).runs:
        assert (r.one_at_a_time, r.in_batches) == pytest.approx((shares[3].item(), shares[4].item()))
        assert r.different == 360


def test_work_is_what_is_reported() -> None:
    done: list[int] = []
    plan = replace(TINY, seeds=1)
    run(plan, done.append)
    assert sum(done) == plan.work == 1 * 2 * 2 * 12


def test_batch_norm_learns_where_the_plain_network_does_not() -> None:
    """The finding itself, at its smallest: the large rate, one seed, a quarter of the steps."""
    numbers = run(Plan(seeds=1, steps=150, evaluate_every=25, learning_rates=(0.5,)), lambda done: None)
    accuracy = {cell.network: cell.accuracy_mean for cell in numbers.cells}
    assert accuracy[WITH] > 0.85
    assert accuracy[WITHOUT] < 0.5


def made(network: str, rate: float, seed: int, steps: int | None, final: float = 0.97, different: int = 0) -> Run:
    """A run of four evaluations that reaches the target at `steps`."""
    accuracies = (*(0.95 if at == steps else 0.5 for at in (10, 20, 30)), final)
    losses = (2.0, 1.0, None if steps is None else 0.5, None if steps is None else 0.25)
    return Run(network, rate, seed, Curve((10, 20, 30, 40), accuracies, losses), steps, final, final, different)


def numbers_of(runs: Sequence[Run]) -> Speed:
    rates = tuple(sorted({r.learning_rate for r in runs}))
    plan = Plan(seeds=1 + max(r.seed for r in runs), steps=40, evaluate_every=10, learning_rates=rates)
    cells = tuple(summarize(runs, network, rate) for rate in rates for network in (WITH, WITHOUT))
    return Speed(plan, 1437, 360, cells, tuple(runs))


def pairs(ours: Sequence[int | None], plain: Sequence[int | None], rate: float = 0.1) -> list[Run]:
    return [
        made(network, rate, seed, steps)
        for network, all_steps in ((WITH, ours), (WITHOUT, plain))
        for seed, steps in enumerate(all_steps)
    ]


@pytest.mark.parametrize(
    ("steps", "median", "reached"),
    [
        ((10, 20, 30), 20, 3),
        ((30, 10, None), 30, 2),
        ((10, None, None), None, 1),
        ((None, None, None), None, 0),
        ((10, 30), 20, 2),
        ((10, None), None, 1),
        ((10, 20, None, None), None, 2),
    ],
)
def test_a_seed_that_never_got_there_counts_as_slower_than_any(
    steps: tuple[int | None, ...], median: float | None, reached: int
) -> None:
    cell = summarize([made(WITH, 0.1, seed, at) for seed, at in enumerate(steps)], WITH, 0.1)
    assert (cell.median_steps, cell.reached) == (median, reached)


def test_a_cell_sums_up_its_own_runs_and_no_others() -> None:
    runs = [made(WITH, 0.1, 0, 10, 0.9, 2), made(WITH, 0.1, 1, 10, 1.0, 3), made(WITHOUT, 0.1, 0, 10, 0.1, 50)]
    runs += [made(WITH, 0.5, 0, 10, 0.2, 70)]
    cell = summarize(runs, WITH, 0.1)
    assert (cell.accuracy_mean, cell.accuracy_low, cell.accuracy_high) == pytest.approx((0.95, 0.9, 1.0))
    assert (cell.one_at_a_time, cell.in_batches) == pytest.approx((0.95, 0.95))
    assert cell.different == 5


@pytest.mark.parametrize(
    ("ours", "plain", "expected"),
    [
        (
            (10, 10, 20),
            (20, 30, 40),
            "reached 95 % test accuracy after a median of 10 steps, the plain one after a median of 30 steps. "
            "With every seed, the batch-normalised one was earlier.",
        ),
        (
            (20, 30, 40),
            (10, 10, 20),
            "reached 95 % test accuracy after a median of 30 steps, the plain one after a median of 10 steps. "
            "With every seed, the plain one was earlier.",
        ),
        (
            (10, 10, 40),
            (20, 20, 20),
            "reached 95 % test accuracy after a median of 10 steps, the plain one after a median of 20 steps. "
            "The batch-normalised one was earlier with 2 of 3 seeds, the plain one with 1.",
        ),
        (
            (10, 20, 30),
            (None, None, None),
            "reached 95 % test accuracy after a median of 20 steps, the plain one with none of 3 seeds within 40 "
            "steps. With every seed, the batch-normalised one was earlier.",
        ),
        (
            (None, None, None),
            (10, 20, 40),
            "reached 95 % test accuracy with none of 3 seeds within 40 steps, the plain one after a median of 20 "
            "steps. With every seed, the plain one was earlier.",
        ),
        (
            (10, 30, None),
            (None, None, 20),
            "reached 95 % test accuracy after a median of 30 steps (with 2 of 3 seeds within 40), the plain one with "
            "only 1 of 3 seeds within 40 steps. "
            "The batch-normalised one was earlier with 2 of 3 seeds, the plain one with 1.",
        ),
        (
            (None, None, None),
            (None, None, None),
            "reached 95 % test accuracy with none of 3 seeds within 40 steps, the plain one with none of 3 seeds "
            "within 40 steps. Neither was earlier with any seed.",
        ),
        (
            (10, 10, 10),
            (10, 10, 10),
            "reached 95 % test accuracy after a median of 10 steps, the plain one after a median of 10 steps. "
            "Neither was earlier with any seed.",
        ),
    ],
)
def test_the_sentence_on_steps_follows_from_the_numbers(
    ours: tuple[int | None, ...], plain: tuple[int | None, ...], expected: str
) -> None:
    summary = section(numbers_of(pairs(ours, plain))).summary
    assert summary[0] == f"At learning rate 0.1, the network with batch normalization {expected}"


@pytest.mark.parametrize("swapped", [False, True])
def test_the_sentence_on_rates_follows_from_the_numbers(swapped: bool) -> None:
    better, worse = (WITHOUT, WITH) if swapped else (WITH, WITHOUT)
    runs = [made(better, 0.1, 0, 10, 0.96), made(worse, 0.1, 0, 20, 0.95)]
    runs += [made(better, 0.5, 0, 10, 0.975), made(worse, 0.5, 0, None, 0.1)]
    up, down = "from 96.0 % to 97.5 %", "from 95.0 % to 10.0 %"
    ours, plain = (down, up) if swapped else (up, down)
    assert section(numbers_of(runs)).summary[2] == (
        f"From learning rate 0.1 to 0.5, the mean final test accuracy went {ours} with batch normalization, "
        f"and {plain} without."
    )


def test_one_learning_rate_is_not_compared_with_another() -> None:
    assert not any("From learning rate" in sentence for sentence in section(numbers_of(pairs([10], [20]))).summary)


@pytest.mark.parametrize(
    ("ours", "plain", "expected"),
    [
        (0, 0, "changed none of 720 predictions with batch normalization (by its running statistics), and none"),
        (3, 0, "changed 3 of 720 predictions with batch normalization (by its running statistics), and none"),
        (0, 1500, "changed none of 720 predictions with batch normalization (by its running statistics), and 1,500"),
    ],
)
def test_the_sentence_on_inference_follows_from_the_numbers(ours: int, plain: int, expected: str) -> None:
    runs = [made(WITH, 0.1, seed, 10, different=ours * seed) for seed in (0, 1)]
    runs += [made(WITHOUT, 0.1, seed, 10, different=plain * seed) for seed in (0, 1)]
    assert section(numbers_of(runs)).summary[-1] == f"Predicting one image at a time instead of 32 {expected} without."


def test_the_table_holds_the_numbers() -> None:
    runs = pairs([10, 30], [None, 20]) + pairs([10, 20], [None, None], 0.5)
    table = section(numbers_of(runs)).tables[0]
    assert [row[:3] for row in table.rows] == [
        ("batch norm", "0.1", "20 (2/2)"),
        ("plain", "0.1", "> 40 (1/2)"),
        ("batch norm", "0.5", "15 (2/2)"),
        ("plain", "0.5", "never (0/2)"),
    ]
    assert table.rows[0][3:] == ("97.0 (97.0-97.0)", "97.0", "97.0", "0/720")
    assert {len(row) for row in table.rows} == {len(table.columns)}


def content() -> Section:
    runs = [made(WITH, 0.1, 0, 10, 0.9), made(WITH, 0.1, 1, 20, 1.0)]
    return section(numbers_of([*runs, made(WITHOUT, 0.1, 0, 10, 0.8), made(WITHOUT, 0.1, 1, None, 0.6)]))


def test_curves_are_mean_and_range() -> None:
    accuracy, loss = content().charts
    ours, plain = accuracy.curves
    assert (ours.label, plain.label) == (WITH, WITHOUT)
    assert list(ours.x) == [10, 20, 30, 40]
    assert ours.middle[-1] == pytest.approx(95)
    assert (ours.low[-1], ours.high[-1]) == pytest.approx((90, 100))
    assert loss.curves[0].middle == [2.0, 1.0, 0.5, 0.25]


def test_a_curve_has_a_gap_where_one_seed_has_no_number() -> None:
    accuracy, loss = content().charts
    for part in (loss.curves[1].middle, loss.curves[1].low, loss.curves[1].high):
        assert part == [2.0, 1.0, None, None]
    assert "batch norm ends at 0.25, plain ends at no number" in loss.description
    assert "batch norm ends at 95, plain ends at 70" in accuracy.description
