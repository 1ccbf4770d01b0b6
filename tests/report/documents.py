"""A report that has everything a report may have: for tests of how it looks."""

from __future__ import annotations

import math

from batchnorm.report.document import (
    LEVELS,
    Cell,
    Chart,
    Curve,
    Document,
    Histogram,
    Judged,
    Outcome,
    Profile,
    Section,
    Strip,
    Table,
)

VERDICTS: dict[Outcome, str] = {"yes": "supported", "no": "not supported", "open": "inconclusive"}
STEPS = list(range(0, 600, 5))
RATES = [10 ** (exponent / 2) for exponent in range(-8, 3)]


def judged(claim: str, outcome: Outcome, evidence: str) -> Judged:
    criterion = "supported if the whole 95 % interval lies above 0, not supported if it lies below, else inconclusive"
    return Judged(claim, outcome, VERDICTS[outcome], criterion, evidence, "0.401 (0.306 to 0.405, 10 seeds)")


def learning(label: str, speed: float) -> Curve:
    middle = [100 - 90 * math.exp(-step / speed) for step in STEPS]
    return Curve(label, STEPS, middle, [value - 3 for value in middle], [min(100, value + 3) for value in middle])


def over_rates(label: str, best: float) -> Curve:
    middle = [max(0.1, 1 - abs(math.log10(rate / best)) / 3) for rate in RATES]
    return Curve(label, RATES, [*middle[:-1], None], [value * 0.9 for value in middle], middle)


TRAINING = Chart(
    title="Test accuracy at each step",
    description="Test accuracy in per cent over 600 steps: batch norm ends at 99, plain at 97.",
    x_label="step",
    y_label="test accuracy, %",
    curves=[learning("batch norm", 60), learning("plain", 180)],
    mark=95,
)
NETWORKS = ("before", "after", "noisy batch norm", "plain", "with dropout", "both")
GRID = Chart(
    title="Final accuracy over learning rates of five orders of magnitude",
    description="Each of six networks is best at another learning rate, from 0.001 to 1.",
    x_label="learning rate",
    y_label="share of images right",
    curves=[over_rates(label, 10 ** (i / 2 - 2.5)) for i, label in enumerate(NETWORKS)],
    log_x=True,
    log_y=True,
)
MODES = ("batch statistics", "running average", "pooled", "exact")
POINTS = Chart(
    title="Accuracy on single images",
    description="Batch statistics: 10 %. Running average, pooled and exact: 97 to 98 %, in both networks.",
    x_label="what inference normalises by",
    y_label="accuracy, %",
    curves=[
        Curve(label, [0, 1, 2, 3], middle, [v - 2 for v in middle], [v + 2 for v in middle], points=True)
        for label, middle in (("perceptron", [10.0, 97, 97.5, 98]), ("residual net", [12.0, 98, 98.5, 98.7]))
    ],
    names=list(enumerate(MODES)),
)
LAW = Chart(
    title="Noise of the batch mean",
    description="The measured spread falls from 0.7 at 2 images to 0.06 at 256, along sigma / sqrt(m).",
    x_label="images in a batch",
    y_label="standard deviations",
    curves=[
        Curve("measured", [2**i for i in range(1, 9)], [2 ** (-i / 2) * 1.03 for i in range(1, 9)], points=True),
        Curve("sigma / sqrt(m)", [2**i for i in range(1, 9)], [2 ** (-i / 2) for i in range(1, 9)]),
    ],
    log_x=True,
    log_y=True,
)
STRIP = Strip(
    "Forty layers, each as high as it is off",
    [Cell(f"layer {i}: {i / 8}", None if i == 39 else i % LEVELS, f"profile-{i % 3}") for i in range(40)],
    ["below 0.1", "0.1 to 0.3", "0.3 to 1", "1 to 3", "3 and more"],
)
LEVELS_OF_BINS = [4, 4, 3, 2, 1, 0, 0, 0, 1, 2, 3, 4, 4]
HISTOGRAM = Histogram(
    "Shift",
    "150 channels from -3 to 3",
    [1, 3, 6, 10, 15, 25, 30, 25, 15, 10, 6, 3, 1],
    LEVELS_OF_BINS,
    [(3.0, "-1"), (6.5, "0"), (10.0, "1")],
)
PROFILES = [Profile(f"profile-{i}", f"layer {i}", "64 channels", [HISTOGRAM, HISTOGRAM]) for i in range(3)]
NARROW = Table("Ten seeds each", ("network", "steps"), [("batch norm", "85"), ("plain", "210")])
WIDE = Table(
    "Accuracy in % of 360 test images, mean and 95 % interval of ten seeds, at eleven learning rates",
    ("network", *(f"{rate:.2g}" for rate in RATES)),
    [(label, *(f"{90 + i:.1f} (88.1-97.9)" for _ in RATES)) for i, label in enumerate(NETWORKS)],
)
ARTICLE = (
    "The article says that a network with batch normalization needs fewer training steps, since no layer has to follow "
    "the shifts of those before it. Ten pairs of networks were trained from the same weights, on the same batches. "
    "With every seed the batch-normalised one reached the target earlier: after a median of 85 steps instead of 210."
)
NOTES = (
    "Data: scikit-learn's handwritten digits, 8 by 8 pixels, 1,437 to train and 360 to test, cut at random in equal "
    "shares of each digit. The same writers may be in both.",
    "Both of a pair start from the same linear weights and see the same batches of 32 in the same order.",
    "Not measured: time. A step with batch normalization costs more.",
)
CODE = """\
import torch
import batchnorm as bn

layer = bn.BatchNorm1d(64)
print(bn.Moments.of(layer(torch.randn(32, 64))).mean.abs().max())  # a comment that is long enough to leave a phone
"""


