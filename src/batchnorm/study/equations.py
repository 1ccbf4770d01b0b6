"""What the layer computes, equation by equation, on real mini-batches (M2 to M5).

A first layer `z = W a` of drawn weights meets every mini-batch of an epoch, and what the layer returns is compared with
the equations as the article writes them, done in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.report.document import Chart, Curve, Table
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Measured
from batchnorm.study.networks import Layers
from batchnorm.study.training import batches
from batchnorm.study.verdict import Claim, Margin, Quantity, Verdict

_EPS = 1e-5  # the layers' default
_ROUNDING = 2.0**-24  # the largest relative error of rounding to float32
_EXACT = 1e-16  # an error of 0 counts as this: 16 digits agree

# float32 carries 7.2 decimal digits; five leave room for the roundings of any order of operations, and for no mistake
# in a formula: eps in another place, or m - 1 for m, would leave two or three.
WRITTEN = Claim(
    "equations",
    "M2",
    "A layer's output is what the equations give, channel by channel",
    Quantity("largest error", form=".1e"),
    Margin("decimal digits in which the worst value agrees with float64", 5.0, "digits"),
    counted="mini-batches",
)
# Not more than three: with eps under the root the standard deviation is sqrt(var / (var + eps)), a little below 1.
STANDARD = Claim(
    "mean-0-std-1",
    "M3",
    "A normalised channel has mean 0 and standard deviation 1",
    Quantity("largest deviation", form=".1e"),
    Margin("decimal digits in which the worst channel agrees with 0 and 1", 3.0, "digits"),
    counted="mini-batches",
)
# The bound is `allowance` below: what rounding z + b to float32, once, can do to the output.
BIAS = Claim(
    "bias",
    "M4",
    "A bias before the layer is neutralised",
    Quantity("largest change", "% of what rounding allows", ".0f", 100),
    Margin("unused share of what rounding z + b allows the output to change, in the worst channel", 0.0),
    counted="mini-batches",
)
TUNED = Claim(
    "gamma-beta",
    "M5",
    "beta is the mean of the output, and gamma scales its spread",
    Quantity("largest error", form=".1e"),
    Margin("decimal digits in which the worst channel agrees with beta and gamma", 5.0, "digits"),
    counted="mini-batches",
)


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    seeds: int  # how many layers are drawn
    features: int = 64  # outputs of each
    batch_size: int = 32  # samples in a mini-batch
    shown: int = 6  # channels of the first mini-batch that the report shows, and samples


def run(setting: Setting, plan: Plan, seed: int) -> dict[str, Any]:
    """Every mini-batch of one epoch through one layer; of the first layer, the first mini-batch in full."""
    generator = torch.Generator().manual_seed(seed)
    z = preactivations(setting, plan.features, generator)
    bias = torch.randn(plan.features, generator=generator)
    gamma = 0.5 + 1.5 * torch.rand(plan.features, generator=generator)
    beta = torch.randn(plan.features, generator=generator)
    order = batches(len(z), plan.batch_size, generator)
    parts = [z[next(order)] for _ in range(len(z) // plan.batch_size)]
    errors = [compare(setting.layers, part, bias, gamma, beta) for part in parts]
    result: dict[str, Any] = {"batches": len(parts), **{name: max(e[name] for e in errors) for name in errors[0]}}
    if seed == 0:
        result["example"] = _example(setting.layers, parts[0], gamma, beta, plan.shown)
    return result


def preactivations(setting: Setting, features: int, generator: torch.Generator) -> Tensor:
    """`z = W a` of the whole training part: (N, features), from a first layer with drawn weights."""
    network = setting.perceptron((features,), "before", generator)
    with torch.no_grad():
        flat: Tensor = network[0](setting.data.train.inputs)
        z: Tensor = network[1](flat)
    return z


def compare(layers: Layers, z: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> dict[str, float]:
    """The largest errors of the layers' results on one mini-batch.

    Args:
        layers: whose layers.
        z: (m, C), float32.
        bias: (C,) to add before the layer.
        gamma: (C,) positive scales.
        beta: (C,) shifts.

    Returns:
        equation: of the output, |y - equations| / (1 + |equations|).
        mean: of a channel's mean after normalisation, from 0.
        std: of a channel's standard deviation after normalisation, from 1.
        tuned: of a channel's mean from beta, relative to 1 + |beta|, and of its standard deviation from gamma times the
            normalised one, relative.
        bias: how much b changes the output, relative to `allowance`.
        gradient: of b, relative to the sum of the magnitudes that it is the sum of.
    """
    plain = layers.norm(z.shape[1], affine=False)
    tuned = _tuned(layers, gamma, beta)
    with torch.no_grad():
        normalised, output = plain(z).double(), tuned(z).double()
        shifted = plain(z + bias).double()
    expected = _equations(z, gamma, beta)["output"]
    std = normalised.std(0, correction=0)
    biased = (z + bias).requires_grad_()
    (gradient,) = torch.autograd.grad(plain(biased).pow(3).sum(), biased)
    return {
        "equation": float(((output - expected).abs() / (1 + expected.abs())).max()),
        "mean": float(normalised.mean(0).abs().max()),
        "std": float((std - 1).abs().max()),
        "tuned": max(
            float(((output.mean(0) - beta).abs() / (1 + beta.abs())).max()),
            float((output.std(0, correction=0) / (gamma * std) - 1).abs().max()),
        ),
        "bias": float(((shifted - normalised).abs().amax(0) / allowance(z, bias)).max()),
        "gradient": float((gradient.sum(0).abs() / gradient.abs().sum(0).clamp_min(1e-30)).max()),
    }


def allowance(z: Tensor, bias: Tensor) -> Tensor:
    """How much a bias may change a normalised channel, (C,): through rounding alone.

    Each z + b is rounded, by at most r = 2^-24 max|z + b|, and the mean with it: 2 r / sigma. The standard deviation
    changes by at most r, hence the output by |z_hat| r / sigma. To this comes that two results are rounded to float32,
    each of them after the multiplication, the addition, and at the end: 6 2^-24 (|z_hat| + max|z + b| / sigma).
    """
    sigma = torch.sqrt(z.double().var(0, correction=0) + _EPS)
    z_hat = ((z.double() - z.double().mean(0)) / sigma).abs().amax(0)
    relative = (z + bias).double().abs().amax(0) / sigma
    return _ROUNDING * (relative * (2 + z_hat) + 6 * (z_hat + relative))


def _tuned(layers: Layers, gamma: Tensor, beta: Tensor) -> nn.Module:
    layer = layers.norm(len(gamma))
    layer.load_state_dict({"weight": gamma, "bias": beta}, strict=False)
    return layer


def _equations(z: Tensor, gamma: Tensor, beta: Tensor) -> dict[str, Tensor]:
    """The article's equations, one after the other, in float64."""
    z = z.double()
    mu = z.sum(0) / len(z)
    centred = z - mu
    variance = (centred**2).sum(0) / len(z) + _EPS
    scaled = centred / torch.sqrt(variance)
    return {
        "mean": mu,
        "std": torch.sqrt(variance),
        "z": z,
        "centred": centred,
        "scaled": scaled,
        "output": gamma * scaled + beta,
    }


