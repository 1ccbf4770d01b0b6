"""Adapted for a while: what a call is normalised by, and that nothing is left of it."""

from __future__ import annotations

import copy
import doctest
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, OptionError
from batchnorm.population import adapt as module
from support import oracle, tolerances
from support.comparison import close
from support.oracle import Array
from support.populations import NETS, everything, images, layers, made

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is adapted by")  # most batches here are tiny


def layer_of(make: Callable[..., nn.Module] = nn.BatchNorm1d) -> Any:
    layer: Any = make(3)
    layer.running_mean.copy_(torch.tensor([0.0, 2.0, -1.0]))
    layer.running_var.copy_(torch.tensor([1.0, 4.0, 0.5]))
    return layer.eval()


def by_hand(layer: Any, x: Tensor, prior: float) -> Array:
    """x normalised by the stored statistics and its own."""
    rows = x.double().numpy()
    n, mean, m2 = oracle.moments(rows)
    share = prior / (prior + len(x))
    old_mean, old_var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    new_mean = share * old_mean + (1 - share) * mean
    var = share * old_var + (1 - share) * m2 / n + share * (1 - share) * (mean - old_mean) ** 2
    shape = (1, -1) + (1,) * (rows.ndim - 2)
    return (rows - new_mean.reshape(shape)) / np.sqrt(var + layer.eps).reshape(shape)


# --- what a call is normalised by ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("prior", [0, 4, 16])
@pytest.mark.parametrize("n", [1, 8])
def test_a_batch_is_normalised_by_statistics_that_include_it(
    make: Callable[..., nn.Module], prior: float, n: int
) -> None:
    layer, x = layer_of(make), torch.randn(n, 3, 5) * 2 + 1
    expected = by_hand(layer, x, prior)
    with bn.adapt(layer, prior=prior):
        close(layer(x), expected, tolerances.POPULATION)


def test_prediction_time_batch_norm() -> None:
    """Each batch by its own: what training mode gives, but for dropout and the running statistics."""
    model = made("residual")
    model.drop.p = 0.0
    expected = [copy.deepcopy(model).train()(x) for x in images(6, 4)]
    with bn.adapt(model, prior=0, decay=0.0):
        for x, y in zip(images(6, 4), expected, strict=True):
            close(model(x), y, 1e-4)


def test_what_was_seen_stays_seen() -> None:
    x = torch.randn(9, 3, 5) + 3
    layer = layer_of()
    expected = by_hand(layer, x, 16)
    with bn.adapt(layer):
        for part in x.split([4, 1, 4]):
            y = layer(part)
        close(y, expected[5:], tolerances.POPULATION)


def test_one_value_alone() -> None:
    layer, x = layer_of(), torch.randn(1, 3)
    before = everything(layer)
    expected = by_hand(layer, x, 16)
    with bn.adapt(layer):
        close(layer(x), expected, tolerances.POPULATION)
    with pytest.raises(CountError, match=r'layer "the model itself": .*one value for each channel'):
        call_alone(layer, x)
    assert everything(layer) == before


def call_alone(layer: nn.Module, x: Tensor) -> None:
    with bn.adapt(layer, prior=0):
        layer(x)


def test_masks_and_layouts() -> None:
    """What a mask of ours leaves out is not seen; channels_last and half precision are as any other."""
    x = torch.randn(6, 3, 4)
    mask = torch.arange(4) < torch.tensor([4, 3, 1, 0, 2, 4])[:, None]
    layer = layer_of(bn.BatchNorm1d)
    with bn.adapt(layer, prior=5) as adapted:
        layer(x.masked_fill(~mask[:, None], float("nan")), mask=mask)
        seen = bn.Moments.of(x, mask=mask)
        (told,) = adapted.report.layers
        assert (told.samples, told.values, told.refused) == (5, 14, 0)
        close(layer.running_mean, ((torch.tensor([0.0, 2.0, -1.0]) + seen.mean) / 2).numpy(), tolerances.STATISTIC)
    image = torch.randn(4, 3, 5, 5)
    outputs = []
    for given in (image, image.to(memory_format=torch.channels_last)):
        layer = layer_of(nn.BatchNorm2d)
        with bn.adapt(layer):
            outputs.append(layer(given))
    close(outputs[0], outputs[1], tolerances.OUTPUT)


