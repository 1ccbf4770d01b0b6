"""Population statistics from data that several processes share: each reads a part, all get the same statistics.

pip install "batchnorm[study]"
torchrun --standalone --nproc-per-node 2 examples/recalibrate_distributed.py
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import batchnorm as bn

# A process that waits longer than this for another raises; without it, it would wait for half an hour.
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights in each process, as after loading a checkpoint
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, bias=False), bn.BatchNorm2d(16, activation="relu")),
    *(nn.Conv2d(16, 32, 3, bias=False), bn.BatchNorm2d(32, activation="relu")),
    *(nn.Flatten(), nn.Linear(512, 10)),
)
pixels, _ = load_digits(return_X_y=True)
images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
batches = images.split(100)

result = bn.recalibrate(model, batches[rank::size])  # 18 batches: any number may fall to a process
parts: list[object] = [None] * size
dist.all_gather_object(parts, [layer.new_var for layer in result.layers])
dist.destroy_process_group()

if rank == 0:
    alone = bn.recalibrate(model, batches)  # one process with all the data, to compare
    first, *others = (torch.cat(part) for part in parts if isinstance(part, list))
    equal = all(torch.equal(first, other) for other in others)
    variances = torch.cat([layer.new_var for layer in alone.layers])
    print(f"{result.samples} images, {size} processes: {'the same bits' if equal else 'DIFFERENT BITS'} in each")
    print(f"beside one process: the variances differ by {(first / variances - 1).abs().max():.0e} at the most")
