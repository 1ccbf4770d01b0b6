"""Tools that train one model in several processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import DTypeError, OptionError
from compatibility.rows import row
from compatibility.together import agreed, in_two_processes
from compatibility.training import (
    FORMS,
    NORMS,
    batches,
    converted,
    fused,
    inside,
    network,
    same,
    same_in_bfloat16,
    same_state,
    state,
    train,
    whole,
)
from support import tolerances
from support.comparison import close


@row(
    "`DistributedDataParallel`",
    "torch",
    "as torch.nn, `broadcast_buffers` or not; `num_batches_skipped` is each process's own",
)
@in_two_processes
def data_parallel(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    for options in ({}, {"broadcast_buffers": False}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        expected = train(DistributedDataParallel(network(), **options), batches(rank))
        for form in FORMS:
            same(train(DistributedDataParallel(form(network()), **options), batches(rank)), expected)
    # The next forward pass takes process 0's statistics over, and process 1 goes on counting what it skipped.
    model = DistributedDataParallel(converted(network()))
    first, second = batches(rank, 2)
    first[0, 0, 0, 0] = float("inf") if rank else 0.0
    model(first)
    model(second)
    assert agreed(model.module[1].num_batches_skipped.tolist()) == [[0] * 8, [1] * 8]
    assert all(whole(t).isfinite().all() for t in model.buffers())


@row("`DistributedDataParallel` in `Join`, uneven numbers of batches", "torch", "as torch.nn")
@in_two_processes
def joined(rank: int) -> None:
    from torch.distributed.algorithms.join import Join
    from torch.nn.parallel import DistributedDataParallel

    def trained(net: nn.Module) -> dict[str, Tensor]:
        model = DistributedDataParallel(net)
        with Join([model]):
            train(model, batches(rank, 1 if rank else 3))
        return state(model)

    expected = trained(network())
    for form in FORMS:
        same_state(trained(form(network())), expected)


@row(
    "`DistributedDataParallel`, statistics of all processes",
    "torch",
    "as one process with the whole batch; torch.nn's `SyncBatchNorm` refuses the CPU",
    "`batchnorm.convert(model, sync=True)`",
)
@in_two_processes
def data_parallel_with_shared_statistics(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    expected = train(network(), [torch.cat(parts) for parts in zip(batches(0), batches(1), strict=True)])
    for form in (lambda net: net, fused, inside):
        model = form(bn.convert(network(), sync=True))
        found = train(DistributedDataParallel(model), batches(rank))
        loss = [sum(each) / 2 for each in zip(*agreed(found.losses), strict=True)]
        same(found._replace(losses=loss, state=state(model)), expected)


@row(
    "`SyncBatchNorm.convert_sync_batchnorm`",
    "torch",
    "plain and fused layers as torch.nn's; raises at a layer with an activation inside",
    "with an activation inside, `batchnorm.convert(model, sync=True)` instead",
)
@in_two_processes
def torchs_shared_statistics(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    x = batches(rank, 1)[0]
    expected = train(network(), [torch.cat(parts) for parts in zip(batches(0), batches(1), strict=True)])
    for form in (converted, fused):
        model = convert(form(network()))
        assert type(model[1]) is type(model[4]) is nn.SyncBatchNorm
        with pytest.raises(ValueError, match="expected input tensor to be on"):
            convert(form(network()))(x)
        close(model.eval()(x).detach(), network().eval()(x).detach())
        # Torch's own layer needs a GPU to train; ours takes its place and shares the statistics.
        again = bn.convert(model).train()
        train(DistributedDataParallel(again), batches(rank))
        same_state(state(again), expected.state)
    model = inside(network())
    with pytest.raises(OptionError, match=r"batchnorm\.convert\(model, sync=True\)"):
        convert(model)
    assert type(model[1]) is bn.BatchNorm2d


def sharded(model: nn.Module, *, each: bool, **options: Any) -> nn.Module:
    """The model in parts, and each of its layers too where that is asked for."""
    from torch.distributed.fsdp import fully_shard

    for child in list(model.children()) if each else []:
        if list(child.parameters()):
            fully_shard(child, **options)
    return fully_shard(model, **options)


@row("FSDP2, `fully_shard`", "torch", "as torch.nn, layers sharded one by one or not")
@in_two_processes
def fully_sharded(rank: int) -> None:
    for each in (False, True):
        expected = train(sharded(network(), each=each), batches(rank))
        for form in FORMS:
            same(train(sharded(form(network()), each=each), batches(rank)), expected)


@row("FSDP2, models made on the meta device", "torch", "as torch.nn, however they are filled")
@in_two_processes
def fully_sharded_from_meta(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.tensor import DTensor, distribute_tensor

    expected = train(sharded(network(), each=False), batches(rank))
    weights = network().state_dict()

    def broadcast(model: nn.Module) -> None:
        mine = {name: t.clone() for name, t in weights.items()} if rank == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, mine, options=options)

    def parts(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: distribute_tensor(weights[name], t.device_mesh, t.placements)
            if isinstance(t, DTensor)
            else weights[name].clone()
            for name, t in model.state_dict().items()
        }

    def assigned(model: nn.Module) -> None:
        model.load_state_dict(parts(model), assign=True)

    def copied(model: nn.Module) -> None:
        model.to_empty(device="cpu").load_state_dict(parts(model))

    def emptied_and_broadcast(model: nn.Module) -> None:
        broadcast(model.to_empty(device="cpu"))

    for fill in (broadcast, emptied_and_broadcast, assigned, copied):
        for form in FORMS:
            with torch.device("meta"):
                model = sharded(form(network()), each=False)
            assert model[1].running_mean.is_meta
            fill(model)
            same(train(model, batches(rank)), expected)
            assert model[1].num_batches_skipped.tolist() == [0] * 8


@row("FSDP2, models made on the meta device, `reset_parameters`", "torch", "initial values as torch.nn's")
@in_two_processes
def fully_sharded_and_reset(rank: int) -> None:
    def made(form: Any) -> nn.Module:
        with torch.device("meta"):
            model = sharded(form(network()), each=False)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model

    expected = train(made(lambda net: net), batches(rank))
    for form in FORMS:
        same(train(made(form), batches(rank)), expected)


@row(
    "FSDP2, `MixedPrecisionPolicy` with bfloat16",
    "torch",
    "right, with statistics in float32; torch.nn's layers raise on the CPU",
)
@in_two_processes
def fully_sharded_in_mixed_precision(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = train(sharded(network(), each=False), batches(rank))
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        train(sharded(network(), each=False, mp_policy=policy), batches(rank))
    for each in (False, True):
        for form in FORMS:
            model = sharded(form(network()), each=each, mp_policy=policy)
            found = train(model, batches(rank))
            same_in_bfloat16(found, expected)
            for place in NORMS:
                layer = model.get_submodule(place)
                assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def wrapped(model: Any, *, each: bool, **options: Any) -> nn.Module:
    """The model in FSDP1, and each of its layers too where that is asked for."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"device_id": torch.device("cpu"), "use_orig_params": True, **options}
    for name, child in list(model.named_children()) if each else []:
        if list(child.parameters()):
            setattr(model, name, FullyShardedDataParallel(child, **options))
    return FullyShardedDataParallel(model, **options)


