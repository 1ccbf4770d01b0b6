"""BN401 to BN404: where each fires, and where it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.observation import Input, Observation, ObservedLayer
from batchnorm.diagnosis.subject import subject_of_model, subject_of_state_dict
from diagnosis.checking import draw, found, remedied, severities
from support.networks import Block, Calls

CODES = ("BN401", "BN402", "BN403", "BN404")
NORMS = [nn.BatchNorm2d, bn.BatchNorm2d, bn.BatchNorm, nn.SyncBatchNorm]


@pytest.fixture(params=NORMS, ids=lambda cls: f"{cls.__module__.split('.')[0]}.{cls.__name__}")
def norm(request: pytest.FixtureRequest) -> Any:
    return request.param


def network(norm: Any = nn.BatchNorm2d, blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(nn.Sequential(nn.Conv2d(4 if i else 3, 4, 3, padding=1, bias=False), norm(4), nn.ReLU()))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2))


X = draw(6, 3, 4, 4)


def sgd(model: nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def gradients(model: nn.Module, x: Tensor = X) -> dict[str, Tensor | None]:
    """Those of one training pass."""
    model.zero_grad()
    F.cross_entropy(model.train()(x), torch.arange(len(x)) % 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_usual_optimizer_gives_nothing(norm: Any) -> None:
    model = network(norm)
    for optimizer in (sgd(model), torch.optim.AdamW(model.parameters(), weight_decay=0.0)):
        for code in CODES:
            assert not found(code, model, optimizer=optimizer, example=X)


def test_without_what_they_need_they_say_nothing() -> None:
    model = network()
    for code in CODES:
        assert not found(code, model)
        assert not found(code, subject_of_state_dict(model.state_dict()))
        assert not found(code, nn.Sequential(nn.LazyBatchNorm2d()), optimizer=sgd(network()), example=X)


# BN401


def test_decay_that_reaches_gamma_and_beta(norm: Any) -> None:
    model = network(norm)
    optimizer = sgd(model, weight_decay=1e-4, momentum=0.9)
    findings = found("BN401", model, optimizer=optimizer)
    assert list(findings) == ["0.1", "1.1", "2.1"]
    assert {finding.severity for finding in findings.values()} == {"info"}
    assert findings["0.1"].message.startswith("gamma decays at 0.0001 and beta decays at 0.0001")
    remedied(findings["0.1"], model, optimizer=optimizer)
    assert not found("BN401", model, optimizer=optimizer)
    assert not found("BN402", model, optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    assert optimizer.param_groups[0]["params"] == [*(model[i][0].weight for i in range(3)), *model[4].parameters()]
    optimizer.step()


def test_only_what_learns_decays() -> None:
    model = network(bn.BatchNorm2d)
    model[0][1].weight.requires_grad_(False)
    bn.freeze(model[1])
    findings = found("BN401", model, optimizer=sgd(model, weight_decay=0.1))
    assert list(findings) == ["0.1", "2.1"]
    assert findings["0.1"].message.startswith("beta decays at 0.1")
    assert not found("BN401", network(lambda n: nn.BatchNorm2d(n, affine=False)), optimizer=sgd(model, weight_decay=1))


def test_a_group_for_itself() -> None:
    model = network()
    affine = [p for i in range(3) for p in model[i][1].parameters()]
    weights = [model[i][0].weight for i in range(3)]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": affine}]
    assert not found("BN401", model, optimizer=torch.optim.SGD(groups, lr=0.1))


# BN402


def test_parameters_that_no_group_has(norm: Any) -> None:
    model = network(norm)
    rest = [p for p in model.parameters() if p is not model[1][1].weight]
    optimizer = torch.optim.SGD(rest, lr=0.1)
    finding = found("BN402", model, optimizer=optimizer)["1.1"]
    assert finding.severity == "warning"
    assert finding.message == "gamma require gradients, but are in no parameter group"
    remedied(finding, model, optimizer=optimizer)
    assert not found("BN402", model, optimizer=optimizer)


def test_an_optimizer_of_another_model() -> None:
    findings = found("BN402", network(), optimizer=sgd(network()))
    assert list(findings) == ["0.1", "1.1", "2.1"]
    assert "none of this model's parameters" in findings["0.1"].message


def test_parameters_in_two_groups(norm: Any) -> None:
    model = network(norm)
    optimizer = sgd(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[2][1].bias]})
    finding = found("BN402", model, optimizer=optimizer)["2.1"]
    assert finding.severity == "warning"
    assert "beta are in 2 parameter groups" in finding.message
    remedied(finding, model, optimizer=optimizer)
    assert not found("BN402", model, optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_what_does_not_learn_needs_no_group() -> None:
    model = network(bn.BatchNorm2d)
    bn.freeze(model[0])
    model[1][1].requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    assert not found("BN402", model, optimizer=torch.optim.SGD(rest, lr=0.1))


# BN403


class Detached(nn.Module):
    """A network whose second block is behind a detach."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.inside = network(norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside[1](self.inside[0](x)).detach()
        return self.inside[4](self.inside[3](self.inside[2](x)))


@pytest.mark.parametrize("norm", NORMS[:3])
def test_a_loss_that_does_not_come_back(norm: Any) -> None:
    model = Detached(norm)
    assert severities("BN403", model, gradients=gradients(model)) == {"inside.0.1": "warning", "inside.1.1": "warning"}
    assert "gamma and beta get no gradient" in found("BN403", model, gradients=gradients(model))["inside.0.1"].message
    right = model.inside
    assert not found("BN403", right, gradients=gradients(right))


