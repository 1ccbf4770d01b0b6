"""The entry point: what it takes, what it says, and that it leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.check import check_state_dict
from batchnorm.errors import CountError, OptionError
from diagnosis.networks import healthy, labelled


def traces(model: nn.Module) -> list[Any]:
    """What must not change."""
    return [
        [(name, value.clone()) for name, value in model.state_dict().items()],
        [m.training for m in model.modules()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("ours", [False, True])
def test_a_healthy_network_has_nothing(ours: bool) -> None:
    model, batches = healthy(ours=ours), labelled()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].eval()
    before = traces(model)
    model[3].train()
    model.train()
    before = traces(model)
    report = bn.check(model, batches, loss=F.cross_entropy, second=labelled(seed=5))
    assert same(traces(model), before)
    assert report.ok, report
    assert (report.batches, report.samples) == (8, 64)
    assert report.modes is None
    assert [layer.name for layer in report.layers] == ["1", "4", "7"]
    assert all(layer.off is not None and layer.off < 1e-5 for layer in report.layers)
    assert report.layers[0].input_shape == (8, 3 + 5, 6, 6)


def test_without_data_the_layers_alone() -> None:
    model = healthy()
    model[4].momentum = 0.9
    report = bn.check(model)
    assert ("BN101", "4") in [(f.code, f.layer) for f in report.findings]
    assert (report.batches, report.passes, report.samples) == (0, 0.0, None)
    assert bn.check(model, ignore="BN101").ok
    assert bn.check(model, select="BN3").findings == ()


def test_wrong_statistics_are_told_with_what_they_do() -> None:
    model, batches = healthy(), labelled()
    model[4].running_mean += 2
    before = traces(model)
    report = bn.check(model, iter(batches), loss=F.cross_entropy)
    assert same(traces(model), before)
    assert [(f.code, f.layer) for f in report.findings if f.severity != "info"] == [("BN301", "4")]
    assert not report.ok
    assert report.modes is not None
    assert [mode.name for mode in report.modes] == ["running", "exact", "batch"]
    assert report.attribution is not None
    assert report.attribution[0].layer == "4"
    assert report.passes <= 2.5


@pytest.mark.parametrize("where", ["batches", "model", "loss", "interrupt"])
def test_after_an_exception_all_is_as_before(where: str) -> None:
    model, batches = healthy(), labelled()
    model[4].running_mean += 2

    class Broken(nn.Module):
        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            Broken.calls += 1
            if Broken.calls == 14:
                raise KeyboardInterrupt if where == "interrupt" else RuntimeError("broken")
            return self.inner(x)

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    def cut_short() -> Any:
        yield from batches[:3]
        raise RuntimeError("broken")

    net = Broken(model) if where in ("model", "interrupt") else model
    before = traces(net)
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else RuntimeError):
        bn.check(
            net,
            cut_short() if where == "batches" else batches,
            loss=broken if where == "loss" else F.cross_entropy,
        )
    assert same(traces(net), before)


def test_what_cannot_be_asked_for() -> None:
    model = healthy()
    with pytest.raises(OptionError, match="got loss without batches"):
        bn.check(model, loss=F.cross_entropy)
    with pytest.raises(OptionError, match="got second without batches"):
        bn.check(model, second=labelled())
    with pytest.raises(OptionError, match="got select='BN9'"):
        bn.check(model, select="BN9")
    with pytest.raises(CountError, match="got 0 batches"):
        bn.check(model, [])
    with pytest.raises(OptionError, match=r"batches must be \(input, target\)"):
        bn.check(model, [x for x, _ in labelled()], loss=F.cross_entropy)


def test_progress_and_other_forwards() -> None:
    model, told = healthy(), []
    batches = [{"image": x, "label": y} for x, y in labelled()]
    report = bn.check(
        model,
        batches,
        forward=lambda net, batch: net(batch["image"]),
        progress=lambda done, total: told.append((done, total)),
    )
    assert report.ok
    assert told[-1][0] > 0


def test_a_state_dict() -> None:
    state = healthy().state_dict()
    report = check_state_dict(state)
    assert report.ok
    assert [layer.name for layer in report.layers] == ["1", "4", "7"]
    with pytest.raises(OptionError, match="fix"):
        report.fix()


def test_wrapped_and_compiled_models_are_looked_into() -> None:
    model, batches = healthy(), labelled()
    model[4].running_mean += 2
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for net in (model, compiled):
        assert [f.layer for f in bn.check(net, batches, select="BN301").findings] == ["4"]


def test_inside_of_no_grad_and_inference_mode() -> None:
    model, batches = healthy(), labelled()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert bn.check(model, batches, loss=F.cross_entropy).ok


def test_dropout_before_a_recalibrated_layer_is_an_information() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 8), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 4) for _ in range(8)]
    for _ in range(30):
        for x in batches:
            model(x)
    for severity in ("warning", "info"):
        assert [(f.layer, f.severity) for f in bn.check(model, batches, select="BN202").findings] == [("4", severity)]
        bn.recalibrate(model, batches)


def test_layers_that_wait_for_their_first_input_stay_as_they_are() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert bn.check(model).findings == ()
    with pytest.raises(OptionError, match='got a model whose "0" has not been initialised yet'):
        bn.check(model, [torch.randn(8, 4)])
    assert isinstance(model[1], nn.LazyBatchNorm1d)


def test_layers_that_cannot_be_seen_are_listed() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    for model, name in ((scripted, "1"), (nn.Sequential(scripted), "0.1")):
        for batches in (None, [torch.randn(8, 4)]):
            report = bn.check(model, batches)
            assert [layer.name for layer in report.skipped] == [name]
            assert "TorchScript" in report.skipped[0].reason
            assert report.layers == ()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_data_without_a_finite_batch(value: float) -> None:
    model = healthy()
    before = traces(model)
    report = bn.check(model, [torch.full((4, 3, 8, 8), value)])
    assert same(traces(model), before)
    assert [(f.code, f.layer) for f in report.findings if f.severity == "error"] == [("BN305", "1")]


def test_a_training_pass_that_fails_is_listed() -> None:
    model, batches = healthy(), labelled()
    before = traces(model)

    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: torch.Tensor) -> Any:
            return (self.net(x), None) if self.training else self.net(x)

    report = bn.check(TwoOutputs(), batches, loss=F.cross_entropy)
    assert report.ok
    ((name, reason),) = report.skipped
    assert name == "the model itself"
    assert reason.startswith("no gradients, because a training pass raised TypeError: ")
    assert same(traces(model), before)
    model[1].eps = 0.0
    report = bn.check(model, batches, loss=F.cross_entropy)
    assert [f.code for f in report.findings if f.severity != "info"] == ["BN103"]
    assert "eps must be positive" in report.skipped[0].reason
