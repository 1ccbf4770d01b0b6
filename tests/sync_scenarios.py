"""What layers that share their statistics do in several processes, each scenario in one process group.

python tests/sync_scenarios.py SCENARIO,... RANK SIZE FOLDER
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support import processes

CHANNELS = 3
# Each process's part of a batch.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "equal": [(4, 3, 5), (4, 3, 5)],
    "one each": [(1, 3), (1, 3)],
    "nothing here": [(0, 3, 5), (5, 3, 5)],
    "nothing there": [(5, 3, 5), (0, 3, 5)],
    "other sizes": [(2, 3, 4, 5), (3, 3, 2, 7)],
    "no positions": [(2, 3, 0, 5), (3, 3, 2, 7)],
    "three": [(2, 3), (0, 3), (7, 3)],
}


def part(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """An input, what its output's gradient is, and a residual."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(shape, generator=generator) * 2 + 100,
        "dy": torch.randn(shape, generator=generator),
        "residual": torch.randn(shape, generator=generator),
    }


def positions(shape: tuple[int, ...], seed: int, *, kind: torch.dtype) -> Tensor:
    """A mask; process 1's counts nothing."""
    drawn = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(100 + seed))
    return (drawn > (0.4 if seed == 0 else 2)).to(kind) * (drawn if kind.is_floating_point else 1)


def layer(**options: Any) -> bn.BatchNorm:
    """The same in every process, with parameters that hide nothing."""
    made = bn.BatchNorm(CHANNELS, **{"sync": True, **options})
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
        made.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    return made


