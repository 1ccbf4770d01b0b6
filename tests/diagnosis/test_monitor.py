"""Which steps a monitor records, and that it leaves training alone."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchnorm as bn
from batchnorm.diagnosis.records import LayerRecord
from batchnorm.errors import OptionError, UsageError
from diagnosis.training import LAYERS, batch, hooks, loss, network, sgd, state, train
from support import tolerances
from support.comparison import close


def steps(monitor: bn.Monitor) -> list[tuple[int, str]]:
    return [(record.step, record.layer) for record in monitor.records]


def test_every_so_many_steps() -> None:
    model = network()
    with bn.Monitor(model, every=3) as monitor:
        train(model, sgd(model), 8)
    assert steps(monitor) == [(step, layer) for step in (3, 6) for layer in LAYERS]
    assert monitor.step == 8


@pytest.mark.parametrize("every", [1, 2])
def test_training_is_the_same_bit_for_bit(every: int) -> None:
    model, plain = network(), network()
    optimizer = sgd(model, momentum=0.9, weight_decay=1e-4)
    with bn.Monitor(model, every=every):
        train(model, optimizer, 6)
    train(plain, sgd(plain, momentum=0.9, weight_decay=1e-4), 6)
    assert state(model) == state(plain)
    assert not hooks(model)
    assert not _global_optimizer_post_hooks


def test_the_gradients_are_those_of_the_step_itself() -> None:
    model, plain = network(), network()
    with bn.Monitor(model, every=1) as monitor:
        train(model, sgd(model), 2)
    train(plain, sgd(plain), 2)
    for record in monitor.records[-len(LAYERS) :]:
        layer = plain.get_submodule(record.layer)
        close(record.weight_gradient, float(layer.weight.grad.double().norm()))
        close(record.bias_gradient, float(layer.bias.grad.double().norm()))


def test_gradients_that_are_clipped_or_unscaled_are_those_that_the_step_used() -> None:
    model = network()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with bn.Monitor(model, every=1) as monitor:
        scaler.scale(loss(model(batch(0)))).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        optimizer.zero_grad()
    total = sum((r.weight_gradient or 0) ** 2 + (r.bias_gradient or 0) ** 2 for r in monitor.records)
    assert 0 < total < 0.1**2


def test_accumulated_passes_are_one_step() -> None:
    model, whole = network(), network()
    with bn.Monitor(model, every=1) as monitor:
        train(model, sgd(model), 3, accumulate=3)
    assert [record.step for record in monitor.records if record.layer == "1"] == [1, 2, 3]
    assert monitor.records[0].count == 2 * 6 * 6, "of the first pass"
    train(whole, sgd(whole), 3, accumulate=3)
    layer = whole.get_submodule("1")
    close(monitor.records[-3].weight_gradient, float(layer.weight.grad.double().norm()))


@pytest.mark.parametrize("zero", [True, False], ids=["gradients are none", "gradients are zero"])
def test_steps_of_other_optimizers(zero: bool) -> None:
    """By hand: nothing tells of a step but that parameters have changed."""
    model = network()
    with bn.Monitor(model, every=1) as monitor:
        for step in range(3):
            for part in batch(step).chunk(2):
                loss(model(part)).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
                    if zero:
                        parameter.grad.zero_()
                    else:
                        parameter.grad = None
    assert monitor.step == 3
    assert (monitor.records[0].weight_gradient is not None) is zero


def test_an_optimizer_whose_steps_no_counter_shows() -> None:
    model = network()
    with bn.Monitor(model, every=1) as monitor:
        train(model, torch.optim.Adam(model.parameters(), fused=True), 3, accumulate=2)
    assert monitor.step == 3


def test_an_optimizer_that_calls_the_model_itself() -> None:
    model = network()
    optimizer = sgd(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (value := loss(model(batch(0)))).backward()
        return value

    with bn.Monitor(model, every=1) as monitor:
        for _ in range(3):
            optimizer.step(closure)
    assert monitor.step == 3
    assert all(record.weight_gradient for record in monitor.records)


def test_steps_of_others_optimizers_are_not_ours() -> None:
    model, other = network(), nn.Linear(2, 2)
    rest = sgd(other)
    with bn.Monitor(model, every=1) as monitor:
        loss(model(batch(0))).backward()
        rest.step()
        assert not monitor.records
        loss(model(batch(1))).backward()
    assert monitor.step == 1


def transformed(model: nn.Module, x: Tensor) -> None:
    """A pass inside a transform of torch.func, which has its own statistics."""
    buffers = {name: buffer[None].clone() for name, buffer in model.named_buffers()}
    torch.func.vmap(lambda buffers: torch.func.functional_call(model, buffers, (x,)))(buffers)


def test_inference_and_passes_without_gradients_are_ignored() -> None:
    model = bn.convert(network())
    optimizer = sgd(model)
    with bn.Monitor(model, every=2) as monitor:
        for step in range(4):
            train(model, optimizer, 1)
            with torch.no_grad():
                model(batch(step))
            model.eval()(batch(step))
            model.train()
            transformed(model, batch(step))
    assert [step for step, layer in steps(monitor) if layer == "1"] == [2, 4]


@pytest.mark.parametrize("whole", [False, True])
def test_passes_that_checkpointing_repeats_are_one(whole: bool) -> None:
    model, plain = bn.convert(network()), bn.convert(network())  # torch.nn's move their statistics twice

    def run(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False) if whole else model(x)

    if not whole:
        model.forward = lambda x: checkpoint_sequential(list(model), 3, x, use_reentrant=False)
    with bn.Monitor(model, every=1) as monitor, bn.Monitor(plain, every=1) as expected:
        train(run, sgd(model), 3)
        train(plain, sgd(plain), 3)
    assert monitor.records == expected.records


def test_an_exception_passes_and_everything_is_detached() -> None:
    model = network()
    optimizer = sgd(model)

    def fails() -> None:
        train(model, optimizer, 1)
        model(torch.randn(2, 3, 3, 3))

    monitor = bn.Monitor(model, every=1)
    with pytest.raises(RuntimeError, match="Kernel size"), monitor:
        fails()
    assert not hooks(model)
    assert not _global_optimizer_post_hooks
    assert steps(monitor) == [(1, layer) for layer in LAYERS]


def test_training_may_go_on_after_an_exception() -> None:
    model = network()
    optimizer = sgd(model)
    with bn.Monitor(model, every=1) as monitor:
        train(model, optimizer, 1)
        optimizer.zero_grad()
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3, 3, 3))
        model.eval()(batch(0))
        model.train()
        assert all(name != "_listeners" for name, _ in hooks(model))
        train(model, optimizer, 1)
    assert [step for step, layer in steps(monitor) if layer == "1"] == [1, 3]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "amid"])
def test_copies_are_not_monitored(how: str) -> None:
    model, copies = network(), []
    if how == "amid":
        model[5].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    with bn.Monitor(model, every=1) as monitor:
        loss(model(batch(0))).backward()
        if how == "pickle":
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
        elif how == "deepcopy":
            copies.append(copy.deepcopy(model))
        other = copies[0]
        if how == "amid":
            other[5]._forward_hooks.clear()
        before = monitor.step
        train(other, sgd(other), 2)
        assert monitor.step == before
    assert {record.step for record in monitor.records} == {1}
    assert not [hook for name, hook in hooks(other) if name in ("_forward_hooks", "_forward_pre_hooks")]
    train(plain := network(), sgd(plain), 1)
    assert state(other).keys() == state(plain).keys()


def test_several_monitors() -> None:
    model = network()
    with bn.Monitor(model, every=1) as first, bn.Monitor(model, every=2) as second:
        train(model, sgd(model), 4)
    shared = [record for record in first.records if record.step % 2 == 0]
    assert [history_aside(record) for record in second.records] == [history_aside(record) for record in shared]
    assert not hooks(model)


def history_aside(record: LayerRecord) -> LayerRecord:
    """What does not depend on which steps were recorded before."""
    return replace(record, drift=None, log_variance_drift=None, noise=None)


def test_monitors_that_end_in_any_order() -> None:
    model = network()
    a, b = bn.Monitor(model, every=1).start(), bn.Monitor(model, every=1).start()
    train(model, sgd(model), 1)
    a.stop()
    train(model, sgd(model), 1)
    b.stop()
    assert (len(a.records), len(b.records)) == (3, 6)
    assert not hooks(model)


def test_a_part_of_a_model_and_a_layer_alone() -> None:
    model = network()
    with bn.Monitor(model[4], every=1) as ours, bn.Monitor(model[1], every=1) as torchs:
        train(model, sgd(model), 2)
    assert steps(ours) == steps(torchs) == [(1, ""), (2, "")]


@pytest.mark.parametrize("inner", [False, True])
def test_a_wrapped_model(inner: bool) -> None:
    model, plain = network(), network()
    wrapped = nn.DataParallel(model)
    with bn.Monitor(model if inner else wrapped, every=1) as monitor, bn.Monitor(plain, every=1) as expected:
        train(wrapped, sgd(model), 2)
        train(plain, sgd(plain), 2)
    assert monitor.records == expected.records


def test_a_model_in_several_processes() -> None:
    """One process is enough to see that the wrapper is called, and the model inside named."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, plain = network(), network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with bn.Monitor(wrapped, every=1) as monitor, bn.Monitor(plain, every=1) as expected:
            train(wrapped, sgd(model), 2)
            train(plain, sgd(plain), 2)
    finally:
        dist.destroy_process_group()
    assert monitor.records == expected.records


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_compiled_model() -> None:
    model, plain = network(), network()
    compiled = torch.compile(model, backend="eager")
    with bn.Monitor(compiled, every=2) as monitor, bn.Monitor(plain, every=2) as expected:
        train(compiled, sgd(model), 4)
        train(plain, sgd(plain), 4)
    assert [(r.step, r.layer, r.count) for r in monitor.records] == [
        (r.step, r.layer, r.count) for r in expected.records
    ]
    for one, other in zip(monitor.records, expected.records, strict=True):
        close(one.batch_mean, other.batch_mean, tolerances.PARTS)  # steps that are not recorded run compiled
    frames = torch._dynamo.utils.counters["frames"]["total"]
    compiled(batch(0))
    assert torch._dynamo.utils.counters["frames"]["total"] == frames, "nothing is compiled again"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_is_compiled_from_outside_says_so(in_place: bool) -> None:
    torch.compiler.reset()
    model = network()
    if in_place:
        model.compile(backend="eager")
    monitor = bn.Monitor(model, every=1).start()
    train(model if in_place else torch.compile(model, backend="eager"), sgd(model), 2)
    with pytest.warns(
        UserWarning, match=r"saw no step of the Sequential; it runs inside torch\.compile, .* give Monitor"
    ):
        monitor.stop()
    assert not monitor.records


