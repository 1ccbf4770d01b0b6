"""After an adaptation everything is as before, but for what was to stay; and what goes on beside it."""

from __future__ import annotations

import copy
import pickle
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.population import adapt as module
from support import tolerances
from support.comparison import close
from support.populations import NETS, everything, images, made

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is adapted by")  # most batches here are tiny


class OnPurposeError(Exception):
    """What the tests raise."""


def layer_of() -> Any:
    layer: Any = nn.BatchNorm1d(3)
    layer.running_mean.copy_(torch.tensor([0.0, 2.0, -1.0]))
    return layer.eval()


@pytest.mark.parametrize("error", [None, OnPurposeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_every_bit_is_as_before(net: str, batches: bool, error: type[BaseException] | None) -> None:
    model = made(net)
    list(model.children())[1].eval()
    before, versions = everything(model), [buffer._version for buffer in model.buffers()]

    def use() -> None:
        with bn.adapt(model, images(6, 12) if batches else None):
            for x in images(6, 3):
                model(x)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert everything(model) == before
    assert [buffer._version for buffer in model.buffers()] == versions


def test_an_interrupt_while_it_is_set_up_or_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C waits for the end."""
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = made("residual")
        before = everything(model)
        leave = module.Adapter.leave
        monkeypatch.setattr(module.Adapter, "leave", lambda self: (signal.raise_signal(signal.SIGINT), leave(self)))
        with pytest.raises(KeyboardInterrupt), bn.adapt(model):
            model(images(4)[0])
        assert everything(model) == before
    finally:
        signal.signal(signal.SIGINT, heeded)


@pytest.mark.parametrize("error", [None, OnPurposeError])
def test_keep(error: type[BaseException] | None) -> None:
    model = made("residual")
    buffers = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}

    def use() -> dict[str, Tensor]:
        with bn.adapt(model) as adapted:
            model(images(8)[0])
            adapted.keep()
            kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model(images(8)[0] + 9)
            if error is not None:
                expected.update(kept)
                raise error
        return kept

    expected: dict[str, Tensor] = {}
    if error is None:
        expected = use()
    else:
        with pytest.raises(error):
            use()
    for name, buffer in model.named_buffers():
        assert id(buffer) == buffers[name][0]
        assert torch.equal(buffer, expected[name])
        assert torch.equal(buffer, buffers[name][1]) == ("num_batches" in name)
    assert all(module.training for module in model.modules())


def test_keep_what_batches_gave() -> None:
    one, other = made("residual"), made("residual")
    with bn.adapt(one, images(20, 30), prior=0) as adapted:
        adapted.keep()
    bn.recalibrate(other, images(20, 30))
    for (name, buffer), (_, expected) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_nested() -> None:
    """The inner one begins with what the outer one has come to, and that sees nothing of it."""
    layer = layer_of()
    x = torch.randn(16, 3)
    with bn.adapt(layer, prior=16) as outer:
        layer(x)
        halfway = layer.running_mean.clone()
        with bn.adapt(layer, prior=16) as inner:
            layer(x + 4)
            close(layer.running_mean, (halfway + (x + 4).mean(0)) / 2, tolerances.POPULATION)
        assert torch.equal(layer.running_mean, halfway)
        assert [a.report.layers[0].samples for a in (outer, inner)] == [16, 16]
        layer(x)
        assert outer.report.layers[0].samples == 32
    assert layer.running_mean.tolist() == [0, 2, -1]


def test_copies_stand_still() -> None:
    layer = layer_of()
    x = torch.randn(8, 3)
    with bn.adapt(layer) as adapted:
        layer(x)
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        y = layer.running_mean.clone()
        for other in (copied, pickled):
            other(x + 9)
            assert torch.equal(other.running_mean, y)
            assert not other._forward_pre_hooks
        assert adapted.report.layers[0].samples == 8
    copied(x)
    assert torch.equal(copied.running_mean, y)


def test_a_model_that_was_moved_inside() -> None:
    layer = layer_of()
    with bn.adapt(layer):
        layer.to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}


@pytest.mark.parametrize("batches", [True, False])
def test_the_chosen_domain_is_adapted(batches: bool) -> None:
    model = nn.Sequential(bn.BatchNorm1d(3, domains=("a", "b")), nn.BatchNorm1d(3))
    before, x = everything(model), torch.randn(20, 3) + 5
    own = model[0].running_mean_b
    with bn.domain(model, "b"):
        with bn.adapt(model, [x] if batches else None, prior=0) as adapted:
            model(x)
            close(model[0].running_mean_b, x.mean(0), tolerances.POPULATION)
            assert model[0].running_mean.tolist() == [0, 0, 0]
        assert everything(model)["0"][1:] == (*before["0"][1:],)
        with bn.adapt(model, prior=0) as adapted:
            model(x)
            adapted.keep()
    assert model[0].running_mean_b is own
    close(own, x.mean(0), tolerances.POPULATION)
    assert model[0].running_mean.tolist() == [0, 0, 0]
    with pytest.raises(bn.errors.OptionError, match="without saying which"), bn.adapt(model):
        raise AssertionError("not reached")


def test_another_domain_inside_is_refused() -> None:
    """Its statistics are not those that are adapted."""
    model = nn.Sequential(bn.BatchNorm1d(3, domains=("a", "b")))
    x = torch.randn(8, 3)
    before = everything(model)
    with bn.domain(model, "b"), bn.adapt(model):
        with bn.domain(model, "a"), pytest.raises(bn.errors.OptionError, match='adapted is the domain "b"'):
            model(x)
        model(x)
    assert everything(model) == before
