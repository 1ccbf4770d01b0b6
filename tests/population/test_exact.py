"""Method "exact": every layer sees what inference will show it, in one pass, or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, NonFiniteError, OrderError, ShapeError
from support import oracle, tolerances
from support.populations import NETS, assert_consistent, assert_statistics, everything, images, inputs, layers, made

SIZES = (8, 3, 5, 1)


@pytest.mark.parametrize("net", NETS)
def test_every_layer_is_what_inference_sees(net: str) -> None:
    model, batches = made(net), images(*SIZES)
    result = bn.recalibrate(model, batches)
    assert_consistent(model, batches)
    assert {layer.name for layer in result.layers} == set(layers(model))
    assert not result.skipped


@pytest.mark.parametrize("net", NETS)
def test_a_second_time_changes_nothing(net: str) -> None:
    model, batches = made(net), images(*SIZES)
    bn.recalibrate(model, batches)
    for layer in bn.recalibrate(model, batches).layers:
        assert layer.moved <= tolerances.POPULATION


def test_pooling_by_batch_statistics_is_another_answer() -> None:
    """The test of consistency can tell: it fails for the method that is nearly right."""
    model, batches = made("residual"), images(*SIZES)
    bn.recalibrate(model, batches, method="pooled")
    with pytest.raises(AssertionError, match="off by"):
        assert_consistent(model, batches)


def test_batches_weigh_by_their_size_and_differ_in_their_means() -> None:
    """64 rows near 0 and 2 rows near 10: the mean of means is 5, and no batch has the variance of all."""
    generator = torch.Generator().manual_seed(0)
    near_0, near_10 = torch.randn(64, 1, generator=generator), 10 + torch.randn(2, 1, generator=generator)
    layer = nn.BatchNorm1d(1)
    bn.recalibrate(layer, [near_0, near_10])
    rows = torch.cat([near_0, near_10]).double().numpy()
    assert_statistics(layer, rows)
    assert layer.running_mean.item() < 0.5
    assert layer.running_var.item() > 3


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from(sorted(NETS)))
def test_any_parts_of_the_data_give_one_answer(sizes: list[int], net: str) -> None:
    data = torch.cat(images(*SIZES))[torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(0))]
    whole, parts = made(net), made(net)
    bn.recalibrate(whole, [data])
    cuts = torch.tensor([*sizes, len(data)]).cumsum(0).clamp(max=len(data)).tolist()
    bn.recalibrate(parts, [data[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if b > a])
    for name, layer in layers(parts).items():
        for statistic in ("running_mean", "running_var"):
            torch.testing.assert_close(
                getattr(layer, statistic), getattr(layers(whole)[name], statistic), rtol=tolerances.PARTS,
                atol=tolerances.PARTS,
            )  # fmt: skip


def test_a_batchs_pass_begins_before_the_next_batch_is_read() -> None:
    events: list[str] = []
    model = made("residual")

    def reading() -> Iterator[Tensor]:
        for i, batch in enumerate(images(4, 3, 2)):
            events.append(f"read {i}")
            yield batch

    def forward(model: nn.Module, batch: Tensor) -> None:
        events.append(f"begin {len(batch)}")
        model(batch)
        events.append(f"end {len(batch)}")

    bn.recalibrate(model, reading(), forward=forward)
    assert events[:3] == ["read 0", "begin 1", "end 1"]  # the first sample, to see which layers there are
    assert events[3:] == ["begin 4", "read 1", "begin 3", "read 2", "begin 2", "end 4", "end 3", "end 2"]


def test_masks_say_what_counts() -> None:
    layer = bn.BatchNorm1d(3)
    batches = [{"input": x.flatten(2), "mask": torch.rand(len(x), 36) < 0.5} for x in images(*SIZES)]
    result = bn.recalibrate(layer, batches)
    n, _, _ = oracle.moments(inputs(layer, batches, lambda m, b: m(b["input"], mask=b["mask"]))[""])
    assert result.layers[0].count == n
    assert_consistent(layer, batches, lambda m, b: m(b["input"], mask=b["mask"]))


def test_a_mask_that_leaves_nothing_leaves_the_layer() -> None:
    layer = made("fused").bn1
    before = layer.running_mean.clone()
    batches = [{"input": torch.randn(2, 6, 3, 3), "mask": torch.zeros(2, 3, 3, dtype=torch.bool)}]
    result = bn.recalibrate(layer, batches)
    assert torch.equal(layer.running_mean, before)
    assert result.skipped == (("the model itself", "never called with a value"),)


def test_one_value_is_no_population() -> None:
    layer = nn.BatchNorm1d(3)
    with pytest.raises(CountError, match=r'layer "the model itself": got one value for each channel in all batches'):
        bn.recalibrate(layer, [torch.randn(1, 3)])


# --- layers that are called more than once ----------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(self.other(self.bn(x))))


@pytest.mark.parametrize("samples", [1, 6])
def test_a_layer_that_is_called_twice_is_refused_before_the_second_batch_is_read(samples: int) -> None:
    read: list[int] = []
    data = torch.randn(samples, 4)
    batches = (read.append(i) or data for i in range(3))
    model = Twice()
    before = everything(model)
    with pytest.raises(OrderError, match=r'layer "bn": called twice .* batch 0; .* Use method="pooled"'):
        bn.recalibrate(model, batches)
    assert read == [0]
    assert everything(model) == before


def test_it_is_refused_later_where_one_sample_does_not_tell() -> None:
    def forward(model: nn.Module, batch: Tensor) -> None:
        if len(batch) == 1:
            raise ValueError("this one takes no single sample")
        model(batch)

    model = Twice()
    with pytest.raises(OrderError, match=r'layer "bn": called twice in the forward pass of batch 0'):
        bn.recalibrate(model, [torch.randn(6, 4), torch.randn(5, 4)], forward=forward)


def test_pooled_joins_all_calls() -> None:
    model, batches = Twice(), [torch.randn(6, 4), torch.randn(5, 4)]
    result = bn.recalibrate(model, batches, method="pooled")
    assert {layer.name: layer.count for layer in result.layers} == {"bn": 22, "other": 11}


def test_one_layer_under_two_names_that_is_called_once_is_one_layer() -> None:
    model = made("plain")
    model.add_module("again", nn.Module())
    model.again.add_module("alias", model[1])
    forward = lambda model, batch: model[:5](batch)  # noqa: E731
    result = bn.recalibrate(model, images(*SIZES), forward=forward)
    assert [layer.name for layer in result.layers] == ["1", "3"]
    assert_consistent(model, images(*SIZES), forward)


# --- batches that take different ways ---------------------------------------------------------------------------------


class Ways(nn.Module):
    """Layers in the order that the batch's first value says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.BatchNorm1d(2) for name in "abc"})
        self.ways = ["abc", "acb", "a", "", "abc"]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.ways[int(x[0, 0])]:
            x = self.layers[name](x)
        return x


