"""Folded models compute what the originals do, the originals stay, and what cannot be right is refused and named."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery import linear
from batchnorm.surgery.fold import fold
from batchnorm.surgery.scale_shift import ScaleShift
from support import tolerances
from support.networks import Block, Calls, Untraceable, draw, used

Norm = nn.modules.batchnorm._BatchNorm


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Norm)]


def check(model: nn.Module, *inputs: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Fold a used model, compare it with the original, and see that the original is as before."""
    used(model).to(dtype)
    before = {path: type(module) for path, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    folded = fold(model, inputs)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in folded.modules())
    relative, absolute = tolerances.AGAINST_TORCH[dtype]
    torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=relative, atol=absolute)
    assert folded.report.error <= absolute
    return folded


# --- what folds ------------------------------------------------------------------------------------------------------

C = 4
PAIRS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "conv1d": ([nn.Conv1d(C, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6)], (2, C, 5)),
    "conv2d": ([nn.Conv2d(C, 6, 3, stride=2), nn.BatchNorm2d(6)], (2, C, 7, 7)),
    "conv2d, groups": ([nn.Conv2d(C, 8, 3, groups=2, dilation=2), nn.BatchNorm2d(8, affine=False)], (2, C, 7, 7)),
    "conv3d": ([nn.Conv3d(C, 6, 2), nn.BatchNorm3d(6, eps=1e-2)], (2, C, 3, 3, 3)),
    "transposed 1d": ([nn.ConvTranspose1d(C, 6, 3, groups=2), nn.BatchNorm1d(6)], (2, C, 5)),
    "transposed 2d": ([nn.ConvTranspose2d(C, C, 3, stride=2, padding=1), nn.BatchNorm2d(C)], (2, C, 5, 5)),
    "transposed 2d, groups": ([nn.ConvTranspose2d(C, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)], (2, C, 5, 5)),
    "transposed 3d": ([nn.ConvTranspose3d(C, 6, 2), nn.BatchNorm3d(6)], (2, C, 3, 3, 3)),
    "linear": ([nn.Linear(C, 6, bias=False), nn.BatchNorm1d(6)], (5, C)),
    "features last": ([nn.Linear(C, C), bn.BatchNorm1d(C, channel_dim=-1)], (5, C, C)),
    "sync": ([nn.Conv2d(C, 6, 1), nn.SyncBatchNorm(6)], (2, C, 3, 3)),
    "ours": ([nn.Conv2d(C, 6, 1), bn.BatchNorm2d(6)], (2, C, 3, 3)),
    "before a convolution": ([nn.BatchNorm2d(C), nn.Conv2d(C, 6, 3, groups=2)], (2, C, 5, 5)),
    "before reflected borders": (
        [nn.BatchNorm2d(C), nn.Conv2d(C, 6, 3, padding=1, padding_mode="reflect")],
        (2, C, 5, 5),
    ),
    "before linear": ([nn.BatchNorm1d(C), nn.Linear(C, 6, bias=False)], (5, C)),
    "two after": ([nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], (2, C, 5, 5)),
    "two before": ([nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.Conv2d(C, 6, 3)], (2, C, 5, 5)),
    "before and after": ([nn.BatchNorm2d(C), nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6)], (2, C, 5, 5)),
    "dropout between": ([nn.Linear(C, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)], (5, C)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_becomes_one(name: str) -> None:
    layers, shape = copy.deepcopy(PAIRS[name])
    folded = check(nn.Sequential(*layers), draw(*shape))
    assert not norms(folded)
    assert not any(isinstance(module, ScaleShift) for module in folded.modules())
    assert len(folded.report) == len(norms(nn.Sequential(*layers)))
    assert all(entry.done and entry.what.startswith("part of ") for entry in folded.report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Weights are rounded once: no further from the truth than the original, but for the sums' own rounding."""
    layers, shape = copy.deepcopy(PAIRS[name])
    model, x = used(nn.Sequential(*layers)).to(dtype), draw(*shape, dtype=dtype)
    folded = fold(model, x)
    assert all(entry.done for entry in folded.report)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    y = folded(x)
    assert y.dtype == dtype
    relative, absolute = tolerances.AGAINST_TORCH[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=relative, atol=absolute * float(exact.abs().max()))


def test_weights_are_rounded_once() -> None:
    model = used(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)))
    folded = fold(model, draw(2, 3, dtype=torch.float32))
    first, second = (
        (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).view(-1, 1) for norm in model[1:]
    )
    assert torch.equal(folded[0].weight, (model[0].weight.double() * first * second).float())


def test_a_residual_network() -> None:
    folded = check(nn.Sequential(Block(3), Block(3, projected=True), Block(3, bn.BatchNorm2d)), draw(2, 3, 6, 6))
    assert not norms(folded)
    assert folded.report.done["1.downsample.1"] == "part of 1.downsample.0"
    assert type(folded[0].bn1) is nn.Identity
    assert type(folded[0]) is Block


