"""All or nothing: whatever fails, and wherever, the model is as it was; and what may be asked for."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, NonFiniteError, OptionError
from batchnorm.population.recalibrate import METHODS
from support import tolerances
from support.populations import (
    NETS,
    assert_consistent,
    assert_statistics,
    everything,
    images,
    inputs,
    layers,
    made,
    run,
)

SIZES = (4, 3, 2)
LAYERS = ("bn1", "bn2", "bn3", "bn4")


class OnPurposeError(Exception):
    """What the tests raise."""


def raising(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OnPurposeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", range(len(SIZES) + 1))
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_in_the_iterable(method: str, where: int, error: type[BaseException]) -> None:
    def reading() -> Iterator[Tensor]:
        for i, batch in enumerate(images(*SIZES)):
            if i == where:
                raise error
            torch.rand(())  # data are often random
            yield batch
        raise error

    model = made("residual")
    before = everything(model)
    with pytest.raises(error):
        bn.recalibrate(model, reading(), method=method)
    assert everything(model) == before


@pytest.mark.parametrize("error", [OnPurposeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [None, *LAYERS])
@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_in_a_forward_pass(method: str, batch: int, layer: str | None, error: type[BaseException]) -> None:
    """Before any layer, or right after one, in one batch."""
    model = made("residual")
    if layer is not None:
        getattr(model, layer).register_forward_hook(lambda m, args, y: raising(error)() if len(y) == batch else None)

    def forward(model: nn.Module, x: Tensor) -> None:
        if layer is None and len(x) == batch:
            raise error
        model(x)

    before = everything(model)
    with pytest.raises(error) as raised:
        bn.recalibrate(model, images(*SIZES), method=method, forward=forward)
    assert everything(model) == before
    if sys.version_info >= (3, 11) and error is OnPurposeError:
        assert raised.value.__notes__ == [f"in the forward pass of batch {SIZES.index(batch)}"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_inf_into_each_layer(method: str, batch: int, layer: str) -> None:
    model = made("residual")
    source = {"bn1": "conv1", "bn2": "conv2", "bn3": "down", "bn4": "head"}[layer]
    getattr(model, source).register_forward_hook(lambda m, args, y: y / 0 if len(y) == batch else None)
    before = everything(model)
    with pytest.raises(NonFiniteError, match=f'layer "{layer}": .* in batch {SIZES.index(batch)};'):
        bn.recalibrate(model, images(*SIZES), method=method)
    assert everything(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_fault_in_progress(method: str) -> None:
    model = made("residual")
    before = everything(model)
    with pytest.raises(OnPurposeError):
        bn.recalibrate(model, images(*SIZES), method=method, progress=raising(OnPurposeError))
    assert everything(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_replaced_buffer_and_changed_state_come_back(method: str) -> None:
    model = made("residual")
    before = everything(model)

    def forward(model: Any, x: Tensor) -> None:
        model(x)
        model.bn1.register_buffer("num_batches_tracked", torch.tensor(0))
        model.bn2.num_batches_tracked += 1
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", True)
        if len(x) == SIZES[-1]:
            raise OnPurposeError

    with pytest.raises(OnPurposeError):
        bn.recalibrate(model, images(*SIZES), method=method, forward=forward)
    assert everything(model) == before


# --- what a success changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_only_running_statistics_change(method: str, training: bool) -> None:
    model = made("residual").train(training)
    nn.utils.parametrizations.spectral_norm(model.conv1)  # buffers that move in training
    model.drop.train(not training)
    before = everything(model)
    bn.recalibrate(model, images(*SIZES), method=method)
    after = everything(model)
    for name, layer in layers(model).items():
        for statistic in ("running_mean", "running_var"):
            identity, old = before[name][3].pop(statistic)
            assert after[name][3].pop(statistic) == (identity, layer._buffers[statistic].tolist())
            assert layer._buffers[statistic].tolist() != old
    assert after == before


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_dropout_is_off_and_custom_modes_are_not_called(method: str) -> None:
    model = made("residual")
    model.train = model.eval = raising(OnPurposeError)
    bn.recalibrate(model, images(*SIZES), method=method)
    model.train, model.eval = (getattr(nn.Module, name).__get__(model) for name in ("train", "eval"))
    if method == "exact":
        assert_consistent(model, images(*SIZES))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 6, 6)] * 2], ids=["none", "empty ones"])
@pytest.mark.parametrize("method", METHODS)
def test_no_samples_are_an_error(method: str, batches: list[Tensor]) -> None:
    model = made("residual")
    before = everything(model)
    with pytest.raises(CountError, match=f"got {len(batches)} batches without a sample"):
        bn.recalibrate(model, batches, method=method)
    assert everything(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_empty_batches_are_left_out(method: str) -> None:
    one, other = made("residual"), made("residual")
    torch.manual_seed(1)
    bn.recalibrate(one, images(*SIZES), method=method)
    a, b, c = images(*SIZES)
    torch.manual_seed(1)
    result = bn.recalibrate(other, [a[:0], a, b, b[:0], c], method=method)
    assert (result.batches, result.samples) == (3, sum(SIZES))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [1, 4, 6, 7, 9, 100])
def test_max_samples(method: str, limit: int) -> None:
    model, whole = made("plain"), torch.cat(images(*SIZES))
    read: list[int] = []
    result = bn.recalibrate(
        model, (read.append(1) or batch for batch in whole.split(3)), method=method, max_samples=limit
    )
    assert result.samples == min(limit, 9)
    assert len(read) == result.batches == -(-min(limit, 9) // 3)
    rows = inputs(model, [whole[:limit]])["1"]
    assert result.layers[0].count == len(rows)
    if method != "average":  # which weighs by batch
        assert_statistics(model[1], rows)


def test_batches_of_every_kind() -> None:
    expected = made("plain")
    bn.recalibrate(expected, images(*SIZES))

    class Named(nn.Sequential):
        def forward(self, *, pixels: Tensor, scale: float) -> Tensor:
            return super().forward(pixels * scale)

    labels = torch.zeros(2)
    for model, kind in (
        (made("plain"), lambda x: x),
        (made("plain"), lambda x: (x, labels)),
        (made("plain"), lambda x: [x, labels, None]),
        (Named(*made("plain")), lambda x: {"pixels": x, "scale": 1.0}),
    ):
        bn.recalibrate(model, map(kind, images(*SIZES)))
        for key, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)


def test_other_batches_need_a_forward() -> None:
    model, data = made("plain"), images(*SIZES)
    with pytest.raises(OptionError, match=r"got a batch of type int; .* Pass forward="):
        bn.recalibrate(model, range(3))
    result = bn.recalibrate(model, range(3), forward=lambda model, i: model(data[i]))
    assert (result.batches, result.samples) == (3, None)
    assert_consistent(model, data)
    with pytest.raises(OptionError, match=r"got max_samples=2 and a batch of type int without a tensor"):
        bn.recalibrate(model, range(3), forward=lambda model, i: model(data[i]), max_samples=2)


# --- models -----------------------------------------------------------------------------------------------------------


def test_averaged_model() -> None:
    model = torch.optim.swa_utils.AveragedModel(made("residual"))
    bn.recalibrate(model, images(*SIZES))
    assert_consistent(model, images(*SIZES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("net", NETS)
def test_other_dtypes(net: str, dtype: torch.dtype) -> None:
    """torch.nn's statistics are then of that dtype too, and inference sees what they round to."""
    model, batches = made(net).to(dtype), [x.to(dtype) for x in images(*SIZES)]
    result = bn.recalibrate(model, batches)
    seen = inputs(model, batches)
    for layer in result.layers:
        rows, buffer = seen[layer.name], layers(model)[layer.name].running_mean
        assert torch.equal(buffer, layer.new_mean.to(buffer.dtype))
        torch.testing.assert_close(
            layer.new_mean, torch.from_numpy(rows.mean(0)), rtol=tolerances.PARTS, atol=tolerances.PARTS
        )


