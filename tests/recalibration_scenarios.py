"""What recalibration does in several processes, each scenario in one process group.

python tests/recalibration_scenarios.py SCENARIO,... RANK SIZE FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.distributed import Group
from batchnorm.population import checkpoint
from support import processes
from support.populations import everything, images, layers, made

SIZES = (4, 3, 5, 2, 6, 2)


def shares(size: int) -> list[list[Tensor]]:
    """Uneven, and nothing for the last."""
    batches = images(*SIZES)
    return [batches[:4], batches[4:], []] if size == 3 else [batches, []]


def outcome(act: Callable[[], bn.Recalibration | None], model: nn.Module) -> dict[str, Any]:
    """Statistics, numbers and the error, if there is one, of one process."""
    before, error, result = everything(model), None, None
    try:
        result = act()
    except Exception as raised:
        error = (type(raised).__name__, str(raised))
    return {
        "error": error,
        "unchanged": everything(model) == before,
        "numbers": None if result is None else (result.batches, result.samples, [x.count for x in result.layers]),
        "statistics": [t.clone() for x in layers(model).values() for t in (x.running_mean, x.running_var)],
    }


def recalibrated(method: str, rank: int, size: int, **options: Any) -> dict[str, Any]:
    model = made("residual")
    torch.manual_seed(0)
    mine = options.pop("batches", shares(size)[rank])
    return outcome(lambda: bn.recalibrate(model, mine, method=method, **options), model)


def even(rank: int, size: int) -> list[Tensor]:
    return images(*SIZES)[rank::size]


def other_way(method: str, rank: int, size: int, *way: str) -> dict[str, Any]:
    """Rank 1 calls other layers than the rest."""
    model = nn.ModuleDict({name: nn.BatchNorm2d(3) for name in "ab"})
    names = way if rank == 1 else ("a", "b")

    def forward(model: Any, x: Tensor) -> None:
        for name in names:
            x = model[name](x)

    return outcome(lambda: bn.recalibrate(model, even(rank, size), method=method, forward=forward), model)


def failing(method: str, rank: int, size: int) -> dict[str, Any]:
    """Rank 1 raises while it reads."""

    def reading() -> Iterator[Tensor]:
        yield images(4)[0]
        if rank == 1:
            raise LookupError("no such file")
        yield images(3)[0]

    return recalibrated(method, rank, size, batches=reading())


def failing_inside(rank: int, size: int) -> dict[str, Any]:
    """Rank 1 raises at its third layer."""
    model = made("residual")
    if rank == 1:
        model.down.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(LookupError("broken")))
    return outcome(lambda: bn.recalibrate(model, even(rank, size)), model)


def in_a_subgroup(rank: int, size: int) -> dict[str, Any]:
    """The first two ranks alone, backwards; the third is not in it."""
    group = dist.new_group([0, 1])
    model, batches = made("residual"), images(*SIZES)
    mine = batches[:4] if rank == 0 else batches[4:]
    return outcome(lambda: bn.recalibrate(model, mine, process_group=group), model)


def data_parallel(rank: int, size: int) -> dict[str, Any]:
    """DistributedDataParallel copies buffers in each forward pass: with uneven shares that would hang."""
    model = DistributedDataParallel(made("residual"))
    return outcome(lambda: bn.recalibrate(model, shares(size)[rank]), model.module)


def kept(rank: int, size: int) -> dict[str, Any]:
    """Each process has a checkpoint of its own, and goes on from it after a failure of one."""
    checkpoint.SECONDS_BETWEEN = 0.0
    path = Path(sys.argv[4]) / f"progress{size}"
    model = made("residual")
    ran: list[int] = []

    def reading(fail: bool) -> Iterator[Tensor]:
        for i, batch in enumerate(even(rank, size)):
            if fail and rank == 1 and i == 1:
                raise LookupError
            yield batch

    def run(fail: bool) -> bn.Recalibration:
        return bn.recalibrate(model, reading(fail), method="pooled", checkpoint=path)

    first = outcome(lambda: run(True), model)
    files = sorted(p.name for p in path.parent.glob(f"progress{size}*"))
    hook = model.register_forward_hook(lambda *_: ran.append(1))
    second = outcome(lambda: run(False), model)
    hook.remove()
    return second | {"first": first["error"], "files": files, "ran": len(ran)}


def meeting(rank: int, size: int) -> dict[str, Any]:
    """The group itself."""
    group = Group()
    place, tensors = group.all_gather(None if rank == 0 else "there", [torch.tensor([float(rank)] * (rank + 1))])
    nowhere, _ = group.all_gather(None)
    return {"rank": group.rank, "size": group.size, "place": place, "tensors": tensors, "nowhere": nowhere}


def killed(rank: int, size: int) -> dict[str, Any]:
    """Rank 1 is gone in the middle."""
    model = made("residual")

    def die(*_: object) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hook = model.bn3.register_forward_hook(die)
    result = outcome(lambda: bn.recalibrate(model, even(rank, size)), model)
    hook.remove()
    return result


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "meeting": meeting,
    "exact": lambda rank, size: recalibrated("exact", rank, size),
    "pooled": lambda rank, size: recalibrated("pooled", rank, size),
    "average": lambda rank, size: recalibrated("average", rank, size),
    "max_samples": lambda rank, size: recalibrated("exact", rank, size, batches=even(rank, size), max_samples=3),
    "no data": lambda rank, size: recalibrated("exact", rank, size, batches=[]),
    "no data pooled": lambda rank, size: recalibrated("pooled", rank, size, batches=[]),
    "other methods": lambda rank, size: recalibrated("pooled" if rank else "exact", rank, size),
    "wrong option": lambda rank, size: recalibrated("exact", rank, size, max_samples=0 if rank == 1 else None),
    "other order": lambda rank, size: other_way("exact", rank, size, "b", "a"),
    "early end": lambda rank, size: other_way("exact", rank, size, "a"),
    "other order pooled": lambda rank, size: other_way("pooled", rank, size, "b", "a"),
    "failing": lambda rank, size: failing("exact", rank, size),
    "failing pooled": lambda rank, size: failing("pooled", rank, size),
    "failing inside": failing_inside,
    "subgroup": in_a_subgroup,
    "data parallel": data_parallel,
    "kept": kept,
    "again": lambda rank, size: recalibrated("exact", rank, size),  # the group still works after all these
    "killed": killed,
}

if __name__ == "__main__":
    processes.main(SCENARIOS)