@row("FSDP1, `FullyShardedDataParallel`", "torch", "as torch.nn; bfloat16 parameters with statistics in float32")
@in_two_processes
def fully_sharded_of_old(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    def trained(model: nn.Module, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = wrapped(model, **options)
        losses = train(model, batches(rank)).losses
        with FullyShardedDataParallel.summon_full_params(model):
            return losses, {name.replace("_fsdp_wrapped_module.", ""): t for name, t in state(model).items()}

    expected = trained(network(), each=False)
    for each in (False, True):
        for form in FORMS:
            found = trained(form(network()), each=each)
            close(torch.stack(found[0]), torch.stack(expected[0]))
            same_state(found[1], expected[1])
            precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            found = trained(form(network()), each=each, mixed_precision=precision)
            same_state(found[1], expected[1], tolerances.SEVERAL_ROUNDINGS[torch.bfloat16])


@row(
    "FSDP1, `MixedPrecision(buffer_dtype=torch.bfloat16)`",
    "torch",
    "raises in training, where averages in bfloat16 stand still; right in inference",
    "leave `buffer_dtype` out",
)
@in_two_processes
def buffers_of_half_precision(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecision

    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    x = batches(rank, 1)[0]
    for form in FORMS:
        model = wrapped(form(network()), each=False, mixed_precision=precision)
        with pytest.raises(DTypeError, match="Leave buffers out of mixed precision"):
            model(x)
        y = model.eval()(x).detach().float()
        close(y, network().eval()(x).detach(), tolerances.SEVERAL_ROUNDINGS[torch.bfloat16])
