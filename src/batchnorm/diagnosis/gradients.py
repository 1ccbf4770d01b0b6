"""The gradients of one training pass, which leaves no trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.diagnosis.gap import target_of
from batchnorm.diagnosis.subject import Subject
from batchnorm.errors import CountError
from batchnorm.models.devices import device, device_types
from batchnorm.models.modes import set_training
from batchnorm.models.nested import map_tensors
from batchnorm.population.transaction import transaction


def training_gradients(subject: Subject, content: Any) -> dict[str, Tensor | None]:  # noqa: ANN401 - any batch
    """The gradients of the loss of one batch, by the names of the parameters that learn; None for none.

    Empty where the batch has too few values to train on: another check is about that.

    Raises:
        Anything that the model in training, or the loss of what it returns there, raises.
    """
    model, loss = subject.model, subject.loss
    assert model is not None
    assert loss is not None
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    home = device(model)
    content = map_tensors(content, lambda t: t.clone() if t.is_inference() else t)  # those cannot be differentiated
    with torch.inference_mode(False), transaction(model, (), device_types(model)), torch.enable_grad():
        for module in model.modules():
            set_training(module, True)
        try:
            output = subject.forward(model, content)
        except (CountError, ValueError) as error:
            if isinstance(error, CountError) or "more than 1 value per channel" in str(error):
                return {}
            raise
        value = loss(output, map_tensors(target_of(content), lambda t: t.to(home)))
        if not value.requires_grad:
            return dict.fromkeys(learning)
        gradients = torch.autograd.grad(value, list(learning.values()), allow_unused=True)
    return dict(zip(learning, gradients, strict=True))
