"""Networks, batches and an independent look at what inference sees: for the tests of population statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from support import oracle, tolerances


class Residual(nn.Module):
    """torch.nn's layers, a shortcut, and functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.bn3 = nn.Conv2d(6, 4, 3, stride=2), nn.BatchNorm2d(4, momentum=None)
        self.drop, self.head, self.bn4 = nn.Dropout(0.5), nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(shortcut)) + shortcut)
        x = F.relu(self.bn3(self.down(x))).mean((2, 3))
        return self.bn4(self.head(self.drop(x)))


class Fused(nn.Module):
    """Our layers, with what only they have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 6, 1), bn.BatchNorm2d(6, activation="relu", inplace=True)
        self.again, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), bn.BatchNorm2d(6, activation="silu")
        self.bn3 = bn.BatchNorm(6, channel_dim=-1, virtual_batch_size=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x))
        x = self.bn2(self.again(x), residual=x)
        mask = torch.arange(x.shape[2] * x.shape[3]) % 3 != 0
        return self.bn3(x.flatten(2).transpose(1, 2), mask=mask.expand(len(x), -1))


class Act(nn.BatchNorm2d):
    """Somebody's subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Act(4), nn.Conv2d(4, 5, 1), nn.SyncBatchNorm(5), nn.Flatten())


NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "fused": Fused, "plain": plain}


def made(net: str, seed: int = 0) -> nn.Module:
    """One of the networks with running statistics that are wrong, in training mode."""
    torch.manual_seed(seed)
    model = NETS[net]()
    for layer in layers(model).values():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(7)
        if layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 2), nn.init.normal_(layer.bias)
    return model


def images(*sizes: int, seed: int = 0) -> list[Tensor]:
    """Batches of different sizes, places and spreads."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 6, 6, generator=generator) * (1 + i) + i for i, n in enumerate(sizes)]


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def run(model: nn.Module, batch: Any) -> None:
    model(batch)


def inputs(model: nn.Module, batches: Iterable[Any], forward: Callable[..., object] = run) -> dict[str, Any]:
    """What comes into each layer in inference, as rows (n, C) of float64, without what our masks leave out."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in layers(model)}

    def look(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0].detach().double().numpy()
        rows = np.moveaxis(rows, getattr(layer, "channel_dim", 1), -1)
        mask = kwargs.get("mask")
        seen[name].append(rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask.numpy()])

    flags = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as exits, torch.no_grad():
        for name, layer in layers(model).items():
            hook = layer.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: look(name, m, args, kwargs), with_kwargs=True
            )
            exits.callback(hook.remove)
        model.eval()
        for batch in batches:
            forward(model, batch)
    for module, flag in flags.items():
        module.training = flag
    return {name: np.concatenate(rows) for name, rows in seen.items() if rows}


def assert_statistics(layer: Any, rows: Any) -> None:
    """A layer's running statistics are those of these inputs."""
    n, mean, m2 = oracle.moments(rows)
    var, eps = m2 / n, vars(layer)["eps"]
    off = abs(layer.running_mean.double().numpy() - mean) / np.sqrt(var + eps)
    ratio = abs(np.log((layer.running_var.double().numpy() + eps) / (var + eps)))
    assert off.max() <= tolerances.POPULATION, f"mean off by {off.max()} standard deviations"
    assert ratio.max() <= tolerances.POPULATION, f"log variance off by {ratio.max()}"


def assert_consistent(model: nn.Module, batches: Iterable[Any], forward: Callable[..., object] = run) -> None:
    """Every layer's running statistics are those of what comes into it in inference."""
    seen = inputs(model, batches, forward)
    assert seen
    for name, rows in seen.items():
        assert_statistics(layers(model)[name], rows)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a recalibration that failed must leave as it was."""
    state: dict[str, Any] = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "random": torch.get_rng_state().tolist(),
    }
    for path, module in model.named_modules():
        hooks = {k: list(v.items()) for k, v in vars(module).items() if "hook" in k and isinstance(v, dict)}
        others = {k: v for k, v in vars(module).items() if k in ("training", "momentum", "eps", "frozen")}
        buffers = {k: (id(b), None if b is None else b.tolist()) for k, b in module._buffers.items()}
        parameters = {k: (id(p), None if p is None else p.tolist()) for k, p in module._parameters.items()}
        state[path] = (type(module), hooks, others, buffers, parameters)
    return state
