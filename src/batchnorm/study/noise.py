"""How far a mini-batch's statistics are from the whole set's (M6), and what makes them noisier or less noisy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional import batch_norm
from batchnorm.modules import BatchNorm1d
from batchnorm.moments import Moments
from batchnorm.report.document import Chart, Curve, Table
from batchnorm.study.equations import preactivations
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import interval_curve
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Measured, Paired
from batchnorm.study.networks import Layers
from batchnorm.study.statistics import mean_interval
from batchnorm.study.verdict import Claim, Margin, Quantity, Verdict

_EPS = 1e-5

# A normalised channel is one standard deviation wide; moved by a quarter of that, it is another to what follows.
FAR = Claim(
    "small-batch-is-far",
    "M6",
    "The mean of a mini-batch of 8 is far from the whole's",
    Quantity("distance", "standard deviations", ".3f"),
    Margin("distance of the mini-batch's mean from the whole's, root mean square", 0.25, "standard deviations"),
)
# 0.05 tells 1 / sqrt(m) from its neighbours m^-0.45 and m^-0.55, which over 2 to 256 are a fifth apart.
LAW = Claim(
    "square-root-law",
    "M6",
    "The noise falls with the square root of the batch size",
    Quantity("exponent", form=".3f"),
    Margin("0.05 less the distance of the exponent of the noise's decay from -1/2", 0.0),
)
# One tenth: two rows of the table that differ by less are one level of noise to a reader.
_ALIKE = 0.1
_OUTPUT = Quantity("noise", form=".3f", geometric=True)
_SAME = Margin(f"{_ALIKE} less the relative difference of the two noises in the layer's output", 0.0)
GHOST = Claim(
    "ghost-batches",
    "M6",
    "Ghost batches of 8 make the noise of mini-batches of 8",
    _OUTPUT,
    _SAME,
)
JOINED = Claim(
    "joined-statistics",
    "M6",
    "Mini-batches of 8 with joined statistics have the noise of their union",
    _OUTPUT,
    _SAME,
)


@dataclass(frozen=True)
class Plan:
    """What is drawn."""

    seeds: int  # how many layers
    draws: int = 100  # mini-batches of each size, of each layer
    features: int = 64  # outputs of each layer
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)  # samples in a mini-batch
    small: int = 8  # the size of ghost batches, and of the mini-batches whose statistics are joined
    large: int = 256  # the size of the batch that is made of them
    rounds: int = 40  # large batches of each kind, of each layer


def run(setting: Setting, plan: Plan, seed: int) -> dict[str, Any]:
    """Draw mini-batches of every size without replacement, and compare them with the whole training part.

    Returns:
        mean: of each size, the root mean square distance of a channel's mean from the whole's, in standard deviations.
        std: the same of a channel's standard deviation.
        exponent: of the batch size in `mean`, fitted after the correction for drawing without replacement.
        output: the root mean square difference of the layer's output from that by the whole's statistics, by the kinds
            of batches that `_kinds` has.
    """
    generator = torch.Generator().manual_seed(seed)
    z = preactivations(setting, plan.features, generator)
    whole = Moments.of(z)
    # A channel that is constant has no standard deviation to measure in.
    z = z[:, whole.var() > 0]
    whole = Moments.of(z)
    layer = setting.layers.norm(z.shape[1], affine=False, momentum=1.0)
    mean_noise, std_noise = {}, {}
    for size in plan.sizes:
        drawn = [_statistics(layer, draw(z, size, generator)) for _ in range(plan.draws)]
        means, stds = (torch.stack(part) for part in zip(*drawn, strict=True))
        mean_noise[size] = _rms((means - whole.mean) / whole.std())
        std_noise[size] = _rms(stds / whole.std() - 1)
    kinds = _kinds(setting.layers, z, plan, generator)
    return {
        "samples": len(z),
        "mean": list(mean_noise.values()),
        "std": list(std_noise.values()),
        "exponent": exponent(mean_noise, len(z)),
        "output": {
            kind: _rms(torch.cat([output - _normalise(x, whole) for x, output in pairs]))
            for kind, pairs in kinds.items()
        },
    }


def draw(z: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """So many rows, none of them twice."""
    return z[torch.randperm(len(z), generator=generator)[:size]]


def predicted(size: int, samples: int) -> float:
    """The square-root law for `size` of `samples` drawn without replacement, in standard deviations.

    sqrt((1 / m) (N - m) / (N - 1)).

    Source: Cochran, "Sampling Techniques", 3rd edition, 1977, section 2.5.
    """
    return math.sqrt((samples - size) / (size * (samples - 1)))


def exponent(noise: Mapping[int, float], samples: int) -> float:
    """The slope of the logarithm of the noise against that of the batch size, by least squares.

    The factor sqrt((N - m) / (N - 1)) is taken out first: it is due to the set's end, not to the batch's size.
    """
    sizes = [size for size in noise if size < samples]
    corrected = [noise[size] / (predicted(size, samples) * math.sqrt(size)) for size in sizes]
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(v) for v in corrected]).slope


def _statistics(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer itself takes a mini-batch's mean and standard deviation to be: with momentum 1 it keeps them."""
    layer.train()
    layer(x)
    variance = layer.get_buffer("running_var") * ((len(x) - 1) / len(x))
    return layer.get_buffer("running_mean").double(), variance.double().sqrt()