def test_under_autocast() -> None:
    model = made("residual").eval()
    x = images(8)[0]
    with bn.adapt(model) as plain:
        expected = model(x)
    with bn.adapt(model) as mixed, torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "running" in name)
    assert [layer.values for layer in mixed.report.layers] == [layer.values for layer in plain.report.layers]
    assert (y.float() - expected).abs().mean() < 0.1


def test_inf_and_nan_join_nothing() -> None:
    layer, x = layer_of(), torch.randn(8, 3)
    bad = x.clone()
    bad[2, 1] = float("inf")
    with bn.adapt(layer) as adapted:
        layer(bad)
        assert layer.running_mean.tolist() == [0, 2, -1]
        assert adapted.report.skipped == (("the model itself", "only inf or NaN"),)
        layer(x)
        after = layer.running_mean.clone()
        y = layer(bad)
        assert torch.equal(layer.running_mean, after)
        assert y[:, [0, 2]].isfinite().all()
        assert adapted.report.layers[0].refused == 2


def test_decay_forgets() -> None:
    layer = layer_of()
    near, far = torch.randn(8, 3), torch.randn(8, 3) + 10
    with bn.adapt(layer, decay=0.5, prior=1):
        layer(far)
        for _ in range(5):
            layer(near)
        decayed = layer.running_mean.clone()
    with bn.adapt(layer, decay=0.0, prior=1):
        layer(near)
        close(decayed, layer.running_mean, 0.1)
    with bn.adapt(layer, decay=1, prior=1) as one, bn.adapt(copy.deepcopy(layer), prior=1) as other:
        assert one._adapters[0]._decay is other._adapters[0]._decay is None


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_statistics_are_constants_to_gradients(make: Callable[..., nn.Module]) -> None:
    """Also after later batches have moved them, and after the end."""
    layer, x = layer_of(make), torch.randn(8, 3, requires_grad=True)
    with bn.adapt(layer):
        y = layer(x)
        var = layer.running_var.clone()
        layer(x.detach() + 5)
    y.sum().backward()
    close(x.grad, (1 / (var + layer.eps).sqrt()).expand(8, 3), tolerances.GRADIENT)


def test_after_and_inside_inference_mode() -> None:
    model = made("residual").eval()
    with bn.adapt(model):
        with torch.inference_mode():
            model(images(4)[0])
        model(images(4)[0][:0].requires_grad_())
        model(images(4)[0]).sum().backward()
    with torch.inference_mode(), bn.adapt(model):
        model(images(4)[0])
    model(images(4)[0]).sum().backward()


# --- who takes part --------------------------------------------------------------------------------------------------


def test_frozen_layers_and_those_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    bn.freeze(model[1])
    with bn.adapt(model) as adapted:
        model(torch.randn(20, 3) + 3)
        assert model[0].running_mean.min() > 1
        assert model[1].running_mean.tolist() == [0, 0, 0]
        assert adapted.report.skipped == (("1", "frozen"), ("2", "no running statistics"))
        assert [layer.name for layer in adapted.report.layers] == ["0"]


def test_a_model_without_a_layer_to_adapt_says_so() -> None:
    for batches in (None, [torch.randn(4, 3)]):
        with pytest.warns(UserWarning, match="no layer"), bn.adapt(nn.Linear(3, 3), batches):
            pass


def test_a_call_in_training_mode_is_refused() -> None:
    model = made("residual")
    before = everything(model)

    def use() -> None:
        with bn.adapt(model):
            model.train()
            model(images(4)[0])

    with pytest.raises(OptionError, match=r'layer "bn1": got a call in training mode'):
        use()
    assert everything(model) == before


def test_a_shared_layer_joins_every_call() -> None:
    layer = layer_of()
    with bn.adapt(nn.Sequential(layer, layer)) as adapted:
        nn.Sequential(layer, layer)(torch.randn(10, 3))
        assert adapted.report.layers[0].samples == 20


