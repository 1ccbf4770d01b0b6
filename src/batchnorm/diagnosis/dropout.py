"""What dropout does to the variance of a layer's input: measured in inference with dropout alone switched on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.call import Call
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.models.devices import device_types
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.modes import set_training
from batchnorm.models.norm_layers import NormLayer
from batchnorm.moments import Moments
from batchnorm.population.interrupts import caller
from batchnorm.population.torch_state import seed
from batchnorm.population.transaction import transaction
from batchnorm.surgery import scale_shift


def dropout_ratio(
    subject: Subject, layers: Collection[LayerState], dropouts: Collection[nn.Module]
) -> dict[str, Tensor]:
    """By layers' names, (C,) the variance of what comes in with dropout in parts of that without; 1 where that is 0.

    Two passes over the batches that were kept, which `subject.data.passes` counts. Everything is as before afterwards.

    Args:
        subject: with data.
        layers: where to look.
        dropouts: the modules whose training mode switches dropout on.

    Returns:
        Nothing where there are no kept batches, or where the model does not run like this.
    """
    model, data = subject.model, subject.data
    if model is None or data is None or not data.kept:
        return {}
    variances: list[dict[str, Tensor]] = []
    for active in ((), dropouts):
        moments: dict[str, Moments] = {}
        names = {layer.module: layer.name for layer in layers}

        def note(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            names: dict[Any, str] = names,
            moments: dict[str, Moments] = moments,
        ) -> None:
            x = args[0] if args else kwargs["input"]
            assert isinstance(module, NormLayer)
            axis = scale_shift.channel_dim(module)
            got = functional.batch_moments(Call(x, mask=kwargs.get("mask"), channel_dim=axis))
            name = names[module]
            moments[name] = moments[name] + got if name in moments else got

        try:
            with transaction(model, (), device_types(model)), forward_hooks([m for m in names if m], before=note):
                seed(0)  # the same report each time; the stream is put back
                for module in model.modules():
                    set_training(module, module in active)
                for batch in data.kept:
                    with caller():
                        subject.forward(model, batch)
        except Exception:  # of the model, in a mixture of modes that it may not be made for
            return {}
        data.passes += len(data.kept) / max(data.batches, 1)
        variances.append({name: got.var() for name, got in moments.items() if got.count > 0})
    without, dropped = variances
    return {
        name: (dropped[name] / variance).where(variance > 0, torch.ones_like(variance))
        for name, variance in without.items()
        if name in dropped
    }
