"""The gradients of one training pass, which leaves no trace."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.diagnosis.gradients import training_gradients
from batchnorm.diagnosis.subject import subject_of_model
from diagnosis.networks import healthy, labelled
from support.comparison import close


def test_they_are_autograds() -> None:
    model, (x, y) = healthy(), labelled()[0]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[8].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    gradients = training_gradients(subject_of_model(model, loss=F.cross_entropy), (x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[1].weight.grad is None
    assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()
    for name, gradient in gradients.items():
        close(gradient, model.get_parameter(name).grad)


def test_nothing_reaches_what_is_detached() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(self.norm(x).detach())
            return y

    batch = (torch.randn(8, 3), torch.randint(2, (8,)))
    model = Detached()
    gradients = training_gradients(subject_of_model(model, loss=F.cross_entropy), batch)
    assert gradients["norm.weight"] is None
    assert gradients["out.weight"] is not None
    without = subject_of_model(model, loss=lambda output, target: F.cross_entropy(output.detach(), target))
    assert set(training_gradients(without, batch).values()) == {None}


def test_a_batch_of_one_value_has_none() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert (
        training_gradients(subject_of_model(model, loss=F.cross_entropy), (torch.randn(1, 3), torch.tensor([1]))) == {}
    )
