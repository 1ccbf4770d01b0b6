"""A model is as it was, except for the statistics of a transaction that succeeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchnorm.models.modes import set_training
from batchnorm.population.layers import select_layers
from batchnorm.population.transaction import transaction
from support.populations import everything, images, made


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_undoes_everything(error: type[BaseException]) -> None:
    model = made("residual")
    model.register_buffer("none", None)
    before = everything(model)
    with pytest.raises(error):
        change_everything_and_raise(model, error)
    assert everything(model) == before


def change_everything_and_raise(model: Any, error: type[BaseException]) -> None:
    with transaction(model, select_layers(model)[0], {"cpu"}):
        assert not torch.is_grad_enabled()
        for module in model.modules():
            set_training(module, not module.training)
        model(images(3)[0])
        model.bn1.running_mean += 1
        model.bn2.running_var = torch.zeros(6)
        model.bn3.register_buffer("new", torch.zeros(1))
        del model.bn4.num_batches_tracked
        torch.rand(3)
        raise error


def test_a_success_keeps_the_statistics_of_the_layers_that_take_part() -> None:
    model = made("residual")
    taking_part = select_layers(model)[0][:2]
    before = everything(model)
    with transaction(model, taking_part, {"cpu"}):
        for name in ("bn1", "bn3"):
            getattr(model, name).running_mean += 1
            getattr(model, name).num_batches_tracked += 1
    after = everything(model)
    identity, old = before["bn1"][3].pop("running_mean")
    assert after["bn1"][3].pop("running_mean") == (identity, (torch.tensor(old) + 1).tolist())
    assert after == before


def test_what_did_not_change_is_not_written() -> None:
    """A graph that saved a buffer would be told that it is another."""
    model = made("residual")
    versions = [buffer._version for buffer in model.buffers()]
    with transaction(model, select_layers(model)[0], {"cpu"}):
        model.bn1.running_mean += 1
    assert [buffer._version for buffer in model.buffers()] == [versions[0] + 1, *versions[1:]]