def test_wrapped_models_have_their_own_names() -> None:
    model = made("residual")
    with bn.adapt(nn.DataParallel(model)) as adapted:
        model(images(4)[0])
        assert [layer.name for layer in adapted.report.layers] == ["bn1", "bn2", "bn3", "bn4"]


# --- too little -----------------------------------------------------------------------------------------------------


def told(use: Callable[[nn.Module], object], batches: Any = None, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = layer_of()
        with bn.adapt(layer, batches, **options):
            use(layer)
    assert all(w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught]


def test_it_warns_once_of_tiny_batches() -> None:
    def use(layer: nn.Module) -> None:
        for _ in range(5):
            layer(torch.randn(4, 3))

    (message,) = told(use, prior=0, decay=0.0)
    assert message.startswith('layer "the model itself" is adapted by 4 samples')
    assert told(use) == []
    assert len(told(lambda _: None, [torch.randn(4, 3)] * 2, prior=0)) == 1
    assert told(lambda _: None, [torch.randn(40, 3)], prior=0) == []


def test_it_warns_of_batches_of_one_class() -> None:
    """As many values as of mixed batches, which are no reason to."""
    torch.manual_seed(0)
    classes = torch.randn(8, 1, 3) * 3
    x = torch.randn(8, 64, 3) + classes
    mixed = x.transpose(0, 1).reshape(8, 64, 3)
    (message,) = told(lambda layer: [layer(part) for part in x])
    assert "of one class" in message
    assert told(lambda layer: [layer(part) for part in mixed]) == []
    assert len(told(lambda _: None, list(x))) == 1
    assert told(lambda _: None, list(mixed)) == []


def test_where_the_warning_points() -> None:
    with (
        pytest.warns(UserWarning, match="is adapted by 4 samples") as caught,
        bn.adapt(layer_of(), [torch.randn(4, 3)], prior=0),
    ):
        pass
    assert caught[0].filename == __file__


# --- what may be asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"prior": -1},
        {"prior": float("inf")},
        {"prior": float("nan")},
        {"decay": -0.1},
        {"decay": 1.5},
        {"decay": float("nan")},
        {"decay": 0.5, "batches": []},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(OptionError, match=f"got {name}="), bn.adapt(layer_of(), **options):
        raise AssertionError("not reached")


def test_another_forward() -> None:
    layer = layer_of()
    data = [torch.randn(30, 3) for _ in range(2)]
    with bn.adapt(layer, range(2), forward=lambda model, i: model(data[i])) as adapted:
        assert adapted.report.layers[0].samples == 60


def test_the_docstring() -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 4
    assert results.failed == 0


# --- compiled --------------------------------------------------------------------------------------------------------

COMPILED = """
import copy, torch, batchnorm as bn
from torch import nn
from support.populations import images, made
model = made("plain").eval()
other, x = copy.deepcopy(model), images(4, 4)
with bn.adapt(other):
    expected = [other(batch) for batch in x]
with bn.adapt(model):  # compiled inside
    compiled = torch.compile(model, backend="eager")
    assert all(torch.equal(compiled(batch), y) for batch, y in zip(x, expected))
assert torch.equal(compiled(x[0]), model(x[0]))
assert torch.equal(compiled(x[0]), other(x[0]))
torch.compiler.reset()
compiled = torch.compile(model, backend="eager", fullgraph=True)
before = compiled(x[0])
with bn.adapt(compiled) as adapted:  # and before
    assert all(torch.equal(compiled(batch), y) for batch, y in zip(x, expected))
    assert [layer.name for layer in adapted.report.layers] == ["1", "3"]
assert torch.equal(compiled(x[0]), before)
print("done")
"""


def test_compiled_models() -> None:
    """In a process of its own, where nothing is compiled yet."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert run.stdout == "done\n", run.stderr


def test_layers_of_ours_in_other_networks_are_named() -> None:
    for net in NETS:
        model = made(net)
        with bn.adapt(model) as adapted:
            model(images(4)[0])
            assert [layer.name for layer in adapted.report.layers] == list(layers(model))