def _kinds(layers: Layers, z: Tensor, plan: Plan, generator: torch.Generator) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Batches of each kind and what they are normalised to, as many rows of each."""
    plain = layers.norm(z.shape[1], affine=False)

    def large() -> list[Tensor]:
        return [draw(z, plan.large, generator) for _ in range(plan.rounds)]

    small = [draw(z, plan.small, generator) for _ in range(plan.rounds * plan.large // plan.small)]
    return {
        "small": [(x, plain(x)) for x in small],
        "ghost": [(x, _ghost(layers, x, plan.small)) for x in large()],
        "joined": [(x, _joined(x, plan.small)) for x in large()],
        "large": [(x, plain(x)) for x in large()],
    }


def _ghost(layers: Layers, x: Tensor, size: int) -> Tensor:
    """`virtual_batch_size` of our layers; torch.nn has none, so there the batch is split by hand."""
    if issubclass(layers.vectors, BatchNorm1d):
        output: Tensor = BatchNorm1d(x.shape[1], affine=False, virtual_batch_size=size)(x)
        return output
    plain = layers.norm(x.shape[1], affine=False)
    return torch.cat([plain(part) for part in torch.split(x, size)])


def _joined(x: Tensor, size: int) -> Tensor:
    """Each small batch normalised by the moments of all of them together, joined with +."""
    parts = torch.split(x, size)
    joined = sum((Moments.of(part) for part in parts), Moments.empty(x.shape[1]))
    return torch.cat([_normalise(part, joined) for part in parts])


def _normalise(x: Tensor, moments: Moments) -> Tensor:
    return batch_norm(x, moments.mean.to(x.dtype), moments.var().to(x.dtype), eps=_EPS)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Judge the claims over the layers."""
    runs = list(results.values())
    small, last = plan.sizes.index(plan.small), len(plan.sizes) - 1
    output = {kind: [run["output"][kind] for run in runs] for kind in runs[0]["output"]}
    slopes, distances = [run["exponent"] for run in runs], [run["mean"][small] for run in runs]
    findings = [
        FAR.judge(Measured.mean(distances), {"": distances}),
        LAW.judge(Measured.mean([slope + 0.5 for slope in slopes]).equivalent(0.05), {"": slopes}),
        GHOST.judge(
            Paired(output["ghost"], output["small"]).log_ratio().equivalent(_ALIKE),
            {"in ghost batches": output["ghost"], "in mini-batches": output["small"]},
        ),
        JOINED.judge(
            Paired(output["joined"], output["large"]).log_ratio().equivalent(_ALIKE),
            {"joined": output["joined"], "in their union": output["large"]},
        ),
    ]
    far, holds, *_ = (finding.verdict is Verdict.SUPPORTED for finding in findings)
    mean, std = (
        [mean_interval([run[name][i] for run in runs]) for i in range(len(plan.sizes))] for name in ("mean", "std")
    )
    samples = runs[0]["samples"]
    law = [predicted(size, samples) for size in plan.sizes]
    off = [
        f"{mean[i].estimate:.2f} standard deviations off and its standard deviation {100 * std[i].estimate:.0f} % off"
        for i in (small, last)
    ]
    slope = mean_interval(slopes)
    left = {kind: statistics.fmean(values) for kind, values in output.items()}
    by_hand = " torch.nn has no ghost batches: they were made by splitting the batch by hand."
    return Conclusion(
        numbers={"samples": samples, "sizes": list(plan.sizes), "predicted": law, "runs": runs},
        findings=findings,
        summary=[
            "In training each mini-batch is normalised by its own mean and variance. The article warns that with a "
            "small one, of 8 samples, they can be far from the whole set's.",
            f"{plan.draws} mini-batches of each size were drawn from the {samples:,} training samples, for each of "
            f"{len(runs)} first layers. With {plan.small} samples a channel's mean was {off[0]} (root mean squares)"
            f"{', which is far' if far else ''}; with {plan.sizes[-1]} samples it was {off[1]}.",
            f"The noise of the mean falls as the batch size to the power {slope.estimate:.3f} ({slope.low:.3f} to "
            f"{slope.high:.3f}); the square-root law has -0.5, {'and holds' if holds else 'which is not shown'}.",
            f"In the layer's output, mini-batches of {plan.small} leave a noise of {left['small']:.3f}, ghost batches "
            f"of {plan.small} inside {plan.large} {left['ghost']:.3f}. With the moments of {plan.large // plan.small} "
            f"mini-batches added up it is {left['joined']:.3f}, one batch of {plan.large} has {left['large']:.3f}.",
        ],
        tables=[
            Table(
                "Noise of the statistics, in standard deviations of the channel",
                ["Batch size", "Mean", "Predicted", "Standard deviation"],
                [
                    [str(size), f"{mean[i].estimate:.3f}", f"{law[i]:.3f}", f"{std[i].estimate:.3f}"]
                    for i, size in enumerate(plan.sizes)
                ],
            )
        ],
        charts=[
            Chart(
                title="Noise of a mini-batch's statistics",
                description=f"On logarithmic axes the noise of the mean falls from {mean[0].estimate:.2f} at "
                f"{plan.sizes[0]} samples to {mean[-1].estimate:.3f} at {plan.sizes[-1]}, beside the prediction.",
                x_label="batch size",
                y_label="noise (standard deviations)",
                curves=[
                    interval_curve("mean", plan.sizes, mean),
                    interval_curve("standard deviation", plan.sizes, std),
                    Curve("square-root law", plan.sizes, law),
                ],
                log_x=True,
                log_y=True,
            )
        ],
        notes=[
            "Samples are drawn without replacement, as in training; the law is corrected for that: "
            "sqrt((1 / m) (N - m) / (N - 1)).",
            f"Whatever the data, the law has {law[small]:.2f} for {plan.small} samples; that more than "
            f"{FAR.margin.threshold:.2f} is far is a definition.",
            "The statistics are those that the layer itself took: with momentum 1 its running statistics are the last "
            f"mini-batch's.{'' if issubclass(setting.layers.vectors, BatchNorm1d) else by_hand}",
        ],
    )


CODE = """\
import torch
import batchnorm as bn
from batchnorm.study.dataset import digits

z = digits().train.inputs.flatten(1) @ torch.randn(64, 16) / 8
whole = bn.Moments.of(z)
for m in (2, 8, 32, 128):
    batch = bn.Moments.of(z[torch.randperm(len(z))[:m]])
    print(m, ((batch.mean - whole.mean) / whole.std()).square().mean().sqrt())
eights = [bn.Moments.of(part) for part in z[:256].split(8)]
print(sum(eights, bn.Moments.empty(16)).mean - bn.Moments.of(z[:256]).mean)
"""

EXPERIMENT = Experiment(
    name="noise",
    title="How far off are the statistics of a mini-batch?",
    claims=(FAR, LAW, GHOST, JOINED),
    full=Plan(seeds=10),
    quick=Plan(seeds=6, draws=50, rounds=20),
    grid=lambda plan: Grid(plan.seeds),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.draws / 150,
    code=CODE,
)
