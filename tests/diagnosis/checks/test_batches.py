"""BN205, BN302 and BN303: what batches are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.checks import batches
from batchnorm.diagnosis.subject import subject_of_model
from diagnosis.observed import batches_of, draw, found, observe, subject

N = 64


def mlp(norm: Any = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Linear(16, 16), norm(16))


def cnn() -> nn.Module:
    """Maps of 8 x 8, of 4 x 4 and of one position."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
    )


# 1 / n + 1 / (2 n) of n independent values is 10 % at 15.
FEW = {
    2: ({"1", "4"}, {"9"}),
    4: ({"1", "4"}, {"9"}),
    8: ({"1", "4"}, {"9"}),
    16: (set(), set()),
    32: (set(), set()),
    64: (set(), set()),
}


@pytest.mark.parametrize("size", FEW)
def test_few_values(size: int) -> None:
    in_mlp, in_cnn = FEW[size]
    assert found(batches.few_values, mlp(), batches_of(draw(N, 6), size)) == dict.fromkeys(in_mlp, "warning")
    named = found(batches.few_values, cnn(), batches_of(draw(N, 3, 8, 8), size))
    assert named == dict.fromkeys(in_cnn, "warning")


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_noise_is_that_of_normalising_by_batches(size: int) -> None:
    """The mean square of y - z, of values normalised by batches and by the population."""
    x = batches_of(draw(1024, 3, 2, 2) + draw(1024, 3, 1, 1, seed=1), size)  # two of three parts common to a sample
    everything = torch.cat(x).double()
    mean, sd = everything.mean((0, 2, 3), keepdim=True), everything.std((0, 2, 3), keepdim=True)
    off = []
    for batch in x:
        z = (batch.double() - mean) / sd
        y = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), correction=0, keepdim=True)
        off.append((y - z).square().mean())
    expected = float(torch.stack(off).mean())
    given = subject_of_model(norm := nn.BatchNorm2d(3), data=observe(norm, x, recalibrated=False))
    stated = {finding.layer: finding.weight for finding in batches.few_values(given)}
    if expected > 0.12:
        assert stated[""] == pytest.approx(expected, rel=0.2)
    if expected < 0.08:
        assert stated == {}


def test_one_value_is_an_error() -> None:
    assert found(batches.few_values, nn.BatchNorm1d(6), batches_of(draw(8, 6), 1)) == {"": "error"}


def test_a_last_batch_of_one_is_a_warning() -> None:
    """Torch's layer raises there; ours keeps its statistics."""
    assert found(batches.few_values, nn.BatchNorm1d(6), batches_of(draw(65, 6), 32)) == {"": "warning"}
    assert found(batches.few_values, bn.BatchNorm1d(6), batches_of(draw(65, 6), 32)) == {}


def test_ghost_batches_are_what_counts() -> None:
    model = nn.Sequential(bn.BatchNorm1d(6, virtual_batch_size=4))
    (finding,) = batches.few_values(subject(model, batches_of(draw(N, 6), 64)))
    assert finding.message.startswith("4 values a channel in a batch of 4 samples")
    exec(finding.remedy, {"model": model})
    assert found(batches.few_values, model, batches_of(draw(N, 6), 64)) == {}


def test_the_remedy_without_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False))
    (finding,) = batches.few_values(subject(model, batches_of(draw(N, 6), 4)))
    exec(finding.remedy, {"model": model, "bn": bn})
    assert found(batches.few_values, model, batches_of(draw(N, 6), 4)) == {}


@pytest.mark.parametrize(
    "norm",
    [
        bn.freeze(bn.BatchNorm1d(6)),
        bn.BatchNorm1d(6, renorm=bn.Renorm()),
        bn.BatchNorm1d(6, sync=True),
        nn.SyncBatchNorm(6),
    ],
)
def test_layers_that_do_not_normalise_by_this_batch(norm: nn.Module) -> None:
    assert found(batches.few_values, norm, batches_of(draw(N, 6), 4)) == {}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_the_remedy(norm: Any) -> None:
    model, x = mlp(norm), batches_of(draw(N, 6), 4)
    for finding in list(batches.few_values(subject(model, x))):
        exec(finding.remedy, {"model": model, "bn": bn})
    assert found(batches.few_values, model, x) == {}


# Noise beyond the square-root law.


def alike(n: int = N) -> Tensor:
    """Samples of which the positions are nearly the same."""
    return draw(n, 3, 1, 1) + 0.1 * draw(n, 3, 8, 8, seed=1)


def test_noise_beyond_the_law() -> None:
    (finding,) = batches.noisy_statistics(subject(nn.BatchNorm2d(3), batches_of(alike(512), 8)))
    assert (finding.layer, finding.severity) == ("", "info")
    worth = float(finding.message.split()[-1])
    assert worth == pytest.approx(8, rel=0.3)  # 512 values, as good as 8


@pytest.mark.parametrize("size", [2, 8, 32])
def test_the_law_holds_of_independent_values(size: int) -> None:
    for seed in range(5):
        assert found(batches.noisy_statistics, nn.BatchNorm1d(6), batches_of(draw(N, 6, seed=seed), size)) == {}
    assert found(batches.noisy_statistics, nn.BatchNorm2d(3), batches_of(draw(N, 3, 8, 8), size)) == {}


def test_noise_that_does_not_matter() -> None:
    assert found(batches.noisy_statistics, nn.BatchNorm2d(3), batches_of(alike(1024), 256)) == {}


# Batches that are not alike.


def classes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four classes whose means differ by their noise."""
    labels = torch.randint(4, (n,), generator=generator)
    return torch.randn(n, 6, generator=generator) + torch.eye(6)[labels] * 1.5, labels


@pytest.mark.parametrize("size", [8, 16, 32])
def test_sorted_data(size: int) -> None:
    x, labels = classes(256, torch.Generator().manual_seed(0))
    in_order = batches_of(x[labels.argsort()], size)
    (finding,) = batches.batches_not_alike(subject(mlp(), in_order))
    assert finding.severity == "warning"
    assert finding.layer in ("1", "4")
    assert finding.evidence is not None
    assert finding.evidence.rows[0][0] == finding.layer


@pytest.mark.parametrize("size", [2, 8, 32, 64])
def test_shuffled_data(size: int) -> None:
    for seed in range(3):
        x, _ = classes(128, torch.Generator().manual_seed(seed))
        assert found(batches.batches_not_alike, mlp(), batches_of(x, size)) == {}


def test_where_rows_are_no_samples() -> None:
    """Four boxes a sample, all alike: what a batch holds together says nothing about how it was drawn."""
    given = subject(nn.BatchNorm1d(6), batches_of(draw(64, 6).repeat_interleave(4, 0), 16))
    assert given.data is not None
    assert len(list(batches.batches_not_alike(given))) == 1
    given.data.samples = 64
    assert list(batches.batches_not_alike(given)) == []


@pytest.mark.parametrize("size", [1, 64])
def test_batches_that_cannot_be_compared(size: int) -> None:
    x, labels = classes(64, torch.Generator().manual_seed(0))
    assert found(batches.batches_not_alike, mlp(), batches_of(x[labels.argsort()], size)) == {}


def test_without_data_nothing_is_said() -> None:
    for check in batches.CHECKS:
        assert list(check.run(subject(mlp()))) == []