def test_gradients_of_zero() -> None:
    model = network()
    for parameter in model[4].parameters():
        nn.init.zeros_(parameter)  # nothing comes back through it
    findings = found("BN403", model, gradients=gradients(model))
    assert list(findings) == ["0.1", "1.1", "2.1"]
    assert "gradients of 0" in findings["0.1"].message


def test_residual_blocks_that_begin_with_a_gamma_of_zero() -> None:
    block = Block(3)
    nn.init.zeros_(block.bn2.weight)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(48, 2))
    seen = gradients(model)
    assert not bool(seen["0.bn1.weight"].any())
    assert not found("BN403", model, gradients=seen)


def test_what_does_not_learn_or_is_not_called_gets_none() -> None:
    model = Detached(bn.BatchNorm2d)
    bn.freeze(model.inside[0])
    seen = gradients(model)
    data = Observation(layers={"inside.0.1": ObservedLayer(Input((6, 4, 4, 4), torch.float32, False, 1))})
    assert list(found("BN403", model, gradients=seen)) == ["inside.1.1"]
    assert not found("BN403", model, gradients=seen, data=data)
    model.inside[1][1].requires_grad_(False)
    assert not found("BN403", model, gradients=seen)


# BN404


@pytest.mark.parametrize("norm", NORMS)
def test_a_weight_that_turns_faster(norm: Any) -> None:
    model = network(norm, blocks=4)
    with torch.no_grad():
        model[2][0].weight *= 1e-3
    optimizer = sgd(model)
    finding = found("BN404", model, optimizer=optimizer, example=X)["2.1"]
    assert finding.severity == "info"
    assert "2.0.weight" in finding.message
    assert "times faster" in finding.message
    assert 3e5 < finding.weight < 3e6
    assert finding.evidence is not None
    assert finding.evidence.rows[0][0] == "2.0.weight"
    remedied(finding, model, batches=[X])
    assert not found("BN404", model, optimizer=optimizer, example=X)


def test_what_the_message_says_is_how_far_the_weight_turns() -> None:
    model = network(blocks=4)
    with torch.no_grad():
        model[1][0].weight *= 1e-2
    finding = found("BN404", model, optimizer=sgd(model), example=X)["1.1"]
    angles = []
    before = [model[i][0].weight.detach().clone() for i in range(4)]
    gradients(model)
    torch.optim.SGD(model.parameters(), lr=1e-9).step()
    # The gradient of a weight is as much larger as the weight is smaller: 1 / norm more is the angle of a step.
    for i in range(4):
        moved = 1e-9 * model[i][0].weight.grad.double()
        angles.append(float(moved.norm() / before[i].double().norm()))
    ratio = angles[1] / sorted([angles[0], *angles[2:]])[1]
    assert finding.weight / 10 < ratio < finding.weight * 10
    assert ratio > 1e3


def test_slower_and_by_the_learning_rate_of_its_group() -> None:
    model = network(blocks=4)
    slow = model[1][0].weight
    rest = [p for p in model.parameters() if p is not slow]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": [slow], "lr": 1e-5}], lr=0.1)
    findings = found("BN404", model, optimizer=optimizer, example=X)
    assert list(findings) == ["1.1"]
    assert "times slower" in findings["1.1"].message


def test_weights_whose_scale_counts_are_left_out() -> None:
    x = draw(6, 3)
    shared = nn.Linear(3, 3)
    layers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "n": nn.BatchNorm1d(3), "m": nn.BatchNorm1d(3)}
    forms = {
        "a nonlinearity between": lambda m, x: m.m(m.b(m.n(torch.tanh(m.a(x))))),
        "another reader": lambda m, x: m.m(m.b((h := m.a(x)) + m.n(h))),
        "only one": lambda m, x: m.n(m.a(x)),
    }
    for forward in forms.values():
        model = Calls(forward, **layers)
        with torch.no_grad():
            model.a.weight *= 1e-4
        assert not found("BN404", model, optimizer=sgd(model), example=x)
    twice = nn.Sequential(shared, nn.BatchNorm1d(3), shared, nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    nn.init.constant_(shared.weight, 1e-4)
    assert not found("BN404", twice, optimizer=sgd(twice), example=x)


def test_frozen_layers_and_weights_are_left_out() -> None:
    model = network(bn.BatchNorm2d, blocks=4)
    with torch.no_grad():
        model[2][0].weight *= 1e-3
    optimizer = sgd(model)
    bn.freeze(model[2])
    assert not found("BN404", model, optimizer=optimizer, example=X)
    bn.unfreeze(model[2])
    assert found("BN404", model, optimizer=optimizer, example=X)
    model[2][0].weight.requires_grad_(False)
    assert not found("BN404", model, optimizer=optimizer, example=X)


def test_the_model_is_as_before_and_the_pass_is_counted() -> None:
    model = network().train()
    with torch.no_grad():
        model[2][0].weight *= 1e-3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = Observation(batches=4, passes=1.0)
    subject = subject_of_model(model, optimizer=sgd(model), example=(X, "label"), data=data)
    assert found("BN404", subject)
    assert data.passes == 1.25
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
