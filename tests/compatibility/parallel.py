"""Tools that put parts of one model, of its training or of its checkpoints into several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from compatibility.rows import row
from compatibility.together import agreed, in_two_processes
from compatibility.training import FORMS, NORMS, batches, network, same, same_state, state, train, whole
from support.comparison import close


@row(
    "Tensor parallelism, `parallelize_module` and `DTensor`",
    "torch",
    "as the whole model in one process, uneven shards too; torch.nn's statistics are wrong where channels are sharded",
)
@in_two_processes
def tensor_parallel(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))

    def perceptron() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def fused() -> nn.Module:
        return bn.fuse(bn.convert(perceptron()))

    def inside() -> nn.Module:
        net = perceptron()
        net[1], net[2] = bn.BatchNorm1d(6, activation="relu"), nn.Identity()
        return net

    data = [torch.randn(8, 5, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    expected = train(perceptron(), data)

    def parallel(net: nn.Module) -> nn.Module:
        plan = {
            "0": ColwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "1": SequenceParallel(sequence_dim=1),  # what is sharded are the channels
            "3": RowwiseParallel(input_layouts=Shard(1)),
        }
        return parallelize_module(net, mesh, plan)

    for made in (lambda: bn.convert(perceptron()), fused, inside):
        same(train(parallel(made()), data), expected)
    torchs = train(parallel(perceptron()), data).state["1.running_mean"]
    assert float((torchs - expected.state["1.running_mean"]).abs().max()) > 1e-2
    # A layer for itself, sharded in each dimension.
    for shape in ((8, 4, 6, 2), (7, 3, 5, 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1
        whole_layer = nn.BatchNorm2d(shape[1])
        y = whole_layer(x)
        for placement in (Replicate(), *map(Shard, range(4))):
            layer = distribute_module(bn.BatchNorm2d(shape[1], activation="relu"), mesh)
            close(whole(layer(distribute_tensor(x, mesh, [placement]))), y.detach().relu())
            same_state(state(layer), state(whole_layer))


@row(
    "`torch.distributed.checkpoint`, `save` and `load`",
    "torch",
    "as torch.nn, also from torch.nn's checkpoints; each process's own statistics need `sync=True` or `recalibrate`",
)
@in_two_processes
def distributed_checkpoint(rank: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for number, form in enumerate((lambda net: net, *FORMS)):
        model = fully_shard(form(bn.convert(network(), sync=True)) if number else network())
        train(model, batches(rank))
        folder = str(Path.cwd() / f"checkpoint{number}")
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
        saved = {name: whole(t) for name, t in model.state_dict().items()}
        for other in FORMS:
            with torch.device("meta"):
                loaded = fully_shard(other(network()))
            loaded.to_empty(device="cpu")
            content = {"model": get_model_state_dict(loaded)}
            dcp.load(content, checkpoint_id=folder)
            set_model_state_dict(loaded, content["model"])
            if number:
                same_state(state(loaded), saved)
            # Of torch.nn's, process 0's or 1's, but the same in both.
            mine = [t.tolist() for name, t in state(loaded).items() if "running" in name]
            assert agreed(mine) == [mine, mine]


@row("Activation checkpointing under FSDP2, `apply_activation_checkpointing`", "torch", "one commit for each batch")
@in_two_processes
def checkpointed(rank: int) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )
    from torch.distributed.fsdp import fully_shard

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    expected = train(fully_shard(network()), batches(rank))
    for form in FORMS:
        model = form(network())
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: isinstance(module, kinds)
        )
        found = train(fully_shard(model), batches(rank))
        names = {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in found.state.items()}
        same(found._replace(state=names), expected)


def sequential(model: nn.Module, data: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """The state after two micro-batches, and the gradients, in one process."""
    for x in data.chunk(2):
        (loss(model(x), torch.zeros(len(x), 2)) / 2).backward()
    return after(model)


def after(model: nn.Module) -> dict[str, Tensor]:
    """State and gradients."""
    return state(model) | {f"{name}.grad": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def piped(stage: Any, data: Tensor, loss: Callable[[Tensor, Tensor], Tensor], rank: int) -> dict[str, Tensor]:
    """The same of a pipeline's stages, one in each process."""
    from torch.distributed.pipelining import ScheduleGPipe

    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
    if rank == 0:
        schedule.step(data)
    else:
        schedule.step(target=torch.zeros(len(data), 2))
    return {name: t for part in agreed(after(stage.submod)) for name, t in part.items()}


@row("`torch.distributed.pipelining`, `pipeline`", "torch", "as torch.nn")
@in_two_processes
def traced_pipeline(rank: int) -> None:
    from torch.distributed.pipelining import SplitPoint, pipeline

    data, loss = torch.cat(batches(0, 2)), nn.functional.mse_loss
    expected = sequential(network(), data, loss)
    for form in FORMS:
        parts = pipeline(form(network()), mb_args=(data[:6],), split_spec={"3": SplitPoint.BEGINNING})
        same_state(piped(parts.build_stage(rank, torch.device("cpu")), data, loss, rank), expected)


@row(
    "`torch.distributed.pipelining`, `PipelineStage`",
    "torch",
    "as torch.nn; without these arguments a pass over empty memory moves statistics, torch.nn's too",
    "give it `input_args` and `output_args`",
)
@in_two_processes
def stages(rank: int) -> None:
    from torch.distributed.pipelining import PipelineStage

    data, loss = torch.cat(batches(0, 2)), nn.functional.mse_loss
    expected = sequential(network(), data, loss)
    between, end = torch.empty(6, 8, 8, 8, requires_grad=True), torch.empty(6, 2, requires_grad=True)
    for form in FORMS:
        model = form(network())
        part, entry, out = (model[:3], data[:6], between) if rank == 0 else (model[3:], between, end)
        stage = PipelineStage(part, rank, 2, torch.device("cpu"), input_args=(entry,), output_args=(out,))
        same_state(piped(stage, data, loss, rank), expected)
    for form in (lambda net: net, *FORMS):
        model = form(network())
        stage = PipelineStage(model[:3] if rank == 0 else model[3:], rank, 2, torch.device("cpu"))
        found = piped(stage, data, loss, rank)
        assert [int(found[f"{place}.num_batches_tracked"]) for place in NORMS] == [3, 3]