@pytest.mark.parametrize("activation", ["relu", "silu", "elu"])
def test_an_activation_inside_stays(activation: str) -> None:
    folded = check(nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation=activation)), draw(2, 3, 5, 5))
    assert not norms(folded)


def test_a_residual_inside_stays() -> None:
    model = Calls(
        lambda m, x: m.norm(m.conv(x), residual=x),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        norm=bn.BatchNorm2d(3, activation="relu"),
    )
    folded = check(model, draw(2, 3, 5, 5))
    assert not norms(folded)
    assert folded.norm.scale is None


def test_an_activation_inside_ends_a_chain() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), bn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    folded = check(model, draw(2, 3, 5, 5))
    assert folded.report.done == {"1": "part of 0", "2": "part of 3"}


def test_a_shared_block_folds_where_all_its_calls_fit() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    folded = check(nn.Sequential(block, block), draw(2, 3, 5, 5))
    assert not norms(folded)
    assert folded[0] is folded[1]


def test_the_root_may_be_a_layer() -> None:
    folded = check(nn.BatchNorm2d(3), draw(2, 3, 4, 4))
    assert type(folded) is ScaleShift
    assert folded.report.done[""].startswith("a scale and shift, because it is the model itself")


def test_a_layer_alone_becomes_a_scale_and_shift() -> None:
    folded = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()), draw(2, 3, 5, 5))
    assert type(folded[2]) is ScaleShift
    assert folded.report.done == {"2": "a scale and shift, because no linear layer stands directly before it"}


def test_keywords_and_structured_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, y: Tensor | None = None, *, twice: bool = False) -> dict[str, Any]:
            z = self.norm(self.conv(x if y is None else x + y))
            return {"z": z + z if twice else z, "parts": [x], "n": 1}

    model, x = used(Model().double()), draw(2, 3, 5, 5)
    folded = fold(model, {"x": x, "twice": True})
    assert not norms(folded)
    for inputs in ({"x": x}, {"x": x, "y": x}, {"x": x, "twice": True}):  # the code is still the model's
        torch.testing.assert_close(folded(**inputs), model(**inputs))


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    part = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    folded = check(Untraceable(part, Block(3), nn.BatchNorm2d(3)), draw(2, 3, 6, 6))
    assert folded.report.done["parts.0.1"] == "part of parts.0.0"
    assert folded.report.done["parts.1.bn2"] == "part of parts.1.conv2"
    assert "the model is not traceable: symbolically traced variables cannot be used" in folded.report.done["parts.2"]
    assert not norms(folded)
    zeros = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(folded(zeros), zeros)  # the other way through the code is still there


# --- what is refused -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


class Borrowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.norm(self.a(x))), self.a.weight)


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(3, 3, 3, padding=1, **options)


ALONE: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "(N, L, C) with L == C": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        (5, 4, 4),
        "its channels are dimension 1 of (5, 4, 4), those of 0 dimension 2",
    ),
    "(C, L)": (
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(5)),
        (3, 5),
        "its channels are dimension 1 of (4, 5), those of 0 none",
    ),
    "one convolution, two layers": (
        Calls(lambda m, x: m.a(y := m.conv(x)) + m.b(y), conv=conv(), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3)),
        (2, 3, 5, 5),
        "the output of conv has 2 readers",
    ),
    "the output is read elsewhere": (
        Calls(lambda m, x: m.a(y := m.conv(x)) + y, conv=conv(), a=nn.BatchNorm2d(3)),
        (2, 3, 5, 5),
        "the output of conv has 2 readers",
    ),
    "a convolution used twice": (
        Calls(lambda m, x: m.b(m.conv(m.a(m.conv(x)))), conv=conv(), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3)),
        (2, 3, 5, 5),
        "conv is called 2 times, not always before it",
    ),
    "a layer used twice": (
        Calls(lambda m, x: m.a(m.d(m.a(m.c(x)))), c=conv(), d=conv(), a=nn.BatchNorm2d(3)),
        (2, 3, 5, 5),
        "it is called 2 times, after different modules",
    ),
    "tied parameters": (Tied(), (5, 4), "others use the parameters of a too"),
    "a borrowed weight": (Borrowed(), (5, 4), "others use the parameters of a too"),
    "zero padding behind": (
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), conv()),
        (2, 3, 5, 5),
        "no linear layer stands directly before it; not into 2 either: the convolution pads with zeros",
    ),
    "a transposed convolution behind": (
        nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 3)),
        (2, 3, 5, 5),
        "not into 1 either: the outputs of a transposed convolution see different parts",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_layer_that_cannot_fold_stands_alone_with_the_reason(name: str) -> None:
    model, shape, reason = ALONE[name]
    folded = check(copy.deepcopy(model), draw(*shape))
    assert not norms(folded)
    assert any(isinstance(module, ScaleShift) for module in folded.modules())
    reasons = [entry.what for entry in folded.report]
    assert any(what.startswith("a scale and shift, because ") and reason in what for what in reasons), reasons


