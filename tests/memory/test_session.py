"""One forward pass: what is kept of what autograd saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import batchnorm as bn
from batchnorm import recording
from batchnorm.memory import session
from batchnorm.memory.session import UNKNOWN, Session
from support.passes import CHANNELS, conv, norm

BYTES = 4 * CHANNELS * 32 * 32 * 4  # of an output


def features(seed: int = 0, channels: int = CHANNELS) -> Tensor:
    return torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@contextmanager
def opened() -> Iterator[Session]:
    current = Session(lambda owner: "layer")
    recording.RECORDERS[get_ident()] = current
    try:
        with saved_tensors_hooks(current.pack, current.unpack):
            yield current
    finally:
        del recording.RECORDERS[get_ident()]


def same_gradients(run: object, *leaves: Tensor) -> Session:
    """What a function's gradients are, with a session and without. Returns the session."""
    expected = torch.autograd.grad(run(), leaves)
    with opened() as current:
        y = run()
    for actual, wanted in zip(torch.autograd.grad(y, leaves), expected, strict=True):
        assert torch.equal(actual, wanted)
    return current


def test_a_pooling_is_kept_and_its_places_in_fewer_bytes() -> None:
    layer, after, x = norm(), conv(), features()
    found = same_gradients(lambda: after(F.max_pool2d(layer(x.neg()), 2)).sum(), x, after.weight)
    pooled = BYTES // 4
    assert found.notes["layer"].saved == BYTES
    assert found.between == 2 * pooled  # places are int64
    assert found.copied == pooled // 2  # two bytes for each
    statistics = 2 * CHANNELS * 8 + 8  # mean and m2, the count
    assert found.kept == BYTES + pooled + found.copied + statistics


def test_places_whose_pooling_nobody_saves_are_kept() -> None:
    layer, x = norm(), features()
    found = same_gradients(lambda: F.max_pool2d(layer(x), 2).sum(), x)
    assert found.between == 0
    assert found.notes["layer"].saved == BYTES


def test_a_concatenation_keeps_the_part_that_nobody_knows() -> None:
    layer, up, after, x = norm(), conv(), conv(2 * CHANNELS), features()
    found = same_gradients(lambda: after(torch.cat([up(x), layer(x)], 1)).sum(), x, after.weight, up.weight)
    assert found.between == 2 * BYTES
    assert found.copied == BYTES


def test_a_concatenation_of_outputs() -> None:
    layers, after, x = [norm(), norm("silu")], conv(2 * CHANNELS), features()
    found = same_gradients(lambda: after(torch.cat([layer(x) for layer in layers], 1)).sum(), x, after.weight)
    assert found.between == 2 * BYTES
    assert found.copied == 0


def test_an_output_times_a_few_numbers() -> None:
    layer, squeeze, after, x = norm(), nn.Conv2d(CHANNELS, CHANNELS, 1), conv(), features()

    def run() -> Tensor:
        y = layer(x)
        return after(squeeze(F.adaptive_avg_pool2d(y, 1)).sigmoid() * y).sum()

    found = same_gradients(run, x, after.weight, squeeze.weight)
    assert found.between == BYTES
    assert found.notes["layer"].saved == BYTES


def test_a_factor_that_changed_before_is_not_mistaken() -> None:
    layer, after, x, scale = norm(), conv(), features(), features(1)

    def run() -> Tensor:
        factor = scale.sigmoid()  # saves its result
        with torch.no_grad():
            factor.data.mul_(1)
        return after(layer(x) * factor.clone()).sum()

    same_gradients(run, x, scale)


def test_a_view_of_an_output() -> None:
    layer, x = norm(), features()
    weight = torch.randn(CHANNELS * 32 * 32, 3, requires_grad=True)
    found = same_gradients(lambda: (layer(x).flatten(1) @ weight).sum(), x, weight)
    assert found.notes["layer"].saved == BYTES
    assert found.between == 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda y: F.dropout(y, 0.5),
        lambda y: F.pad(y, (1, 1, 1, 1)),
        lambda y: y + 1,
        lambda y: F.avg_pool2d(y, 2),
    ],
    ids=["dropout", "padding", "a sum", "mean pooling"],
)
def test_results_that_are_kept(operation: object) -> None:
    layer, after, x = norm(), conv(), features()

    def run() -> Tensor:
        torch.manual_seed(0)
        return after(operation(layer(x))).sum()

    assert same_gradients(run, x, after.weight).between == 0


def test_chains_end_where_they_are_deep() -> None:
    """Layers one after the other, with nothing that keeps their inputs between them."""
    layers, x = nn.Sequential(*(norm("silu") for _ in range(9))), features()
    found = same_gradients(lambda: layers(x).square().sum(), x)
    assert found.notes["layer"].saved == 8 * BYTES
    assert found.notes["layer"].kept == BYTES
    assert "ends a chain" in found.notes["layer"].why[0]


def test_small_outputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, after, x = norm(), conv(), features()
    monkeypatch.setattr(session, "_LEAST", BYTES + 1)
    found = same_gradients(lambda: after(layer(x)).sum(), x)
    assert found.notes["layer"].saved == 0
    assert found.notes["layer"].kept == BYTES
    monkeypatch.setattr(session, "_LEAST", BYTES)
    assert same_gradients(lambda: after(layer(x)).sum(), x).notes["layer"].saved == BYTES


def test_what_moves_more_than_it_saves_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A concatenation with a copied part reads and writes three halves to save one half."""
    layer, up, after, x = norm(), conv(), conv(2 * CHANNELS), features()

    def run() -> Tensor:
        return after(torch.cat([up(x), layer(x)], 1)).sum()

    monkeypatch.setattr(session, "_MOST_MOVED", 5)  # 2 are written, 2 are read, and 1 is copied
    assert same_gradients(run, x).between == 2 * BYTES
    monkeypatch.setattr(session, "_MOST_MOVED", 4.9)
    assert same_gradients(run, x).between == 0


def test_a_small_part_of_a_concatenation_is_kept_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, after, x = norm(), norm("silu"), conv(), features()
    monkeypatch.setattr(session, "_LEAST", BYTES)

    def run() -> Tensor:
        y = small(x[:, :, :8])  # is there until the end
        return after(torch.cat([y, large(x)], 2)).sum()

    found = same_gradients(run, x, after.weight)
    assert found.between == BYTES * 5 // 4
    assert found.notes["layer"].kept == BYTES // 4


def test_what_others_hooks_take_is_not_recorded() -> None:
    layer, after, x = norm(), conv(), features()
    with opened() as current:
        layer(x)  # the first one after something that came to us
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            layer(x)
            y = layer(x)
        after(y).sum().backward()
    assert list(current.notes) == ["layer"]
    assert current.notes["layer"].saved == 0


def test_only_counts_are_left_in_the_end() -> None:
    layer, x = norm(), features()
    with opened() as current:
        y = conv()(layer(x))
    values = [value for _, value in current._outputs.values()] + list(current._last)
    assert values
    current.finish()
    assert not current._outputs
    assert not current._last
    assert current.notes["layer"].saved == BYTES
    del y


def test_layers_that_are_not_known_are_counted_together() -> None:
    after, x = conv(), features()
    with opened() as current:
        after(bn.functional.batch_norm(x, None, None, training=True)).sum().backward()
    assert current.notes[UNKNOWN].saved == BYTES


def test_parameters_are_not_counted() -> None:
    x, linear = torch.randn(3, 500), nn.Linear(500, 300)
    with opened() as current:
        linear(x.requires_grad_()).sum().backward()
    assert current.kept in (0, x.numel() * 4)  # of a leaf that requires a gradient nothing is counted