def ways(*which: int) -> list[Tensor]:
    return [torch.cat([torch.full((1, 2), float(way)), torch.randn(3, 2)]) for way in which]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ((0, 0, 1, 0), r"got batch 2 at layers\.c where 3 of 4 batches are at layers\.b"),
        ((1, 0, 0), r"got batch 0 at layers\.c where 2 of 3 batches are at layers\.b"),
        ((0, 0, 0, 2), r"got batch 3 at the end of the forward pass where 3 of 4 batches are at layers\.b"),
        ((2, 2, 0), r"got batch 2 at layers\.b where 2 of 3 batches are at the end of the forward pass"),
        ((0, 3), r"got batch 1 at the end of the forward pass where 1 of 2 batches are at layers\.a"),
    ],
)
def test_batches_that_call_layers_in_another_order(which: tuple[int, ...], message: str) -> None:
    model, batches = Ways(), ways(*which)
    before = everything(model)
    with pytest.raises(OrderError, match=message):
        bn.recalibrate(model, batches)
    assert everything(model) == before


def test_pooled_needs_no_order() -> None:
    model = Ways()
    result = bn.recalibrate(model, ways(0, 1, 2, 3), method="pooled")
    assert {layer.name[-1]: layer.count for layer in result.layers} == {"a": 12, "b": 8, "c": 8}


def test_layers_that_no_batch_calls_are_told() -> None:
    model = Ways()
    result = bn.recalibrate(model, ways(2, 2))
    assert result.skipped == tuple((f"layers.{name}", "never called with a value") for name in "bc")
    assert bn.recalibrate(model, ways(3, 3)).layers == ()


# --- stops ------------------------------------------------------------------------------------------------------------


class Catching(nn.Module):
    """A model that catches whatever is raised in it."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.kind, self.cleaned = kind, 0
        self.bn1, self.bn2 = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            try:
                return self.bn2(self.bn1(x))
            except self.kind:
                return self.bn2(x)
        finally:
            self.cleaned += 1


def failing(batches: list[Tensor]) -> Iterator[Tensor]:
    yield from batches
    raise ZeroDivisionError


@pytest.mark.parametrize("kind", [Exception, BaseException])
def test_a_model_that_catches_everything_can_be_stopped_and_cleans_up(kind: type[BaseException]) -> None:
    model, batches = Catching(kind), [torch.randn(n, 2) for n in (3, 4, 5)]
    before = everything(model)
    with pytest.raises(ZeroDivisionError):
        bn.recalibrate(model, failing(batches))
    assert model.cleaned == 1 + 3
    assert everything(model) == before


def test_a_refusal_that_a_model_caught_is_raised() -> None:
    model = Catching(Exception)
    with pytest.raises(OrderError, match=r'layer "bn2": called twice|layer "bn1": called twice'):
        bn.recalibrate(model, [torch.randn(3, 2)], forward=lambda m, x: (m(x), m(x)))
    with pytest.raises(ShapeError, match=r'layer "bn1": got running_mean of shape \(2,\) for an input with 3 channels'):
        bn.recalibrate(model, [torch.randn(3, 3)])


def test_what_a_model_raises_while_it_is_stopped_does_not_hide_the_reason() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            done = False
            try:
                x = self.bn(x)
                done = True
                return x
            finally:
                if not done:
                    raise LookupError("interrupted")

    with pytest.raises(ZeroDivisionError):
        bn.recalibrate(Fragile(), failing([torch.randn(n, 2) for n in (3, 4)]))


def test_activations_that_are_not_finite_name_the_layer_and_the_batch() -> None:
    model, batches = made("residual"), images(4, 3, 5)
    batches[1][0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r'layer "bn1": .* in batch 1;'):
        bn.recalibrate(model, batches)
    batches = images(4, 3, 5)

    def forward(model: Any, batch: Tensor) -> None:
        hook = model.down.register_forward_hook(lambda m, a, y: y * (torch.nan if len(y) == 5 else 1))
        try:
            model(batch)
        finally:
            hook.remove()

    with pytest.raises(NonFiniteError, match=r'layer "bn3": .* in batch 2;'):
        bn.recalibrate(model, batches, forward=lambda m, b: forward(m, b) if len(b) == 5 else m(b))