class Mine(nn.BatchNorm2d):
    """May do anything."""


def test_what_stays_as_it_is() -> None:
    unreached, hooked = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    hooked.register_forward_hook(lambda *_: None)
    model = Calls(
        lambda m, x: m.hooked(m.mine(m.stateless(x))),
        hooked=hooked,
        mine=Mine(3),
        stateless=nn.BatchNorm2d(3, track_running_stats=False),
        unreached=unreached,
    )
    folded = check(model, draw(2, 3, 5, 5))
    assert folded.report.left == {
        "hooked": "it has hooks, which would not be called",
        "mine": "Mine may do anything",
        "stateless": "it has no running statistics, so inference depends on the batch",
        "unreached": "the example inputs do not reach it",
    }
    assert len(norms(folded)) == 4


def test_a_convolution_with_hooks_stays_as_it_is() -> None:
    model, seen = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    x = draw(2, 3, 4, 4)
    folded = check(model, x)
    seen.clear()
    folded(x), model(x)
    assert torch.equal(seen[0], seen[1])
    assert "0 has hooks, which would see other values" in folded.report.done["1"]


def test_a_parametrized_convolution_is_none_that_we_know() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    folded = check(model, draw(2, 3, 4, 4))
    assert type(folded[1]) is ScaleShift


def test_a_fold_that_changes_the_output_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.after

    def wrong(layer: Any, weights: Any, affine: Any) -> Any:
        result = right(layer, weights, affine)
        return result._replace(bias=result.bias + 1e-3) if layer.module.out_channels == 5 else result

    monkeypatch.setattr(linear, "after", wrong)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    folded = check(model, draw(2, 3, 4, 4))
    assert folded.report.done["4"] == "part of 3"
    assert folded.report.done["1"].startswith("a scale and shift, because as part of 0 it is off by ")
    assert type(folded[1]) is ScaleShift


def test_a_layer_that_is_called_behind_the_models_back_undoes_all() -> None:
    model = Calls(lambda m, x: m.hidden[0](m.conv(x)), conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    model.hidden = [model.norm]
    folded = check(model, draw(2, 3, 4, 4))
    assert "the whole model folded is off by" in folded.report.left["norm"]
    assert type(folded.norm) is nn.BatchNorm2d


def test_a_layer_whose_attributes_are_read_undoes_all() -> None:
    model = Calls(lambda m, x: m.norm(m.conv(x)) * m.norm.eps, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    folded = check(model, draw(2, 3, 4, 4))
    assert folded.report.left["norm"].startswith("the model reads what is no longer there: 'Identity' object has no ")
    assert type(folded.norm) is nn.BatchNorm2d


def test_overflow_in_half_precision_becomes_a_scale_and_shift() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1e-30)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(0.5), model[0].bias.zero_(), model[1].running_var.fill_(6e-8)
        model[1].weight.fill_(1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        folded = fold(model, draw(2, 3, 4, 4, dtype=torch.float16) * 1e-3)
    assert folded.report.done["1"].startswith("a scale and shift, because as part of 0 it is off by inf")


# --- what it says ----------------------------------------------------------------------------------------------------


def test_large_scales_are_warned_of_once() -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1e-12), nn.ReLU(), nn.BatchNorm2d(3)))
    model[1].running_var[1] = 1e-14
    with pytest.warns(UserWarning, match=r"more than 1e\+04: 1 \(\de\+06\)\. Their running variance") as caught:
        fold(model.double(), draw(2, 3, 4, 4))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_report_prints() -> None:
    folded = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Mine(4)), draw(2, 3, 5, 5))
    lines = str(folded.report).splitlines()
    assert lines[0].startswith("1 of 2 folded, outputs differ by at most ")
    assert lines[1:] == ["1  part of 0", "2  left: Mine may do anything"]


def test_wrong_example_inputs_are_named() -> None:
    with pytest.raises(bn.BatchNormError, match="got example_inputs of str; it must be a tensor, a tuple"):
        fold(nn.Sequential(nn.BatchNorm2d(3)), "x")


def test_a_model_in_training_is_folded_for_inference_and_stays_in_training() -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    state = copy.deepcopy(model.state_dict())
    folded = fold(model, draw(2, 3, 5, 5, dtype=torch.float32))
    assert model[1].training
    assert not folded[1].training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not norms(folded)


def test_a_folded_model_folds_again_to_the_same() -> None:
    folded = check(nn.Sequential(Block(3), nn.BatchNorm2d(3)), draw(2, 3, 5, 5))
    again = fold(folded, draw(2, 3, 5, 5))
    assert len(again.report) == 0
    assert torch.equal(again(draw(2, 3, 5, 5)), folded(draw(2, 3, 5, 5)))
