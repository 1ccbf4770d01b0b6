"""What `recompute` does in several processes, each scenario in one process group.

python tests/recompute_scenarios.py SCENARIO,... RANK SIZE FOLDER
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.memory import session
from support import processes
from support.passes import chain, images, residual


def steps(model: nn.Module, rank: int, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Two training steps on this process's images: gradients and what is left, this process's parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for turn in range(2):
        optimizer.zero_grad()
        (call or model)(images(seed=10 * turn + rank)).float().square().mean().backward()
        for name, p in model.named_parameters():
            grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            found[f"{turn} {name}"] = grad.detach().clone()
        optimizer.step()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def compared(
    plain: nn.Module, model: nn.Module, rank: int, at: Callable[[nn.Module], nn.Module] = lambda model: model
) -> dict[str, Any]:
    """What `recompute` changes: nothing but the memory."""
    expected = steps(plain, rank)
    handle = bn.recompute(at(model))
    found = steps(model, rank)
    return {
        "differ": [name for name, value in expected.items() if not torch.equal(found[name], value)],
        "compared": len(expected),
        "recomputed": list(handle.report.recomputed),
    }


def distributed(rank: int, size: int, *, inside: bool, make: Callable[[], nn.Module]) -> dict[str, Any]:
    """DistributedDataParallel, with `recompute` on it or on the model inside."""
    plain = make()
    model = copy.deepcopy(plain)
    return compared(
        DistributedDataParallel(plain),
        DistributedDataParallel(model),
        rank,
        lambda model: model.module if inside else model,
    )


def shared(rank: int, size: int) -> dict[str, Any]:
    """Statistics of all processes."""
    plain = chain(sync=True)
    model = copy.deepcopy(plain)
    return compared(DistributedDataParallel(plain), DistributedDataParallel(model), rank)


def sharded(
    rank: int, size: int, *, each: bool, make: Callable[[], nn.Module] = chain, **options: Any
) -> dict[str, Any]:
    """fully_shard: parameters are there while their module computes, forward and backward."""

    def made() -> nn.Module:
        model = make()
        for child in list(model.children()) if each else []:
            fully_shard(child, **options)
        return fully_shard(model, **options)

    return compared(made(), made(), rank)


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "distributed": partial(distributed, inside=False, make=chain),
    "distributed inside": partial(distributed, inside=True, make=residual),
    "shared": shared,
    "sharded": partial(sharded, each=False),
    "sharded one by one": partial(sharded, each=True),
    "sharded blocks": partial(sharded, each=True, make=residual),
    "sharded in bfloat16": partial(
        sharded, each=True, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
}

if __name__ == "__main__":
    session._LEAST = 2**14  # outputs are small here
    processes.main(SCENARIOS)