def test_a_variance_that_the_dtype_cannot_hold() -> None:
    layer = nn.BatchNorm1d(1).half()
    before = everything(layer)
    with pytest.raises(NonFiniteError, match=r"that torch.float16 cannot hold; .* batchnorm.convert\(model\)"):
        bn.recalibrate(layer, [torch.tensor([[-3e4], [3e4]], dtype=torch.float16)])
    assert everything(layer) == before
    bn.recalibrate(bn.convert(layer), [torch.tensor([[-3e4], [3e4]], dtype=torch.float16)])
    assert layer.running_var.item() == pytest.approx(9e8, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_models_run_as_they_were_written(method: str) -> None:
    """Compiled code would call no hooks."""
    model, plain = made("residual").eval(), made("residual").eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        compiled(images(2)[0])
    for m in (compiled, plain):
        torch.manual_seed(0)
        bn.recalibrate(m, images(*SIZES), method=method)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_inside_inference_mode_and_with_its_buffers() -> None:
    with torch.inference_mode():
        model = made("residual")
        bn.recalibrate(model, images(*SIZES))
    bn.recalibrate(model, images(*SIZES, seed=1))
    assert_consistent(model, images(*SIZES, seed=1))


def test_a_replica_of_the_layers_is_refused() -> None:
    model = made("plain")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OptionError, match=r'layer "1": got a call with other buffers'):
        bn.recalibrate(model, images(3), forward=lambda m, x: torch.func.functional_call(m, state, (x,)))