def _example(layers: Layers, z: Tensor, gamma: Tensor, beta: Tensor, shown: int) -> dict[str, Any]:
    """One mini-batch step by step; what the layer returned stands beside it."""
    values = _equations(z, gamma, beta)
    of_channels = {"mean": values.pop("mean"), "std": values.pop("std"), "gamma": gamma, "beta": beta}
    with torch.no_grad():
        values["layer"] = _tuned(layers, gamma, beta)(z).double()
    return {
        "values": {name: value[:shown, 0].tolist() for name, value in values.items()},
        **{name: value[:shown].tolist() for name, value in of_channels.items()},
        "channels": {
            name: {
                "mean": values[name].mean(0)[:shown].tolist(),
                "std": values[name].std(0, correction=0)[:shown].tolist(),
            }
            for name in ("z", "scaled", "layer")
        },
    }


def agreeing_digits(error: float) -> float:
    """How many decimal digits agree: -log10 of the error."""
    return -math.log10(max(error, _EXACT))


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """The worst of all mini-batches decides: of an equation there are no exceptions."""
    worst = {
        name: max(result[name] for result in results.values())
        for name in ("equation", "mean", "std", "tuned", "bias", "gradient")
    }
    count = sum(result["batches"] for result in results.values())
    findings = [
        claim.judge(Measured.exact(agreeing_digits(error), count), {"": [error]})
        for claim, error in (
            (WRITTEN, worst["equation"]),
            (STANDARD, max(worst["mean"], worst["std"])),
            (TUNED, worst["tuned"]),
        )
    ]
    findings.insert(2, BIAS.judge(Measured.exact(1 - worst["bias"], count), {"": [worst["bias"]]}))
    example = next(result["example"] for result in results.values() if "example" in result)
    holds = sum(finding.verdict is Verdict.SUPPORTED for finding in findings)
    return Conclusion(
        numbers={"batches": count, "worst": worst, "example": example},
        findings=findings,
        summary=[
            "The article normalises each channel of a mini-batch by the mini-batch's own mean and variance, "
            "then scales by gamma and shifts by beta; the mean takes away any constant that was added before.",
            f"{count:,} mini-batches of {plan.batch_size} went through {plan.seeds} layers z = W a with weights drawn "
            f"at random, {plan.features} channels each. {holds} of the {len(findings)} statements held in all of them.",
            f"The output differed from the equations by {worst['equation']:.1e} at most. After normalisation no "
            f"channel's mean was further from 0 than {worst['mean']:.1e}, no standard deviation further from 1 than "
            f"{worst['std']:.1e}.",
            f"A bias b changed the output by {100 * worst['bias']:.0f} % of what rounding z + b to float32 allows, at "
            f"most, and its own gradient was {worst['gradient']:.1e} of the magnitudes that it is the sum of, at most. "
            "In exact arithmetic both are 0.",
        ],
        tables=[
            Table(
                f"Step by step: one channel of a mini-batch, mean {example['mean'][0]:.4f}, sqrt(variance + eps) "
                f"{example['std'][0]:.4f}, gamma {example['gamma'][0]:.4f}, beta {example['beta'][0]:.4f}",
                ["Sample", "z", "z - mean", "z_hat", "gamma z_hat + beta", "The layer's output"],
                [
                    [str(i), *(f"{value:.4f}" for value in sample)]
                    for i, sample in enumerate(zip(*example["values"].values(), strict=True), 1)
                ],
            ),
            Table(
                "The same mini-batch, channel by channel: mean and standard deviation",
                ["Channel", "z", "z_hat", "Output", "beta and gamma"],
                [
                    [
                        str(i + 1),
                        *(_mean_and_std(channels, i) for channels in example["channels"].values()),
                        f"{beta:.3f}, {gamma:.3f}",
                    ]
                    for i, (beta, gamma) in enumerate(zip(example["beta"], example["gamma"], strict=True))
                ],
            ),
        ],
        charts=[_chart(example["channels"])],
        notes=[
            "The standard deviation after normalisation is sqrt(var / (var + eps)) with eps = 1e-5: below 1, by the "
            "more the smaller the channel's variance.",
            "The variance is the biased one: the sum of squares is divided by the size of the mini-batch.",
        ],
    )


