"""`recompute`: the same gradients bit for bit, with less that is kept."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import recording
from batchnorm.errors import OrderError
from batchnorm.memory.values import Saved, Value
from support.networks import Calls
from support.passes import CHANNELS, chain, check, conv, counted, gradients, images, norm, residual, same_bits

# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "hardswish", "mish", "tanh", None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_chain(activation: str | None, memory_format: torch.memory_format) -> None:
    net = chain(activation).to(memory_format=memory_format)
    report = check(net, images().to(memory_format=memory_format)).report
    assert report.recomputed == ("1", "3", "5")
    assert report.left == {}
    assert report.saved == 3 * 4 * CHANNELS * 32 * 32 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert check(chain().to(dtype), images().to(dtype)).report.recomputed == ("1", "3", "5")


def test_autocast() -> None:
    def call(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = net(x)
        return y

    report = check(chain(), images(size=64), call).report
    assert report.recomputed == ("1", "3", "5")
    assert report.saved == 3 * 4 * CHANNELS * 64 * 64 * 2


@pytest.mark.parametrize("fused", [False, True])
def test_residuals(fused: bool) -> None:
    check(residual(fused=fused), images())


@pytest.mark.parametrize(
    "options",
    [{"virtual_batch_size": 2}, {"renorm": bn.Renorm(2.0, 1.0)}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_options_of_layers(options: dict[str, Any]) -> None:
    check(chain(**options), images())


def test_layers_without_parameters_are_known_by_their_statistics_or_counted_together() -> None:
    assert check(chain(affine=False), images()).report.recomputed == ("1", "3", "5")
    report = check(chain(affine=False, track_running_stats=False), images()).report
    assert report.saved == 3 * 4 * CHANNELS * 32 * 32 * 4
    assert report.recomputed == ()


def test_a_mask() -> None:
    mask = torch.rand(4, 32, 32) > 0.5
    net = Calls(lambda net, x: net.b(net.n(net.a(x), mask=mask)), a=conv(3), n=norm(), b=conv())
    assert check(net, images()).report.recomputed == ("n",)


@pytest.mark.parametrize("mode", ["inference", "frozen"])
def test_running_statistics(mode: str) -> None:
    net = chain()
    net = net.eval() if mode == "inference" else bn.freeze(net)
    assert check(net, images()).report.recomputed == ("1", "3", "5")


def test_deferred_statistics_and_accumulated_gradients() -> None:
    def accumulated(net: nn.Module) -> dict[str, Tensor]:
        with bn.deferred(net):
            outputs = [net(images(seed=seed)) for seed in (1, 2, 3)]  # all before the first backward pass
            for y in outputs:
                y.square().mean().backward()
        found = {name: p.grad for name, p in net.named_parameters()}
        return found | dict(net.named_buffers())

    net = chain()
    expected = accumulated(copy.deepcopy(net))
    with bn.recompute(net) as handle:
        same_bits(accumulated(net), expected)
    assert handle.report.recomputed == ("1", "3", "5")


def test_several_backward_passes() -> None:
    def passes(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        y = net(x)
        y.square().mean().backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in net.named_parameters()}
        (part,) = torch.autograd.grad(y.sum(), net[0].weight, retain_graph=True)
        y.sin().mean().backward()
        return first | {f"{name} both": p.grad for name, p in net.named_parameters()} | {"part": part}

    net = residual()
    expected = passes(copy.deepcopy(net), images())
    bn.recompute(net)
    same_bits(passes(net, images()), expected)


def test_higher_derivatives() -> None:
    def second(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
        dx.square().sum().backward()
        return {"dx": dx.detach(), "ddx": x.grad} | {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    net = chain("silu", 2)
    expected = second(copy.deepcopy(net), images())
    handle = bn.recompute(net)
    same_bits(second(net, images()), expected)
    assert handle.report.recomputed == ("1", "3")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_part(reentrant: bool) -> None:
    def call(net: nn.Module, x: Tensor) -> Tensor:
        return net.c(checkpoint(net.b, net.a(x), use_reentrant=reentrant))

    torch.manual_seed(0)
    net = Calls(
        call,
        a=nn.Sequential(conv(3), norm()),
        b=nn.Sequential(conv(), norm(), conv(), norm()),
        c=nn.Sequential(conv(), norm(), conv()),
    )
    report = check(net, images()).report
    assert "c.1" in report.recomputed
    assert "b.1" in report.left


def test_checkpointing_around_all_of_it() -> None:
    net = chain()
    other = copy.deepcopy(net)
    expected = gradients(other, images(), lambda x: checkpoint(other, x, use_reentrant=False))
    bn.recompute(net)
    same_bits(gradients(net, images(), lambda x: checkpoint(net, x, use_reentrant=False)), expected)


# --- what lives how long ---------------------------------------------------------------------------------------------


def outputs_of(model: nn.Module, kind: type[nn.Module] = bn.BatchNorm2d) -> list[weakref.ref[Tensor]]:
    """References to what layers give, filled when the model is called."""
    seen: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
    return seen


@pytest.mark.parametrize("on", [False, True])
def test_outputs_are_gone_after_the_forward_pass(on: bool) -> None:
    net = chain()
    if on:
        bn.recompute(net)
    seen = outputs_of(net)
    y = net(images())
    assert [ref() is None for ref in seen] == [on] * 3
    del y


def test_each_output_is_computed_once() -> None:
    net = chain()
    bn.recompute(net)
    y = net(images()).sum()
    with counted() as calls:
        y.backward()
    assert len(calls) == 3


def two_readers() -> nn.Module:
    torch.manual_seed(0)
    return Calls(
        lambda net, x: [layer(y) for y in [net.n(net.a(x))] for layer in (net.b, net.c)],
        a=conv(3),
        n=norm(),
        b=conv(),
        c=conv(),
    )


def test_an_output_with_several_readers_is_computed_once_and_freed_after_the_last() -> None:
    net = two_readers()
    bn.recompute(net)
    b, c = net(images())
    with counted() as calls:
        (b.sum() + c.sum()).backward()
    assert len(calls) == 1


def living_values() -> int:
    """Values that somebody has computed and that wait for a reader."""
    gc.collect()
    return sum(isinstance(o, Value) and o._computed is not None for o in gc.get_objects())


def test_what_is_computed_waits_for_its_readers_alone() -> None:
    net = two_readers()
    bn.recompute(net)
    b, c = net(images())
    assert living_values() == 0
    torch.autograd.grad(b.sum(), net.b.weight, retain_graph=True)
    assert living_values() == 1  # for c
    with counted() as calls:
        torch.autograd.grad(c.sum(), net.c.weight, retain_graph=True)
    assert calls == []
    assert living_values() == 0
    with counted() as calls:  # all have read: the next backward pass begins anew
        torch.autograd.grad(b.sum() + c.sum(), [net.b.weight, net.c.weight], retain_graph=True)
    assert len(calls) == 1
    assert living_values() == 0


def test_a_reader_that_dies_is_not_waited_for() -> None:
    net = two_readers()
    bn.recompute(net)
    b, c = net(images())
    del c
    torch.autograd.grad(b.sum(), net.b.weight, retain_graph=True)
    assert living_values() == 0


def test_nothing_outlives_the_backward_pass() -> None:
    net = residual()
    bn.recompute(net)
    y = net(images()).sum()
    y.backward()
    gc.collect()
    assert not any(isinstance(o, (Value, Saved)) for o in gc.get_objects())
    del y


def test_chains_of_residuals_have_anchors_and_compute_each_output_once() -> None:
    net = residual(9)
    handle = bn.recompute(net)
    y = net(images()).sum()
    ends = [f"{i}.bn2" for i in range(2, 11)]
    kept = [layer for layer in ends if layer in handle.report.left]
    # The stem's output is the first residual: of the chain, each fourth is kept.
    assert kept == ["4.bn2", "8.bn2"]
    assert all("chain" in handle.report.left[layer] for layer in kept)
    with counted() as calls:
        y.backward()
    assert len(calls) == len(handle.report.recomputed)


# --- what is never mistaken ------------------------------------------------------------------------------------------


def with_change(change: Callable[[Tensor], Any]) -> nn.Module:
    """A network that does something with an output before it goes on."""
    torch.manual_seed(0)
    return Calls(lambda net, x: net.b(change(net.n(net.a(x)))), a=conv(3), n=norm("silu"), b=conv())


def without_gradient(change: Callable[[Tensor], Any], then: Callable[[Tensor], Tensor] = lambda y: y) -> Any:
    def call(y: Tensor) -> Tensor:
        with torch.no_grad():
            change(y)
        return then(y)

    return call


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda y: y.mul_(2),
    "in place, of a view": lambda y: (y.view(-1).mul_(2), y)[1],
    "in place, unseen": without_gradient(lambda y: y.mul_(2)),
    "in place, unseen, of a view": without_gradient(lambda y: y[0].mul_(2)),
    "in place, unseen, and an activation": without_gradient(lambda y: y.mul_(2), F.relu),
    "in place, unseen, and an activation in place": without_gradient(lambda y: y.mul_(2), F.relu_),
    "an activation, and in place, unseen": lambda y: without_gradient(lambda r: r.add_(1))(F.silu(y)),
    "an activation in place, and in place, unseen": lambda y: without_gradient(lambda r: r.add_(1))(
        F.silu(y, inplace=True)
    ),
    "in place, unseen, and a pooling": without_gradient(lambda y: y.mul_(2), lambda y: F.max_pool2d(y, 2)),
    "a pooling, and in place, unseen": lambda y: without_gradient(lambda r: r.add_(1))(F.max_pool2d(y, 2)),
    "in place, unseen, and a concatenation": without_gradient(
        lambda y: y.mul_(2), lambda y: torch.cat([y[:, :8], y, y[:, 8:]], 1)[:, 8:24]
    ),
    "a copy": lambda y: y.clone(),
    "detached": lambda y: y.detach(),
    "detached, and in place": lambda y: y.detach().mul_(2),
    "other data": lambda y: y.data.mul(2),
    "a slice": lambda y: y[:, :, 3:, 5:],
    "a permutation": lambda y: y.transpose(2, 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_output(change: str) -> None:
    check(with_change(CHANGES[change]), images())


@pytest.mark.parametrize("change", ["in place", "in place, unseen"])
def test_an_output_that_is_changed_in_place_is_kept(change: str) -> None:
    report = check(with_change(CHANGES[change]), images()).report
    assert "in place" in report.left["n"]


def test_storage_that_is_used_again() -> None:
    """Many outputs of one size, freed at once: each has its own history."""
    torch.manual_seed(0)

    def call(net: nn.Module, x: Tensor) -> Tensor:
        total = net.b(net.n(net.a(x)))
        for i in range(6):
            net.n(net.a(x + i))  # freed
            total = total + net.b(net.n(net.a(x - i)))
        return total

    check(Calls(call, a=conv(3), n=norm(), b=conv()), images())


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error_as_without() -> None:
    for on in (False, True):
        net = chain()
        if on:
            bn.recompute(net)
        y = net(images()).sum()
        with torch.no_grad():
            net[3].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_a_parameter_that_has_no_part_in_a_gradient_may_change() -> None:
    net = chain()
    y = net(images())
    (expected,) = torch.autograd.grad(y.sum(), net[6].weight)
    bn.recompute(net)
    y = net(images())
    with torch.no_grad():
        net[5].weight.add_(1)
    (actual,) = torch.autograd.grad(y.sum(), net[6].weight)
    assert torch.equal(actual, expected)


def test_an_input_that_changes_before_the_backward_pass_is_an_error() -> None:
    net = Calls(lambda net, x: (h := net.a(x), net.b(net.n(h))), a=conv(3), n=norm(), b=conv())
    bn.recompute(net)
    h, y = net(images())
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(OrderError, match="at version 1; expected version 0"):
        y.sum().backward()


def test_other_saved_tensors_are_watched_too() -> None:
    net = Calls(lambda net, x: (h := net.a(x), h.sin()), a=conv(3))
    bn.recompute(net)
    h, y = net(images())
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- where it is and where not ---------------------------------------------------------------------------------------


def test_without_gradients_nothing_is_done() -> None:
    net = chain()
    handle = bn.recompute(net)
    with torch.no_grad():
        net(images())
    assert "not been called for gradients" in str(handle.report)
    assert handle.report.saved == handle.report.kept == 0


def test_it_ends() -> None:
    net = chain()
    with bn.recompute(net) as handle:
        y = net(images())
    before = handle.report.saved
    with counted() as calls:
        y.sum().backward()  # of a pass that it has served
    assert len(calls) == 3
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    with counted() as calls:
        net(images()).sum().backward()
    assert calls == []
    assert handle.report.saved == before


def test_it_ends_from_within_a_pass() -> None:
    net = chain()
    handle = bn.recompute(net)
    net[3].register_forward_hook(lambda *args: handle.remove())
    net(images()).sum().backward()
    assert not net._forward_hooks
    assert recording.RECORDERS == {}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing_behind(error: type[BaseException]) -> None:
    net = chain()
    handle = bn.recompute(net)

    def fail(*args: object) -> None:
        raise error

    hook = net[3].register_forward_hook(fail)
    with pytest.raises(error):
        net(images())
    hook.remove()
    assert (recording.RECORDERS == {}) is (error is ZeroDivisionError)  # torch tells hooks of no interrupt
    expected = gradients(copy.deepcopy(net), images())
    same_bits(gradients(net, images()), expected)
    assert recording.RECORDERS == {}
    assert handle.report.recomputed == ("1", "3", "5")
    handle.remove()


def test_an_interrupt_before_the_end() -> None:
    net = chain()
    handle = bn.recompute(net)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    net[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(images())
    handle.remove()
    assert recording.RECORDERS == {}
    assert not net._forward_hooks


def test_a_model_that_calls_itself() -> None:
    net = Calls(lambda net, x: net.b(net.n(net.a(x))) if x.shape[1] == 3 else x, a=conv(3), n=norm(), b=conv())
    net.code = lambda net, x: net.c(net(x[:, :3])) if x.shape[1] == 4 else net.b(net.n(net.a(x)))
    net.c = conv()
    check(net, torch.cat([images(), images()[:, :1]], 1))
    assert recording.RECORDERS == {}


def test_one_inside_another() -> None:
    net = chain()
    inner = bn.recompute(net[1])
    handle = check(net, images())
    assert handle.report.recomputed == ("1", "3", "5")
    assert inner.report.recomputed == ()


def test_threads_do_not_meet() -> None:
    nets = [chain(), chain("silu")]
    expected = [gradients(copy.deepcopy(net), images()) for net in nets]
    bn.recompute(nets[0])
    found: dict[int, dict[str, Tensor]] = {}

    def work(i: int) -> None:
        for _ in range(4):
            for layer in nets[i].modules():
                if isinstance(layer, bn.BatchNorm2d):
                    layer.reset_running_stats()
            found[i] = {k: v for k, v in gradients(nets[i], images()).items() if "running" not in k}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        same_bits(found[i], {k: v for k, v in expected[i].items() if "running" not in k})


def test_copies_are_without() -> None:
    net = chain()
    handle = bn.recompute(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with counted() as calls:
            other(images()).sum().backward()
        assert calls == []
    net(images())
    assert handle.report.recomputed


def test_hooks_of_others_around_it() -> None:
    """Ours serve the model; those of the caller serve what is around it."""
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    net = chain()
    handle = bn.recompute(net)
    with saved_tensors_hooks(pack, lambda t: t):
        y = net(images())
        y.square().sum().backward()
    assert handle.report.recomputed == ("1", "3", "5")
    assert len(packed) == 1  # what `square` saves


def test_unconverted_layers_are_left() -> None:
    net = nn.Sequential(conv(3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), conv(), norm(), conv())
    report = check(net, images()).report
    assert report.recomputed == ("4",)
    assert "batchnorm.convert(model)" in report.left["1"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_relu_of_its_own(inplace: bool, fused: bool) -> None:
    net = nn.Sequential(conv(3), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace), conv())
    report = check(bn.fuse(net) if fused else bn.convert(net), images()).report
    assert report.recomputed == ("1",)
    assert report.saved == 4 * CHANNELS * 32 * 32 * 4


def test_torch_func_is_left_alone() -> None:
    net = chain(track_running_stats=False)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, parameters, (images(),)).square().mean()

    expected = torch.func.grad(loss)(parameters)
    handle = bn.recompute(net)
    same_bits(torch.func.grad(loss)(parameters), expected)
    assert "not been called for gradients" in str(handle.report)


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_torch_compile_is_left_alone(when: str) -> None:
    net = chain()
    expected = gradients(copy.deepcopy(net), images())
    if when == "after":
        handle = bn.recompute(net)
    run = net
    if when == "in place":
        handle = bn.recompute(net)
        net.compile(backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(net, backend="aot_eager", fullgraph=True)
    if when == "before":
        handle = bn.recompute(run)
    found = gradients(net, images(), run)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert "torch.compile" in str(handle.report)
    assert recording.RECORDERS == {}


def test_a_compiled_part_is_left_alone() -> None:
    net = nn.Sequential(chain(), norm(), conv())
    net[0].compile(backend="aot_eager")
    x = images()
    expected = gradients(net, x)
    for layer in net.modules():
        if isinstance(layer, bn.BatchNorm2d):
            layer.reset_running_stats()
    handle = bn.recompute(net)
    same_bits(gradients(net, x), expected)
    assert handle.report.recomputed == ("1",)
    assert "compiled" in handle.report.left["0.1"]


def test_small_outputs_are_kept() -> None:
    report = check(chain(), images(samples=2, size=8)).report
    assert report.recomputed == ()
    assert all("too few" in why for why in report.left.values())


def test_an_output_that_nobody_saves() -> None:
    net = Calls(lambda net, x: net.n(net.a(x)) + 1, a=conv(3), n=norm(None))
    assert check(net, images()).report.left == {"n": "nobody saves its output"}
