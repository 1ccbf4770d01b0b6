"""Frozen layers: three switches, and nothing that moves them again."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.statistics import Frozen
from support.comparison import close
from support.torch_options import BIAS_FALSE

EVERY = [Frozen(*switches) for switches in itertools.product((False, True), repeat=3)]
X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1
CHOICES = {"normalization": True, "statistics": True, "affine": True}


def made(cls: Any = bn.BatchNorm1d, **options: Any) -> Any:
    """A layer that has seen something, with parameters that are not the initial ones."""
    layer = cls(3, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        if layer.running_mean is not None:
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2), layer.num_batches_tracked.fill_(4)
    return layer


def frozen(model: Any, switches: Frozen) -> Any:
    return bn.freeze(model, **switches._asdict())


def step(layer: nn.Module, x: Tensor = X) -> Tensor:
    """A training step as a user writes it, with everything that moves what can move."""
    parameters = list(layer.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1) if parameters else None
    y = layer.train()(x)
    loss = y.square().sum() + (x * 0).requires_grad_().sum()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return y.detach()


def stands_still(layer: Any, act: Callable[[], object], but: tuple[str, ...] = ()) -> None:
    """`act` changes what is named in `but`, all of it, and nothing else."""
    before = copy.deepcopy(layer.state_dict())
    act()
    changed = {key for key, value in layer.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == set(but)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")


# --- the switches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", EVERY, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_each_switch_alone_and_all_together(switches: Frozen, momentum: float | None) -> None:
    layer, torch_layer = made(momentum=momentum), made(nn.BatchNorm1d, momentum=momentum)
    assert frozen(layer, switches) is layer
    assert layer.frozen == switches
    assert layer.momentum == momentum
    moving = () if switches.statistics else STATISTICS
    expected = copy.deepcopy(torch_layer).train(not switches.normalization)(X)
    torch_layer(X)
    learning = () if switches.affine else AFFINE
    outputs = []
    stands_still(layer, lambda: outputs.append(step(layer)), moving + learning)
    close(outputs[0], expected)
    if moving:
        for name in STATISTICS:
            torch.testing.assert_close(getattr(layer, name), getattr(torch_layer, name))
    assert [p.requires_grad for p in layer.parameters()] == [not switches.affine] * 2


@pytest.mark.parametrize("switches", EVERY, ids=str)
def test_the_gradient_of_the_input_goes_on(switches: Frozen) -> None:
    layer, torch_layer = (
        frozen(made(activation="silu"), switches),
        made(nn.BatchNorm1d).train(not switches.normalization),
    )
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    dy = torch.randn(X.shape)
    (layer(inputs[0]) * dy).sum().backward(), (F.silu(torch_layer(inputs[1])) * dy).sum().backward()
    assert inputs[0].grad is not None
    close(inputs[0].grad, inputs[1].grad)
    for p, q in zip(layer.parameters(), torch_layer.parameters(), strict=True):
        if switches.affine:
            assert p.grad is None
        else:
            assert p.grad is not None
            close(p.grad, q.grad)


def test_by_default_everything_is_frozen_and_normalization_goes_with_the_statistics() -> None:
    assert bn.freeze(made()).frozen == Frozen(True, True, True)
    assert bn.freeze(made(), affine=False).frozen == Frozen(True, True, False)
    assert bn.freeze(made(), statistics=False).frozen == Frozen(False, False, True)
    assert made().frozen == Frozen()


@pytest.mark.parametrize(
    "cls", [(bn.BatchNorm1d, nn.BatchNorm1d, (6, 3)), (bn.BatchNorm2d, nn.BatchNorm2d, (6, 3, 4, 5))]
)
@pytest.mark.parametrize("options", [{}, {"affine": False}, *BIAS_FALSE, {"dtype": torch.float64}], ids=str)
def test_a_frozen_layers_output_is_torchs_in_inference(cls: Any, options: dict[str, Any]) -> None:
    ours, torch_class, shape = cls
    layer, x = bn.freeze(made(ours, **options)), torch.randn(shape, dtype=options.get("dtype"))
    close(layer.train()(x), made(torch_class, **options).eval()(x))
    mask = torch.arange(6) > 2
    close(layer(x, residual=x, mask=mask), made(torch_class, **options).eval()(x) + x)


def test_one_value_and_masks_are_fine_where_nothing_is_taken_from_the_batch() -> None:
    layer = bn.freeze(made(virtual_batch_size=1))
    close(layer(X[:1, :, 0]), made(nn.BatchNorm1d).eval()(X[:1, :, 0]))


def test_without_running_statistics_the_batch_is_what_there_is() -> None:
    layer = bn.freeze(made(track_running_stats=False))
    close(layer(X), made(nn.BatchNorm1d, track_running_stats=False)(X))


# --- nothing thaws it ------------------------------------------------------------------------------------------------


def through_state_dict(model: Any) -> Any:
    state = made().state_dict()
    model.load_state_dict({f"0.{key}": value for key, value in state.items()})
    return model


def through_learning(model: Any) -> Any:
    return model.requires_grad_(True)


STICKY: dict[str, Callable[[Any], Any]] = {
    "train": lambda model: model.train(),
    "eval and train": lambda model: model.eval().train(),
    "requires_grad_": through_learning,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "load_state_dict": through_state_dict,
    "to": lambda model: model.to(torch.float64).to(torch.float32),
    "convert": bn.convert,
    "a parent's freeze of something else": lambda model: bn.freeze(nn.Sequential(made(), *model))[1:],
}


@pytest.mark.parametrize("case", STICKY)
def test_it_is_sticky(case: str) -> None:
    model = STICKY[case](bn.freeze(nn.Sequential(made())))
    layer = model[0]
    assert layer.frozen == Frozen(True, True, True)
    stands_still(layer, lambda: step(model))
    close(model(X), made(nn.BatchNorm1d).eval()(X))


@pytest.mark.parametrize("switches", EVERY, ids=str)
def test_copies_have_the_same_switches_and_thaw_alone(switches: Frozen) -> None:
    layer = frozen(made(), switches)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.frozen == switches
        assert type(other.frozen) is Frozen
        assert [p.requires_grad for p in other.parameters()] == [not switches.affine] * 2
        bn.unfreeze(other)
        assert [p.requires_grad for p in other.parameters()] == [True] * 2
        assert layer.frozen == switches
    assert [p.requires_grad for p in layer.parameters()] == [not switches.affine] * 2


def test_no_gradient_reaches_gamma_and_beta_though_they_ask_for_it() -> None:
    layer = bn.freeze(made()).requires_grad_(True)
    x = X.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is layer.bias.grad is None


def test_a_gradient_from_before_is_not_applied() -> None:
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    layer(X).square().sum().backward()
    optimizer.step()
    layer(X).square().sum().backward()
    bn.freeze(layer)
    stands_still(layer, optimizer.step)


def test_loading_into_a_frozen_model_loads() -> None:
    layer, other = bn.freeze(bn.BatchNorm1d(3)), made(nn.BatchNorm1d)
    layer.load_state_dict(other.state_dict())
    close(layer(X), other.eval()(X))
    assert layer.frozen == Frozen(True, True, True)


def test_the_state_dict_is_torchs() -> None:
    ours, torch_state = bn.freeze(made()).state_dict(), made(nn.BatchNorm1d).state_dict()
    assert list(ours) == list(torch_state)
    assert ours._metadata == torch_state._metadata
    assert all(torch.equal(ours[key], torch_state[key]) for key in torch_state)
    made(nn.BatchNorm1d).load_state_dict(ours)


def test_it_is_shown() -> None:
    layer = made()
    before = repr(layer)
    assert "frozen=Frozen(normalization=True, statistics=True, affine=False)" in repr(bn.freeze(layer, affine=False))
    assert repr(bn.unfreeze(layer)) == before


# --- unfreeze --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", EVERY, ids=str)
def test_unfreeze_restores(switches: Frozen) -> None:
    model = nn.Sequential(made())
    before = vars(model[0]).keys()
    frozen(model, switches)
    assert bn.unfreeze(model) is model
    assert model[0].frozen == Frozen()
    assert vars(model[0]).keys() == before
    torch_model = nn.Sequential(made(nn.BatchNorm1d))
    stands_still(model[0], lambda: close(step(model), step(torch_model)), STATISTICS + AFFINE)
    for key, value in torch_model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_what_did_not_learn_before_does_not_learn_after() -> None:
    layer = made()
    layer.bias.requires_grad_(False)
    for _ in range(2):
        bn.freeze(layer)  # twice is as once
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    bn.unfreeze(copy.deepcopy(layer))
    bn.unfreeze(layer)
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
    layer.weight.requires_grad_(False)
    assert [p.requires_grad for p in bn.unfreeze(layer).parameters()] == [False, False]  # it froze nothing


def test_a_second_freeze_sets_all_switches_anew() -> None:
    layer = bn.freeze(made())
    bn.freeze(layer, statistics=False).requires_grad_(True)
    assert layer.frozen == Frozen(False, False, True)
    bn.freeze(layer, statistics=False)
    assert not layer.weight.requires_grad
    bn.freeze(layer, affine=False)
    assert layer.frozen == Frozen(True, True, False)
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_parameters_of_two_layers_learn_again() -> None:
    a, b = made(), made()
    b.weight = a.weight
    model = nn.ModuleList([a, b])
    bn.unfreeze(bn.freeze(model))
    assert all(p.requires_grad for p in model.parameters())


# --- which layers ----------------------------------------------------------------------------------------------------


def test_all_of_ours_at_every_depth_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 3), made(), nn.Sequential(made(bn.BatchNorm), nn.Linear(3, 3)))
    bn.freeze(model)
    assert model[1].frozen == model[2][0].frozen == Frozen(True, True, True)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"0.weight", "0.bias", "2.1.weight", "2.1.bias"}


def test_torchs_layers_are_named() -> None:
    model = nn.Sequential(made(), nn.Sequential(nn.BatchNorm1d(3)), nn.SyncBatchNorm(3))
    message = r"not frozen, because these layers are torch.nn's: 1\.0, 2\. Use batchnorm\.convert\(model\) first"
    with pytest.warns(UserWarning, match=message) as caught:
        bn.freeze(model)
    assert [w.filename for w in caught] == [__file__]
    assert model[0].frozen == Frozen(True, True, True)
    assert model[1][0].weight.requires_grad
    with pytest.warns(UserWarning, match="the model itself"):
        bn.freeze(nn.BatchNorm1d(3))
    bn.unfreeze(model)  # warnings are errors here


def test_convert_leaves_what_is_frozen_and_freezes_nothing() -> None:
    model = nn.Sequential(bn.freeze(made()), nn.BatchNorm1d(3))
    bn.convert(model)
    assert model[0].frozen == Frozen(True, True, True)
    assert model[1].frozen == Frozen()


def test_computed_weights() -> None:
    """A pruned weight and a parametrized one are no parameters; no gradient reaches what they are computed from."""
    pruned, parametrized = made(), made()
    prune.custom_from_mask(pruned, "weight", torch.tensor([1, 0, 1]))
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for layer, source in ((pruned, pruned.weight_orig), (parametrized, parametrized.parametrizations.weight.original)):
        bn.freeze(layer)
        layer(X.clone().requires_grad_()).square().sum().backward()
        assert source.grad is None
        bn.unfreeze(layer)
        layer(X).square().sum().backward()
        assert source.grad is not None


# --- data parallel ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, on a port that is free."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("affine", [True, False])
def test_data_parallel(affine: bool) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv1d(3, 3, 1), made())
    torch_model = nn.Sequential(copy.deepcopy(ours[0]), made(nn.BatchNorm1d).eval())
    bn.freeze(ours, affine=affine)
    torch_model[1].requires_grad_(not affine)
    parallel = DistributedDataParallel(ours)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, torch_model)]

    def steps() -> None:
        for _ in range(3):
            for model, optimizer in zip((parallel.train(), torch_model), optimizers, strict=True):
                optimizer.zero_grad()
                model(X).square().mean().backward()
                optimizer.step()

    stands_still(ours[1], steps, () if affine else AFFINE)
    for p, q in zip(ours.parameters(), torch_model.parameters(), strict=True):
        close(p.detach(), q.detach())
    assert ours[1].frozen == Frozen(True, True, affine)
