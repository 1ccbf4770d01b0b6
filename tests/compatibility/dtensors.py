"""A process of several that train with tensors that are distributed over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from compatibility.subjects import OURS, batch, step
from support.processes import main


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(rank: int, size: int) -> dict[str, Any]:
    """A training step of every network, with the whole batch in each process and with a part in each."""
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for make in OURS:
        for placement in (Replicate(), Shard(0)):
            net = distribute_module(make(), mesh)
            results = step(net, distribute_tensor(batch(), mesh, [placement]))
            found[f"{make.__name__} {placement}"] = {name: whole(value) for name, value in results.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main({"step": steps})