def test_a_model_that_is_not_trained_says_so() -> None:
    model = network().eval()
    with (
        pytest.warns(
            UserWarning, match="saw no step of the Sequential; it needs calls of the model itself, in training"
        ),
        bn.Monitor(model),
    ):
        model(batch(0))


def test_a_monitor_may_start_again() -> None:
    model = network()
    monitor = bn.Monitor(model, every=1)
    for _ in range(2):
        with monitor:
            train(model, sgd(model), 1)
    assert [step for step, layer in steps(monitor) if layer == "1"] == [1, 2]
    with monitor, pytest.raises(OptionError, match=r"has been started; stop\(\) it first"):
        monitor.start()
    monitor.stop()


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(OptionError, match=r"got every=.*; it must be a number of steps"):
        bn.Monitor(network(), every=every)


def test_a_model_without_layers() -> None:
    with pytest.raises(OptionError, match="got a Linear without batch-norm layers"):
        bn.Monitor(nn.Linear(2, 2))


def test_a_writer_is_refused_when_the_monitor_starts(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(OptionError, match="got a writer of type int; it must be the path"):
        bn.Monitor(model, writer=3).start()
    with pytest.raises(UsageError, match=r"cannot write to .*no.*such"):
        bn.Monitor(model, writer=tmp_path / "no" / "such").start()
    assert not hooks(model)