@pytest.mark.parametrize("method", METHODS)
def test_calls_from_the_iterable_are_refused(method: str) -> None:
    model = made("plain")
    with pytest.raises(bn.errors.OrderError, match="while no batch's forward pass was running"):
        bn.recalibrate(model, ((model(x), x)[1] for x in images(3, 4)), method=method)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ema"}, r'got method=\'ema\'; it must be one of "exact", "pooled", "average"'),
        ({"max_samples": 0}, r"got max_samples=0; it must be a positive number"),
        ({"max_samples": 1.5}, r"got max_samples=1.5"),
        ({"memory_limit": -1}, r"got memory_limit=-1"),
        ({"checkpoint": "x"}, r'got checkpoint and method="exact"; only "pooled"'),
        ({"checkpoint": "x", "method": "average"}, r'got checkpoint and method="average"'),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bn.recalibrate(made("plain"), images(3), **options)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("exact", [(i, 12) for i in range(1, 13)]),
        ("pooled", [(4, 12), (8, 12), (12, 12)]),
        ("average", [(4, 12), (8, 12), (12, 12)]),
    ],
)
def test_progress_counts_calls(method: str, expected: list[tuple[int, int]]) -> None:
    told: list[tuple[int, int | None]] = []
    bn.recalibrate(made("residual"), images(*SIZES), method=method, progress=lambda *done: told.append(done))
    assert told == expected
    told.clear()
    unknown = (batch for batch in images(*SIZES))
    bn.recalibrate(made("residual"), unknown, method=method, progress=lambda *done: told.append(done))
    # A generator does not say how long it is; "exact" has read all of it before it is done with the first layer.
    assert told == (expected if method == "exact" else [(done, None) for done, _ in expected])


def test_the_result_is_what_happened() -> None:
    model = made("residual")
    before = copy.deepcopy(model)
    result = bn.recalibrate(model, images(*SIZES))
    assert (result.method, result.batches, result.samples) == ("exact", 3, 9)
    assert [layer.name for layer in result.layers] == list(LAYERS)
    for layer in result.layers:
        old, new = layers(before)[layer.name], layers(model)[layer.name]
        assert torch.equal(layer.old_mean, old.running_mean.double())
        assert torch.equal(layer.old_var, old.running_var.double())
        assert torch.equal(layer.new_mean.float(), new.running_mean)
        assert torch.equal(layer.new_var.float(), new.running_var)
        assert layer.eps == new.eps
    run(model.eval(), images(1)[0])
