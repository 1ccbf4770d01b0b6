"""Domains in processes that share their statistics: each has its part of what one process computes from all parts."""

from __future__ import annotations

from typing import Any

import domain_sync_scenarios as scenarios
import pytest
import torch

import batchnorm as bn
from support import processes, tolerances
from support.comparison import close

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes found, in all scenarios."""
    folder = tmp_path_factory.mktemp("ranks")
    return processes.run(list(scenarios.SCENARIOS), 2, folder, timeout=150, script=scenarios.__file__)


def alone(name: str, *, frozen: bool = False, **options: Any) -> dict[str, Any]:
    """One process, with all samples."""
    parts = [scenarios.part(name, rank) for rank in range(2)]
    x, dy = (torch.cat([own[key] for own in parts]) for key in ("x", "dy"))
    x.requires_grad_()
    layer = scenarios.layer(sync=False, **options)
    if frozen:
        bn.freeze(layer, statistics=False, affine=False, normalization=True)
    with bn.domain(layer, [number for rank in range(2) for number in scenarios.choice(name, rank)[1]]):
        y = layer(x)
    y.backward(dy)
    gradients = {f"d {key}": parameter.grad for key, parameter in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


def agree(at: Found, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if name in ("y", "dx"):
            close(torch.cat([own[name] for own in at]), value, tolerances.GRADIENT * 4, name=name)
        elif name.startswith("d "):
            parts = [own[name] for own in at if own[name] is not None]
            close(sum(parts), value, tolerances.GRADIENT * 10, name=name)
        else:
            assert torch.equal(at[0][name], at[1][name]), name
            close(at[0][name], value, relative=tolerances.STATISTIC, absolute=tolerances.STATISTIC, name=name)


@pytest.mark.parametrize("name", scenarios.CHOICES)
def test_as_one_process_with_all_samples(found: Found, name: str) -> None:
    at = [own[name] for own in found]
    agree(at, alone(name))
    assert at[0]["num_batches_tracked_c"] == 0  # nobody has samples of it
    assert at[0]["running_mean_c"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shared affine", {"own_affine": False}),
        ("by running", {"frozen": True}),
        ("renorm", {"renorm": bn.Renorm(1.5, 0.5)}),
    ],
)
def test_other_layers(found: Found, name: str, options: dict[str, Any]) -> None:
    agree([own[name] for own in found], alone("mixed", **options))


def test_one_value_together_is_the_same_error_in_all(found: Found) -> None:
    kinds = [own["refused"]["error"] for own in found]
    assert all(kind == "CountError" and "in domain 1" in message for kind, message in kinds)
    assert all(own["refused"]["tracked"] == 0 for own in found)
