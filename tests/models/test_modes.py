"""Training flags are put back, whatever happens, and set without the methods that a model may have replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.models.modes import inference, preserved_modes, set_training


def mixed() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_modes_come_back_after_an_error(error: type[BaseException]) -> None:
    def fails() -> None:
        with preserved_modes(model):
            model.eval()
            model[1].train()
            raise error

    model = mixed()
    with pytest.raises(error):
        fails()
    assert modes(model) == [True, True, False]


def test_inference_records_no_gradients() -> None:
    model = mixed()
    with inference(model):
        assert modes(model) == [False, False, False]
        assert not model(torch.ones(1, 2)).requires_grad
    assert modes(model) == [True, True, False]
    assert model(torch.ones(1, 2)).requires_grad


def test_flags_are_set_without_the_methods() -> None:
    class Counting(nn.Linear):
        calls = 0

        def train(self, mode: bool = True) -> nn.Module:
            Counting.calls += 1
            return super().train(mode)

    module = Counting(1, 1)
    set_training(module, False)
    assert not module.training
    assert Counting.calls == 0
