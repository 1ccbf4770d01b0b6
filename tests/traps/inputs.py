"""Traps in what goes in: shapes, layouts, padding, dtypes, and the transforms around. Checks as in `updates`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, stack_module_state, vmap

from support import oracle, tolerances
from traps.kits import RIGHT, Kit, after, apart, draw, expect, show, springing, training_error


def constant_channel(kit: Kit) -> str:
    flat, image = torch.full((64, 3), 10000.3), torch.full((16, 3, 2, 2), 10000.3)
    beta = torch.tensor([0.3, -0.7, 1e-3])
    errors = []
    for x in (flat, image, image.contiguous(memory_format=torch.channels_last)):
        y = kit.batch_norm(x, None, None, torch.full((3,), 1.7), beta, True)
        errors.append(float((y - beta.view(-1, *[1] * (x.dim() - 2))).abs().max()))
    return expect(max(errors) == 0, f"the output is off from beta by {show(max(errors))}")


def empty_batch(kit: Kit) -> str:
    layer = kit.BatchNorm1d(3)
    layer(draw(16, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 3, 4, requires_grad=True)
    y = layer(x)
    gradients = torch.autograd.grad(y.sum(), [x, layer.weight, layer.bias])
    moved = [key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])]
    right = y.shape == (0, 3, 4) and not moved and not any(gradient.any() for gradient in gradients)
    return expect(right, f"output {tuple(y.shape)}; what it changed: {', '.join(moved) or 'nothing'}")


def one_value(kit: Kit) -> str:
    ways = "BatchNorm", ".eval()", "drop_last"
    for layer, shape in ((kit.BatchNorm1d(3), (1, 3)), (kit.BatchNorm2d(3), (1, 3, 1, 1))):
        try:
            layer(draw(*shape))
        except ValueError as error:
            named = [word for word in ways if word in str(error)]
        else:
            raise AssertionError(f"no error for {shape}")
        observed = f"the error speaks of {', '.join(named) or 'neither the layer nor a way out'}"
        expect(len(named) == len(ways), observed)
    return observed


def padding(kit: Kit) -> str:
    x, lengths = draw(4, 3, 10), torch.tensor([10, 6, 3, 1])
    mask = torch.arange(10) < lengths[:, None]
    layer, weights = kit.BatchNorm1d(3), mask.double().numpy()
    leaf = x.masked_fill(~mask.unsqueeze(1), float("nan")).requires_grad_()
    dy = draw(4, 3, 10, seed=1) * mask.unsqueeze(1)
    y = kit.masked(layer, leaf, mask)
    (dx,) = torch.autograd.grad(y.masked_fill(~mask.unsqueeze(1), 0), leaf, dy)
    arrays = x.double().numpy(), np.ones(3), np.zeros(3)
    n, mean, m2 = oracle.moments(arrays[0], weights=weights)
    expected_y, *_ = oracle.forward(*arrays, weights=weights)
    expected_dx, *_ = oracle.backward(dy.double().numpy(), arrays[0], mean, m2 / n, *arrays[1:], weights=weights)
    running = apart(layer.running_mean, torch.from_numpy(0.1 * mean))
    valid = mask.unsqueeze(1).expand_as(x)
    error = apart(y[valid], torch.from_numpy(expected_y)[valid]), apart(dx, torch.from_numpy(expected_dx))
    return expect(
        max(running, *error) < RIGHT,
        f"off by {show(running)} in running_mean, {show(error[0])} in the output, {show(error[1])} in its gradient",
    )


def memory_orders(kit: Kit) -> str:
    image, order = draw(6, 5, 7, 3), torch.channels_last
    cases = {
        "permuted": (image.permute(0, 2, 1, 3), draw(6, 7, 5, 3, seed=1)),
        "gradient in another order": (image, draw(6, 5, 7, 3, seed=1).contiguous(memory_format=order)),
        "the reverse": (image.contiguous(memory_format=order), draw(6, 5, 7, 3, seed=1)),
        "expanded gradient": (image, draw(1, 5, 1, 1, seed=1).expand_as(image)),
        "from .sum()": (image.contiguous(memory_format=order), torch.ones(()).expand_as(image)),
        "gaps": (draw(6, 5, 7, 6)[..., ::2], draw(6, 5, 7, 3, seed=1)),
    }
    errors = {name: training_error(kit, x, dy)[1] for name, (x, dy) in cases.items()}
    worst = max(errors, key=lambda name: errors[name])
    return expect(errors[worst] < RIGHT, f"at most off by {show(errors[worst])} ({worst})")


def sizes(kit: Kit) -> str:
    shapes = [(70_001, 3), (5, 1000), (274, 3, 16, 16), (2, 131, 3, 3), (3, 1, 301)]
    errors = {shape: training_error(kit, draw(*shape), draw(*shape, seed=1))[1] for shape in shapes}
    worst = max(errors, key=lambda shape: errors[shape])
    return expect(errors[worst] < tolerances.LONG_SUMS, f"at most off by {show(errors[worst])} {worst}")


def no_positions(kit: Kit) -> str:
    layer, x = kit.BatchNorm2d(3), torch.zeros(2, 3, 0, 4, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    right = y.shape == dx.shape == x.shape and layer.num_batches_tracked == 0 and not layer.running_mean.any()
    return expect(right, f"output {tuple(y.shape)}, num_batches_tracked {int(layer.num_batches_tracked)}")


def memory_formats(kit: Kit) -> str:
    formats = torch.contiguous_format, torch.channels_last
    differences = []
    for given in formats:
        x = draw(4, 5, 3, 2).contiguous(memory_format=given).requires_grad_()
        for gradient in formats:
            dy = draw(4, 5, 3, 2, seed=1).contiguous(memory_format=gradient)
            results = []
            for batch_norm in (kit.batch_norm, F.batch_norm):
                y = batch_norm(x, None, None, None, None, True)
                results.append((y.stride(), torch.autograd.grad(y, x, dy)[0].stride()))
            if results[0] != results[1]:
                differences.append(f"{results[0]} for {results[1]}")
    return expect(not differences, f"strides {'; '.join(differences) or 'of output and gradient are torchs'}")


def features_last(kit: Kit) -> str:
    x = draw(4, 5, 3)
    layer = kit.features_last(3)
    with springing():
        y = layer(x)
    expected, *_ = oracle.forward(x.double().numpy(), np.ones(3), np.zeros(3), axis=2)
    error = apart(y, torch.from_numpy(expected))
    return expect(error < RIGHT, f"off by {show(error)}")


def half_precision(kit: Kit, pure: bool) -> str:
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        parameters = dtype if pure else torch.float32
        _, error = training_error(kit, draw(16, 5, 4, 3).to(dtype), draw(16, 5, 4, 3, seed=1).to(dtype), parameters)
        errors[dtype] = error
    right = all(error < tolerances.SEVERAL_ROUNDINGS[dtype] for dtype, error in errors.items())
    return expect(right, ", ".join(f"{str(t).removeprefix('torch.')} off by {show(e)}" for t, e in errors.items()))


def third_derivative(kit: Kit) -> str:
    def plain(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    def third(function: Callable[[Tensor], Tensor]) -> float:
        x = draw(5, 3).double().requires_grad_()
        value = (function(x).pow(3) * torch.linspace(-1, 2, 15, dtype=torch.float64).view(5, 3)).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        return float(value.detach())

    expected = third(plain)
    try:
        actual = third(lambda x: kit.batch_norm(x, None, None, training=True))
    except RuntimeError as error:  # torch from 2.14 on
        return expect(False, f"RuntimeError: {error}")
    right = abs(actual - expected) < tolerances.THIRD_DERIVATIVE[torch.float64] * abs(expected)
    return expect(right, f"{actual:.6g} where {expected:.6g} is right")


def ensemble(kit: Kit, momentum: float | None) -> str:
    layers = [kit.BatchNorm1d(3, momentum=momentum) for _ in range(4)]
    parameters, buffers = stack_module_state(layers)
    x = draw(4, 16, 3) * torch.arange(1, 5).view(-1, 1, 1)
    with springing():
        y = vmap(lambda p, b, v: functional_call(layers[0], (p, b), (v,)))(parameters, buffers, x)
    worst = 0.0
    for i in range(4):
        expected, *_ = oracle.forward(x[i].double().numpy(), np.ones(3), np.zeros(3))
        mean, var = after(1.0 if momentum is None else momentum, x[i])
        pairs = [(y[i], torch.from_numpy(expected)), (buffers["running_mean"][i], mean)]
        worst = max(worst, *(apart(a, e) for a, e in [*pairs, (buffers["running_var"][i], var)]))
    counted = buffers["num_batches_tracked"].tolist()
    return expect(worst < RIGHT and counted == [1] * 4, f"4 layers at once off by {show(worst)}, counters {counted}")


def functional_gradient(kit: Kit) -> str:
    layer, x, dy = kit.BatchNorm1d(3), draw(16, 3), draw(16, 3, seed=1)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(layer, (parameters, buffers), (x,))
        return (y * dy).sum()

    with springing():
        gradients, dx = grad(loss, argnums=(0, 1))(parameters, x, buffers)
    arrays = [t.double().numpy() for t in (dy, x)]
    n, mean, m2 = oracle.moments(arrays[1])
    affine = [parameters[name].double().numpy() for name in ("weight", "bias")]
    expected = oracle.backward(*arrays, mean, m2 / n, *affine)
    error = max(
        apart(actual, torch.from_numpy(e))
        for actual, e in zip((dx, gradients["weight"], gradients["bias"]), (expected[0], *expected[2:]), strict=True)
    )
    running = apart(layer.running_mean, after(0.1, x)[0])
    return expect(max(error, running) < RIGHT, f"gradients off by {show(error)}, running_mean by {show(running)}")


def compiled(kit: Kit, momentum: float | None) -> str:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = kit.BatchNorm2d(3, momentum=momentum)
    call = torch.compile(layer, backend=counter, fullgraph=True)
    x = draw(8, 3, 4, 4)
    with springing():
        for _ in range(4):
            call(x).square().sum().backward()
    mean, _ = after(1.0, x) if momentum is None else after(momentum, *[x] * 4)
    error, graphs = apart(layer.running_mean, mean), counter.frame_count
    return expect(
        graphs == 1 and error < RIGHT and layer.num_batches_tracked == 4,
        f"4 calls compile {graphs} graph{'s' * (graphs != 1)}; running_mean off by {show(error)}",
    )