def step(module: nn.Module, own: dict[str, Tensor], **arguments: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of a training step."""
    x = own["x"].clone().requires_grad_()
    y = module(x, **arguments)
    y.backward(own["dy"].to(y.dtype))
    norm = next(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    found = {"y": y.detach(), "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return found | {name: value.clone() for name, value in norm.state_dict().items() if name.startswith(("run", "num"))}


def refused(act: Callable[[], object]) -> dict[str, Any]:
    """The error."""
    try:
        act()
    except Exception as error:
        return {"error": (type(error).__name__, str(error))}
    return {"error": None}


def by_shape(name: str, rank: int, size: int, **options: Any) -> dict[str, Any]:
    return step(layer(**options), part(SHAPES[name][rank], rank))


def masked(rank: int, size: int, *, kind: torch.dtype) -> dict[str, Any]:
    shape = SHAPES["other sizes"][rank]
    return step(layer(), part(shape, rank), mask=positions(shape, rank, kind=kind))


def with_residual(rank: int, size: int) -> dict[str, Any]:
    own = part(SHAPES["other sizes"][rank], rank)
    return step(layer(activation="silu"), own, residual=own["residual"])


def channels_last(rank: int, size: int) -> dict[str, Any]:
    own = {name: t.movedim(1, -1).contiguous() for name, t in part(SHAPES["other sizes"][rank], rank).items()}
    return step(layer(channel_dim=-1), own)


def half(rank: int, size: int) -> dict[str, Any]:
    own = part(SHAPES["other sizes"][rank], rank)
    return step(layer(), own | {"x": own["x"].bfloat16()})


def functional(rank: int, size: int) -> dict[str, Any]:
    own, statistics = part(SHAPES["nothing here"][rank], rank), (torch.zeros(CHANNELS), torch.ones(CHANNELS))
    group = dist.group.WORLD
    y = bn.functional.batch_norm(own["x"], *statistics, training=True, process_group=group)
    return {"y": y, "running_mean": statistics[0], "running_var": statistics[1]}


def one_value(rank: int, size: int, *, nothing: bool) -> dict[str, Any]:
    """Less than a variance needs."""
    made = layer()
    x = torch.ones(0 if rank or nothing else 1, CHANNELS, requires_grad=True)
    found = refused(lambda: made(x).sum().backward())
    return found | {"batches": int(made.num_batches_tracked), "dx": x.grad}


def of_some(rank: int, size: int) -> dict[str, Any]:
    """The first and the last process share statistics; the one between is alone."""
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    made = layer(process_group=groups[rank % 2])
    copied = copy.deepcopy(nn.Sequential(made))
    assert copied[0].process_group is made.process_group
    return step(copied, part((4, 3, 5), rank)) | refused(
        lambda: layer(process_group=groups[1 - rank % 2])(torch.ones(2, 3))
    )


def of_one_tensor(rank: int, size: int, **options: Any) -> dict[str, Any]:
    """The parts are those of one DTensor, and nobody asks for sync; what is found is whole."""
    from torch.distributed.tensor import DTensor, Shard, distribute_module, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    made = layer(sync=False, **options)
    made.num_batches_skipped.fill_(7)  # of the time before
    distribute_module(made, mesh)
    own = {name: DTensor.from_local(t, mesh, [Shard(0)]) for name, t in part(SHAPES["equal"][rank], rank).items()}
    x = own["x"].requires_grad_()
    y = made(x, residual=own["residual"])
    (y * own["dy"]).sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "dweight": made.weight.grad, "dbias": made.bias.grad}
    inference = made.eval()(x.detach())
    found |= {"inference": inference, **made.state_dict()}
    return {name: t.full_tensor().detach() for name, t in found.items()} | {"skipped": made.num_batches_skipped}


def in_inference(rank: int, size: int) -> dict[str, Any]:
    """One process alone calls it, and waits for nobody."""
    made = layer().eval()
    return {"y": made(part((4, 3), 0)["x"]) if rank == 0 else None}


def normalized_by_running(rank: int, size: int) -> dict[str, Any]:
    """Statistics move, and are shared, though they are not what this batch is normalised by."""
    made = layer(momentum=1.0)
    made.frozen = made.frozen._replace(normalization=True)
    return step(made, part(SHAPES["nothing here"][rank], rank))


def micro_batches(rank: int, size: int) -> dict[str, Any]:
    made = layer()
    with bn.deferred(made):
        for x in part((6, 3, 5), rank)["x"].split(3 if rank else 2)[:2]:
            made(x)
    return {name: getattr(made, name) for name in ("running_mean", "running_var", "num_batches_tracked")}


def repeated(rank: int, size: int) -> dict[str, Any]:
    """Activation checkpointing runs the forward pass again, in all processes, and commits nothing more."""
    made, own = layer(), part(SHAPES["equal"][rank], rank)
    x = own["x"].clone().requires_grad_()
    checkpoint(made, x, use_reentrant=False).backward(own["dy"])
    return {"dx": x.grad, "running_var": made.running_var, "num_batches_tracked": made.num_batches_tracked}


def renormalized(rank: int, size: int) -> dict[str, Any]:
    return step(layer(renorm=bn.Renorm(1.5, 0.5)), part(SHAPES["equal"][rank], rank))


def twice(rank: int, size: int) -> dict[str, Any]:
    """Two forward passes before one backward pass, under DistributedDataParallel, which copies buffers in each."""
    model = DistributedDataParallel(nn.Sequential(layer()))
    own = part(SHAPES["equal"][rank], rank)
    x = own["x"].clone().requires_grad_()
    (model(x) * own["dy"] + 2 * model(x.flip(0))).sum().backward()
    norm = model.module[0]
    return {"dx": x.grad, "dweight": norm.weight.grad, "running_mean": norm.running_mean}


def trained(rank: int, size: int) -> dict[str, Any]:
    """Three steps of a network in data-parallel training; the loss is the mean over all samples."""
    model = DistributedDataParallel(bn.convert(network(), sync=True))
    train(model, [batch.chunk(size)[rank] for batch in samples()])
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.SyncBatchNorm(3), nn.Flatten()
    )


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 2, 7, 7, generator=generator) for _ in range(3)]


def train(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).pow(3).mean().backward()
        optimizer.step()


def twice_derived(rank: int, size: int) -> dict[str, Any]:
    made, x = layer(), part((4, 3), rank)["x"].requires_grad_()
    return refused(lambda: torch.autograd.grad(made(x).pow(2).sum(), x, create_graph=True))


def transformed(rank: int, size: int) -> dict[str, Any]:
    made = layer(track_running_stats=False)
    return refused(lambda: torch.func.vmap(made)(torch.ones(2, 4, 3)))


def ghosts(rank: int, size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    x = torch.ones(4, 3)
    return refused(
        lambda: bn.functional.batch_norm(x, None, None, training=True, virtual_batch_size=2, process_group=group)
    )


def compiled(rank: int, size: int) -> dict[str, Any]:
    model = torch.compile(nn.Sequential(nn.Identity(), layer()), backend="eager")
    return step(model, part(SHAPES["equal"][rank], rank))


def other_order(rank: int, size: int, *, forward: bool) -> dict[str, Any]:
    """The last process calls its layers the other way round; or stops after the first."""
    made = bn.convert(nn.ModuleDict({name: nn.BatchNorm1d(3) for name in "ab"}), sync=True)
    odd = rank == size - 1
    names = ("b", "a") if odd and forward else ("a", "b")

    def run() -> None:
        x = torch.ones(2, 3, requires_grad=True) * torch.arange(2.0).unsqueeze(1)
        for name in names[: 1 if odd and not forward else 2]:
            x = made[name](x)
        x.sum().backward()

    return refused(run)


def other_channels(rank: int, size: int, *, backward: bool) -> dict[str, Any]:
    """Layers of different numbers of channels meet, forward, or forward with one and backward with another."""
    torch.manual_seed(0)
    layers = [bn.BatchNorm1d(channels, sync=True) for channels in (3, 4)]
    inputs = [torch.randn(4, channels, requires_grad=True) for channels in (3, 4)]
    if not backward:
        found = refused(lambda: layers[rank](inputs[rank]))
    else:
        outputs = [made(x) for made, x in zip(layers, inputs, strict=True)]
        found = refused(lambda: outputs[rank].sum().backward())
    return found | {"batches": [int(made.num_batches_tracked) for made in layers], "mean": layers[rank].running_mean}


def killed(rank: int, size: int) -> dict[str, Any]:
    made, x = layer(), part((4, 3), rank)["x"]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return refused(lambda: made(x))


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    **{name: partial(by_shape, name) for name in SHAPES if name != "three"},
    "no running statistics": lambda rank, size: by_shape("equal", rank, size, track_running_stats=False),
    "average": lambda rank, size: by_shape("equal", rank, size, momentum=None),
    "bool mask": partial(masked, kind=torch.bool),
    "weights": partial(masked, kind=torch.float32),
    "residual": with_residual,
    "channels last": channels_last,
    "bfloat16": half,
    "functional": functional,
    "one value": partial(one_value, nothing=False),
    "no value": partial(one_value, nothing=True),
    "one tensor": of_one_tensor,
    "one tensor activated": partial(of_one_tensor, activation="relu"),
    "inference": in_inference,
    "normalised by running": normalized_by_running,
    "micro-batches": micro_batches,
    "repeated": repeated,
    "renormalised": renormalized,
    "twice": twice,
    "trained": trained,
    "twice derived": twice_derived,
    "transformed": transformed,
    "ghosts": ghosts,
    "compiled": compiled,
    "other channels": partial(other_channels, backward=False),
    "other channels backward": partial(other_channels, backward=True),
}
OF_THREE: dict[str, Callable[[int, int], dict[str, Any]]] = {"three": partial(by_shape, "three"), "some": of_some}
WATCHED: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "equal": SCENARIOS["equal"],
    "other order": partial(other_order, forward=True),
    "early end": partial(other_order, forward=False),
}
ALONE: dict[str, Callable[[int, int], dict[str, Any]]] = {"killed": killed}

if __name__ == "__main__":
    processes.main({**SCENARIOS, **OF_THREE, **WATCHED, **ALONE})
