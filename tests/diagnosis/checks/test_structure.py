"""BN2..: where layers stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.checks import structure
from diagnosis.observed import batches_of, draw, found, subject
from support.networks import Block, Calls, Untraceable

IMAGES = [draw(8, 3, 6, 6, seed=seed) for seed in range(4)]
ROWS = [draw(16, 6, seed=seed) for seed in range(4)]


def sequential(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def conv(inputs: int = 3, outputs: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def linear(inputs: int = 6, outputs: int = 6, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, **options)


# A dead bias.

DEAD = {
    "conv": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), IMAGES),
    "ours": (lambda: nn.Sequential(conv(), bn.BatchNorm2d(4, activation="relu")), IMAGES),
    "linear": (lambda: nn.Sequential(linear(), nn.BatchNorm1d(6)), ROWS),
    "without statistics": (lambda: nn.Sequential(linear(), nn.BatchNorm1d(6, track_running_stats=False)), ROWS),
    "a part of what cannot be traced": (
        lambda: Untraceable(nn.Sequential(conv(), nn.BatchNorm2d(4))),
        IMAGES,
    ),
}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("name", DEAD)
def test_a_dead_bias(name: str, with_data: bool) -> None:
    build, batches = DEAD[name]
    layer = "parts.0.1" if "traced" in name else "1"
    model = build()
    given = batches if with_data else ()
    assert found(structure.dead_bias, model, given) == {layer: "info"}
    bn.remove_dead_biases(model, batches[0])
    assert found(structure.dead_bias, model, given) == {}


def test_what_removes_biases_and_what_finds_them_agree() -> None:
    model = nn.Sequential(Block(3, projected=True), conv(3, 3), nn.BatchNorm2d(3))
    named = found(structure.dead_bias, model, IMAGES)
    assert named == found(structure.dead_bias, model)
    assert set(bn.remove_dead_biases(model, IMAGES[0]).report.done) == set(named) == {"0.downsample.1", "2"}


@pytest.mark.parametrize(
    "model",
    [
        sequential(linear(), nn.ReLU(), nn.BatchNorm1d(6)),
        sequential(linear(), bn.freeze(bn.BatchNorm1d(6))),
        sequential(conv(bias=False), nn.BatchNorm2d(4)),
        sequential(conv(), bn.BatchNorm(6, channel_dim=-1)),
        Calls(lambda m, x: m.norm(y := m.linear(x)) + y, linear=linear(), norm=nn.BatchNorm1d(6)),
    ],
)
def test_a_bias_that_does_something(model: nn.Module) -> None:
    assert found(structure.dead_bias, model) == {}


def test_a_product_over_another_axis_than_the_layer_normalises() -> None:
    model = sequential(linear(), nn.BatchNorm1d(6))
    assert found(structure.dead_bias, model, [draw(8, 6, 6)]) == {}


# Dropout before.


def functional_dropout(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(F.dropout(x.relu(), 0.5, m.training)))


def test_dropout_before_and_what_it_does() -> None:
    model = sequential(linear(6, 64), nn.ReLU(), nn.Dropout(0.5), linear(64, 6), nn.BatchNorm1d(6))
    batches = [draw(256, 6, seed=seed) for seed in range(4)]
    (finding,) = structure.dropout_before(given := subject(model, batches))
    assert (finding.layer, finding.severity) == ("4", "warning")
    # Behind dropout, E[x^2] doubles: the variance of a sum of independent ones grows by its mean square.
    model.requires_grad_(False)
    inside = model[:2](torch.cat(batches))
    expected = (inside.square().mean(0) @ model[3].weight.square().T) / model[3](inside).var(0) + 1
    assert finding.evidence is not None
    measured = {int(channel): float(ratio) for channel, ratio in finding.evidence.rows}
    for channel, ratio in measured.items():
        assert ratio == pytest.approx(float(expected[channel]), rel=0.15)
    assert given.data is not None
    assert given.data.passes == pytest.approx(1 + 2 / 1024 + 2 * 2 / 4)
    exec(finding.remedy, {"model": model})
    assert found(structure.dropout_before, model, batches) == {}


def test_measuring_dropout_leaves_nothing_behind() -> None:
    model = sequential(linear(), nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    model[2].eval()
    given = subject(model, ROWS)
    torch.manual_seed(5)
    state, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert len(list(structure.dropout_before(given))) == 1
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


DROPPED = {
    "functional": (Calls(functional_dropout, linear=linear(), norm=nn.BatchNorm1d(6)), "norm"),
    "directly": (sequential(nn.Dropout(0.3), nn.BatchNorm1d(6)), "1"),
    "pooled and flattened": (
        sequential(nn.Dropout2d(0.3), conv(), nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(36)),
        "4",
    ),
    "ours": (sequential(nn.Dropout(0.3), linear(), bn.BatchNorm1d(6)), "2"),
    "one of several layers": (sequential(linear(), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(6)), "4"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_before_without_data(name: str) -> None:
    model, layer = DROPPED[name]
    assert found(structure.dropout_before, model) == {layer: "warning"}


@pytest.mark.parametrize("name", ["functional", "pooled and flattened"])
def test_dropout_before_with_data(name: str) -> None:
    model, layer = DROPPED[name]
    assert found(structure.dropout_before, model, ROWS if name == "functional" else IMAGES) == {layer: "warning"}


@pytest.mark.parametrize(
    "model",
    [
        sequential(linear(), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), linear()),
        sequential(nn.Dropout(0.5), linear(), nn.ReLU(), nn.BatchNorm1d(6)),
        sequential(nn.Dropout(0.0), linear(), nn.BatchNorm1d(6)),
        sequential(nn.Dropout(0.5), linear(), bn.freeze(bn.BatchNorm1d(6))),
        sequential(nn.Dropout(0.5), linear(), nn.BatchNorm1d(6), linear(), nn.BatchNorm1d(6))[2:],
        # A residual branch that is dropped now and then.
        Calls(
            lambda m, x: m.norm(m.linear(x + m.drop(m.linear(x)))),
            linear=linear(),
            drop=nn.Dropout(),
            norm=nn.BatchNorm1d(6),
        ),
    ],
)
def test_no_dropout_before(model: nn.Module) -> None:
    assert found(structure.dropout_before, model) == {}
    assert found(structure.dropout_before, model, ROWS) == {}


def test_dropout_that_makes_no_difference_is_silent() -> None:
    model = sequential(nn.Dropout(0.001), linear(), nn.BatchNorm1d(6))
    assert found(structure.dropout_before, model, ROWS) == {}


# A shared layer.


def twice(first: nn.Module, second: nn.Module, norm: nn.Module) -> nn.Module:
    return Calls(lambda m, x: m.norm(m.b(m.norm(m.a(x)).relu())), a=first, b=second, norm=norm)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_a_shared_layer(norm: Any) -> None:
    model = twice(linear(), linear(), norm(6))
    (finding,) = structure.shared_layer(subject(model, [draw(256, 6, seed=seed) for seed in range(4)]))
    assert (finding.layer, finding.severity) == ("norm", "warning")
    assert "called 2 times" in finding.message
    assert finding.evidence is not None
    assert len(finding.evidence.rows) == 2


def test_a_layer_that_has_two_places_by_name() -> None:
    model = sequential(linear(), nn.BatchNorm1d(6), nn.ReLU(), linear())
    model.append(model[1])
    batches = [draw(256, 6, seed=seed) for seed in range(4)]
    (finding,) = structure.shared_layer(subject(model, batches))
    assert finding.layer == "1"
    exec(finding.remedy, {"model": model})
    assert model[4] is not model[1]
    assert found(structure.shared_layer, model, batches) == {}


def test_towers_that_see_the_same_share_a_layer_rightly() -> None:
    model = Calls(lambda m, x: m.norm(x[::2]) + m.norm(x[1::2]), norm=nn.BatchNorm1d(6))
    assert found(structure.shared_layer, model, ROWS) == {"norm": "info"}


# A layer that is never called.


def test_a_layer_that_is_never_called() -> None:
    model = Calls(lambda m, x: m.used(x), used=nn.BatchNorm1d(6), head=nn.BatchNorm1d(6))
    assert found(structure.never_called, model, ROWS) == {"head": "info"}
    assert found(structure.never_called, model) == {}
    del model.head
    assert found(structure.never_called, model, ROWS) == {}


def test_a_layer_that_could_not_be_examined_is_not_never_called() -> None:
    given = subject(sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6)), ROWS)
    assert given.data is not None
    del given.data.layers["1"]
    given.data.skipped = [bn.population.result.SkippedLayer("1", "frozen")]
    assert list(structure.never_called(given)) == []


# Features last.

SEQUENCES = [draw(8, 5, 6, seed=seed) for seed in range(2)]
LAST = {
    "product": (sequential(linear(), nn.BatchNorm1d(5)), SEQUENCES),
    "activation between": (sequential(linear(), nn.GELU(), nn.Dropout(0.1), nn.BatchNorm1d(5)), SEQUENCES),
    "layer norm": (sequential(nn.LayerNorm(6), nn.BatchNorm1d(5)), SEQUENCES),
    "embedding": (sequential(nn.Embedding(9, 6), nn.BatchNorm1d(5)), [torch.randint(9, (8, 5))]),
    "recurrent": (
        Calls(lambda m, x: m.norm(m.rnn(x)[0]), rnn=nn.GRU(6, 7, batch_first=True), norm=nn.BatchNorm1d(5)),
        SEQUENCES,
    ),
    "transformer": (
        sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.BatchNorm1d(5)),
        SEQUENCES,
    ),
    "residual": (
        Calls(lambda m, x: m.norm(x + m.linear(x)), linear=linear(), norm=nn.BatchNorm1d(5)),
        SEQUENCES,
    ),
    "ours": (sequential(linear(), bn.BatchNorm1d(5)), SEQUENCES),
}


@pytest.mark.parametrize("name", LAST)
def test_features_last_normalised_over_positions(name: str) -> None:
    model, batches = LAST[name]
    (finding,) = structure.sequence_axis(subject(model, batches))
    assert finding.severity == "error"
    assert finding.layer in ("norm", str(len(list(model.children())) - 1))
    exec(finding.remedy, {"model": model, "bn": bn})
    assert found(structure.sequence_axis, model, batches) == {}


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (sequential(linear(), nn.BatchNorm1d(6)), ROWS),
        (sequential(linear(), bn.BatchNorm1d(6, channel_dim=-1)), SEQUENCES),
        (sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4)), SEQUENCES),
        (sequential(nn.BatchNorm1d(5)), SEQUENCES),
        (Calls(lambda m, x: m.norm(m.linear(x).transpose(1, 2)), linear=linear(), norm=nn.BatchNorm1d(6)), SEQUENCES),
        # A product over positions, channels first.
        (Calls(lambda m, x: m.norm(m.mix(x.transpose(1, 2))), mix=linear(5, 5), norm=nn.BatchNorm1d(6)), SEQUENCES),
        (sequential(nn.Conv1d(5, 4, 1), linear(), nn.BatchNorm1d(4)), SEQUENCES),
    ],
)
def test_channels_first(model: nn.Module, batches: list[Tensor]) -> None:
    assert found(structure.sequence_axis, model, batches) == {}


# Normalised twice.

TWICE = {
    "directly": sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6)),
    "identity between": sequential(nn.BatchNorm1d(6, affine=False), nn.Identity(), bn.BatchNorm1d(6)),
    "a number between": Calls(lambda m, x: m.b(2 * m.a(x) + 1), a=nn.BatchNorm1d(6), b=nn.BatchNorm1d(6)),
    "depthwise between": sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("name", TWICE)
def test_normalised_twice(name: str) -> None:
    model = TWICE[name]
    *_, last = (name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    (finding,) = structure.normalised_twice(subject(model))
    assert (finding.layer, finding.severity) == (last, "info")
    exec(finding.remedy, {"model": model, "torch": torch})
    assert found(structure.normalised_twice, model) == {}


@pytest.mark.parametrize(
    "model",
    [
        sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6)),
        sequential(bn.BatchNorm1d(6, activation="relu"), nn.BatchNorm1d(6)),
        sequential(nn.BatchNorm1d(6), linear(), nn.BatchNorm1d(6)),
        sequential(nn.BatchNorm2d(3), conv(3, 3, groups=3), nn.BatchNorm2d(3)),
        sequential(bn.freeze(bn.BatchNorm1d(6)), bn.BatchNorm1d(6)),
        Calls(lambda m, x: m.b(m.a(x) + x), a=nn.BatchNorm1d(6), b=nn.BatchNorm1d(6)),
        sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)),
    ],
)
def test_normalised_once(model: nn.Module) -> None:
    assert found(structure.normalised_twice, model) == {}


# All of them.


def test_a_state_dict_and_models_that_cannot_run_say_nothing() -> None:
    state = subject_of_state(sequential(linear(), nn.BatchNorm1d(6)))
    lazy = subject(sequential(linear(), nn.LazyBatchNorm1d()))
    meta = subject(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).to("meta"))
    for check in structure.CHECKS:
        assert list(check.run(state)) == []
        codes = {finding.code for given in (lazy, meta) for finding in check.run(given)}
        assert codes <= {"BN201"}


def subject_of_state(model: nn.Module) -> Any:
    from batchnorm.diagnosis.subject import subject_of_state_dict

    return subject_of_state_dict(model.state_dict())


@pytest.mark.parametrize("size", [8, 16])
def test_a_residual_network_in_order(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8), Block(8))
    given = subject(model, batches_of(draw(64, 3, 12, 12), size))
    for check in structure.CHECKS:
        assert list(check.run(given)) == []