def rich(statements: int = 34) -> Document:
    """Eleven sections with as many statements as told, which a summary has to hold on one screen."""
    titles = (
        "Before or after the activation?",
        "What do the equations do to a real batch?",
        "How noisy are the statistics of a small batch?",
        "What should inference normalise by?",
        "Do updates shift the inputs of every layer?",
        "Do inputs on different scales slow training?",
        "Does batch normalization need fewer steps?",
        "Does it bear larger learning rates?",
        "Does it make dropout redundant?",
        "Is covariate shift the reason?",
    )
    outcomes: tuple[Outcome, ...] = ("yes", "yes", "no", "yes", "open")
    sections = [
        Section(
            key=f"part-{i}",
            title=title,
            summary=[ARTICLE, "A claim that fails on these data is reported as failing."],
            judged=[
                judged(
                    f"{title.removesuffix('?')}: the claim in a line, number {j + 1}",
                    outcomes[(3 * i + j) % len(outcomes)],
                    "97.24 % by its own, 96.81 % by the running average",
                )
                for j in range(statements * (i + 1) // len(titles) - statements * i // len(titles))
            ],
            tables=[NARROW, WIDE] if i % 2 else [NARROW],
            charts=[[TRAINING, GRID], [POINTS], [LAW, TRAINING, GRID]][i % 3],
            notes=NOTES,
            strips=[STRIP] if i == 0 else [],
            profiles=PROFILES if i == 0 else [],
            code=CODE if i % 2 else "batchnorm study --data digits.npz --out report",
        )
        for i, title in enumerate(titles)
    ]
    return Document(
        title="What batch normalization does, on this machine, with these data",
        introduction="The statements of an article on batch normalization, examined on scikit-learn's digits: 1,437 "
        "images to train and 360 to test, 10 classes. Each became an experiment with a criterion that was fixed before "
        "its numbers were known; the verdicts below are computed from those numbers alone.",
        sections=[*sections, Section("plain-one", "What else is there to see?", ["A section without statements."])],
        command="batchnorm study --out study-report",
        facts=[("started", "2026-01-01T00:00:00Z"), ("kernels", "native (avx2)"), ("torch", "2.13.0")],
    )
