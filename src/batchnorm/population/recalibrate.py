"""The entry point: what may be asked for, all or nothing, and the result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from batchnorm.choosing import Which, layers_with_domains, preserved
from batchnorm.distributed import Group
from batchnorm.errors import OptionError
from batchnorm.models.devices import device_types
from batchnorm.models.modes import set_training
from batchnorm.population.average import average
from batchnorm.population.batches import Batches, Forward, default_forward
from batchnorm.population.context import Context, MethodResult, Progress
from batchnorm.population.layers import Layer, select_layers
from batchnorm.population.pooled import pooled
from batchnorm.population.result import RecalibratedLayer, Recalibration, SkippedLayer
from batchnorm.population.transaction import transaction


class Method(NamedTuple):
    """A method.

    Attributes:
        run: what computes the statistics.
        training: whether the modules that take no part are in training mode, dropout included.
    """

    run: Callable[[Context], MethodResult]
    training: bool = False


def _exact(context: Context) -> MethodResult:
    from batchnorm.population.exact import Exact  # here, so that importing the package does not import greenlet

    return Exact(context).run()


METHODS = {"exact": Method(_exact), "pooled": Method(pooled), "average": Method(average, training=True)}


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "exact",
    forward: Forward | None = None,
    domain_of: Callable[[Any], Which] | None = None,
    max_samples: int | None = None,
    process_group: ProcessGroup | None = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Recalibration:
    """Set every batch-norm layer's running statistics to those of data, in place.

        mean = 1/n Σ x,    var = 1/n Σ (x - mean)^2

    over all values x of a channel that come into the layer from all batches. What comes in depends on what the layers
    upstream normalise by, and there the methods differ:

    - "exact": by their own new statistics, as inference will have it. Every forward pass waits at a layer until all
      have come there: one pass over the data. A layer may be called once in a forward pass.
    - "pooled": by each batch's statistics. One pass; layers may be called any number of times.
    - "average": as "pooled", and the result is the mean of the batches' means and unbiased variances, every call of one
      weight, with all other modules in training mode: what `torch.optim.swa_utils.update_bn` computes. For comparison.

    The variance of "exact" and "pooled" is the biased one, because the data are the population. Layers of torch.nn and
    their subclasses take part as ours do, by hooks. Only running means and variances change; `num_batches_tracked`,
    training flags, other buffers, random streams stay. After any exception everything is as before.

    Args:
        model: any module; DistributedDataParallel's inner module is what runs.
        batches: any iterable, read once and one at a time; of any sizes. Batches without samples are left out.
        method: "exact", "pooled" or "average".
        forward: `forward(model, batch)` runs the model. By default the model is called with the batch if it is a
            tensor, its first item if it is a tuple or list, or its items as keywords if it is a dict, on the model's
            device.
        domain_of: of a model whose layers have domains, `domain_of(batch)` returns the domain of a batch, by name or
            number, or a sequence or tensor of one for each sample, whose parts then are run one by one; such as
            `lambda batch: batch[1]` for batches (input, domain). Each domain's statistics become those of its own
            samples; one without samples keeps its own. Without it the batches are of the domain that is chosen.
        max_samples: use at most so many samples, in each process; the last batch is cut.
        process_group: the processes that share the work, each with batches of its own, of any number. By default the
            default group, where torch.distributed is initialised.
        memory_limit: of "exact", how many bytes of suspended activations may be held in memory; beyond it they go to a
            temporary file, or are computed again. By default half of what is available.
        progress: called as `progress(done, total)` with the layer calls that are done and all that there will be, None
            where that is not known yet.
        checkpoint: of "pooled", a file in which progress is kept, so that a killed run can go on. One for each process.

    Returns:
        What changed, in each layer, and which layers were skipped, with the reason.

    Raises:
        OptionError: an argument outside what it may be, a checkpoint of something else, or layers with several domains
            of which none is chosen.
        CountError: no samples, or one value for each channel.
        OrderError: "exact": a layer is called twice in a forward pass, or batches call layers in different orders.
        NonFiniteError: inf or NaN came into a layer.
        ProcessError: another process failed.
        Anything that `batches`, the model or `forward` raises.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 2; Wu and Johnson, "Rethinking 'Batch' in
    BatchNorm", 2021, section 3, on what running averages get wrong.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model  # its forward copies buffers around
    group = Group(process_group)
    with group.reporting():
        chosen = _chosen(method, checkpoint, memory_limit)
        layers, skipped = select_layers(inner, all_domains=domain_of is not None)
        group.all_gather(_identity(method, layers))
        with_domains = layers_with_domains(inner)
        if domain_of is not None and not with_domains:
            raise OptionError("got domain_of for a model without a layer that has domains. Leave it out")
        source = Batches(batches, max_samples, domain_of)
        context = Context(
            inner,
            layers,
            source,
            forward or default_forward,
            group,
            Progress(progress, source.expected),
            device_types(inner),
            memory_limit,
            None if checkpoint is None else Path(checkpoint),
        )
        if not layers:
            return Recalibration(method, 0, 0, (), tuple(skipped))
        with transaction(inner, layers, context.devices), preserved(with_domains):
            takes_part = {layer.module for layer in layers}
            for module in inner.modules():
                set_training(module, chosen.training and module not in takes_part)
            before = {layer: _doubles(layer) for layer in layers}
            computed = chosen.run(context)
            for layer, final in computed.populations.items():
                layer.settle(final.mean, final.var)
            used, samples = _total(context)
            changed = tuple(
                RecalibratedLayer(
                    layer.name, new.count, *before[layer], new.mean.cpu(), new.var.cpu(), vars(layer.module)["eps"]
                )
                for layer in layers
                if (new := computed.populations.get(layer)) is not None
            )
            skipped += [
                SkippedLayer(layer.name, "never called with a value")
                for layer in layers
                if layer not in computed.populations
            ]
    return Recalibration(method, used, samples, changed, tuple(skipped), computed.memory)


def _chosen(method: str, checkpoint: object, memory_limit: int | None) -> Method:
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise OptionError(f"got method={method!r}; it must be one of {known}")
    if checkpoint is not None and method != "pooled":
        raise OptionError(
            f'got checkpoint and method="{method}"; only "pooled" has progress that a file can keep. Leave checkpoint '
            f'out, or use method="pooled"'
        )
    if memory_limit is not None and memory_limit < 0:
        raise OptionError(f"got memory_limit={memory_limit}; it must be a number of bytes >= 0, or None")
    return METHODS[method]


def _doubles(layer: Layer) -> tuple[Tensor, Tensor]:
    """A layer's statistics before they change."""
    mean, var = (t.to("cpu", torch.float64, copy=True) for t in (layer.mean, layer.var))
    return mean, var


def _identity(method: str, layers: Sequence[Layer]) -> str:
    """What processes that work together have in common."""
    names = "\n".join(f"{layer.name} {layer.num_channels}" for layer in layers)
    digest = hashlib.blake2b(names.encode(), digest_size=4).hexdigest()
    return f'the beginning of method "{method}" for {len(layers)} layers ({digest})'


def _total(context: Context) -> tuple[int, int | None]:
    """Batches and samples of all processes."""
    source = context.batches
    samples = -1 if source.samples is None else source.samples
    _, shares = context.group.all_gather("the end", [torch.tensor([source.used, samples])])
    used, counts = zip(*(share[0].tolist() for share in shares), strict=True)
    return sum(used), None if min(counts) < 0 else sum(counts)