def _mean_and_std(channels: dict[str, list[float]], i: int) -> str:
    return f"{round(channels['mean'][i], 3) + 0.0:.3f} ± {channels['std'][i]:.3f}"  # no -0.000


def _chart(channels: dict[str, dict[str, list[float]]]) -> Chart:
    curves = []
    for offset, (name, label) in enumerate((("z", "z"), ("scaled", "normalised"), ("layer", "gamma and beta")), -1):
        means, stds = channels[name]["mean"], channels[name]["std"]
        x = [i + 0.15 * offset for i in range(1, len(means) + 1)]
        low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
        curves.append(Curve(label, x, means, low, high, points=True))
    return Chart(
        title="Channels of one mini-batch, before and after",
        description="For each channel its mean, with one standard deviation up and down: spread over many places as "
        "they come, at 0 and one wide after normalisation, at beta and gamma wide at the end.",
        x_label="channel",
        y_label="mean ± standard deviation",
        curves=curves,
        names=[(i, str(i)) for i in range(1, len(channels["z"]["mean"]) + 1)],
    )


CODE = """\
import torch
import batchnorm as bn
from batchnorm.study.dataset import digits

a = digits().train.inputs[:32].flatten(1)
z = a @ torch.randn(64, 3) / 8
z_hat = (z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5)
layer = bn.BatchNorm1d(3)
print((layer(z) - z_hat).abs().max())
print(layer(z).mean(0), layer(z).std(0, correction=0))
print((layer(z + 5) - layer(z)).abs().max())
"""

EXPERIMENT = Experiment(
    name="equations",
    title="What does the layer compute?",
    claims=(WRITTEN, STANDARD, BIAS, TUNED),
    full=Plan(seeds=10),
    quick=Plan(seeds=2),
    grid=lambda plan: Grid(plan.seeds),
    run=run,
    conclude=conclude,
    seconds=lambda plan: 0.1,
    code=CODE,
)
