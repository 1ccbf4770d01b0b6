"""`recompute`: where it works and where not, how it begins and ends."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import batchnorm as bn
from batchnorm import recording
from support.networks import Calls
from support.passes import CHANNELS, chain, check, conv, counted, gradients, images, norm, same_bits


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
