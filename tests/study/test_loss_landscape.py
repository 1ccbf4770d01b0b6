"""Loss and gradient along a step, on losses of which both are known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchnorm.study.loss_landscape import disturbance, measure_along_step
from support import tolerances


def quadratic(curvatures: list[float], start: list[float]) -> tuple[list[nn.Parameter], Tensor]:
    # In two parameters, so that lengths are of all of them together.
    parameters = [nn.Parameter(torch.tensor([w], dtype=torch.float64)) for w in start]
    return parameters, torch.tensor(curvatures, dtype=torch.float64)


def test_along_a_quadratic_bowl() -> None:
    """L = sum a w^2 / 2: g = a w, and at w - eta g the gradient is a (1 - eta a) w."""
    a, w = np.array([2.0, 0.5]), np.array([3.0, -4.0])
    parameters, curvatures = quadratic(a.tolist(), w.tolist())
    rates = (0.1, 0.4, 1.5)
    found = measure_along_step(parameters, lambda: (curvatures * torch.cat(list(parameters)) ** 2).sum() / 2, rates)
    losses = [np.sum(a * w**2) / 2, *(np.sum(a * ((1 - r * a) * w) ** 2) / 2 for r in rates)]
    changes = [np.linalg.norm(r * a * a * w) for r in rates]
    assert found.loss_range == pytest.approx(max(losses) - min(losses))
    assert found.gradient_change == pytest.approx(max(changes))
    # In a bowl the ratio is the same at all distances: |a a w| / |a w|.
    assert found.smoothness == pytest.approx(np.linalg.norm(a * a * w) / np.linalg.norm(a * w))
    assert [parameter.item() for parameter in parameters] == w.tolist()


def test_along_a_quartic_the_largest_ratio_counts() -> None:
    """L = w^4: the gradient is 4 w^3, and falls fastest in the first step."""
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    found = measure_along_step([parameter], lambda: (parameter**4).sum(), (0.05, 0.1))
    ratios = [abs(4 * (1 - 4 * r) ** 3 - 4) / (4 * r) for r in (0.05, 0.1)]
    assert found.smoothness == pytest.approx(max(ratios))
    assert ratios[0] > ratios[1]


def test_what_has_no_bound_is_bounded() -> None:
    parameter = nn.Parameter(torch.tensor([50.0]))
    found = measure_along_step([parameter], lambda: torch.exp(parameter**2).sum(), (0.1,))
    assert (found.loss_range, found.gradient_change) == (1e6, 1e6)
    flat = measure_along_step([parameter], lambda: (0 * parameter).sum(), (0.1,))
    assert (flat.loss_range, flat.gradient_change, flat.smoothness) == (1e-6, 1e-6, 1e-6)


def test_disturbance_is_what_the_definition_says() -> None:
    """Each layer's gradient computed in a copy of the network in which the layers below have stepped by hand."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    )
    x, y = torch.randn(16, 4), torch.randint(3, (16,))

    def gradients_of(model: nn.Module) -> list[Tensor]:
        loss = nn.functional.cross_entropy(model(x), y)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    before = gradients_of(network)
    names = [name for name, _ in network.named_parameters()]
    values = []
    for layer in ("3.weight", "6.weight"):
        moved = copy.deepcopy(network)
        with torch.no_grad():
            for name, parameter, gradient in zip(names, moved.parameters(), before, strict=True):
                if int(name.split(".")[0]) < int(layer.split(".")[0]):
                    parameter -= 0.7 * gradient
        i = names.index(layer)
        a, b = before[i].double().numpy().ravel(), gradients_of(moved)[i].double().numpy().ravel()
        values.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    start = [parameter.detach().clone() for parameter in network.parameters()]
    found = disturbance(network, lambda: nn.functional.cross_entropy(network(x), y), 0.7)
    assert found == pytest.approx(np.mean(values), rel=tolerances.STUDY)
    assert found > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(start, network.parameters(), strict=True))


def test_without_a_step_nothing_is_disturbed() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    assert disturbance(network, lambda: network(x).square().mean(), 0.0) == pytest.approx(
        0, abs=tolerances.STUDY_DOUBLE
    )


def test_a_gradient_of_zero_or_none_has_no_direction() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    x = torch.randn(8, 2)
    assert disturbance(network, lambda: 0 * network(x).sum(), 0.1) == 1
    assert disturbance(network, lambda: network(x).sum() * float("nan"), 0.1) == 1


def test_parameters_come_back_after_an_error() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    calls = []

    def fails() -> Tensor:
        calls.append(parameter.item())
        if len(calls) > 1:
            raise ZeroDivisionError
        return (parameter**2).sum()

    with pytest.raises(ZeroDivisionError):
        measure_along_step([parameter], fails, (0.25,))
    assert calls == [1.0, 0.5]
    assert parameter.item() == 1.0
