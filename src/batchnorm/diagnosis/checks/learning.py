"""BN4..: how layers learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.feeding import scale_invariant
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.report.document import Table

# BN404. Initial weights of usual networks differ by less in lr / norm^2: torchvision's ResNet-18 by 23, MobileNetV2 by
# 37 but for the deepest depthwise convolutions. 50 is a factor of 7 in the norm.
APART = 50.0
SHOWN = 8  # rows of a table

GROUPS = """\
affine = {p for m in model.modules() if hasattr(m, "running_mean") for p in m.parameters(recurse=False)}
for group in list(optimizer.param_groups):
    moved = [p for p in group["params"] if p in affine]
    group["params"] = [p for p in group["params"] if p not in affine]
    if moved:
        optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0})"""


def decayed_affine(subject: Subject) -> Iterator[Finding]:
    """Weight decay that pulls gamma and beta to 0."""
    groups = _groups(subject)
    for layer in subject.layers:
        decays = {
            name: max(float(group.get("weight_decay") or 0.0) for group in groups[id(parameter)])
            for name, parameter in _learning(layer)
            if id(parameter) in groups
        }
        reached = {name: decay for name, decay in decays.items() if decay}
        if reached:
            yield Finding(
                "BN401",
                "info",
                layer.name,
                " and ".join(f"{GREEK[name]} decays at {decay:g}" for name, decay in reached.items())
                + ": weight decay reaches what does not overfit",
                GROUPS,
                weight=max(reached.values()),
            )


def not_optimised(subject: Subject) -> Iterator[Finding]:
    """Gamma and beta that learn by their flags, but in no group of the optimizer, or in two."""
    if subject.optimizer is None:
        return
    groups = _groups(subject)
    model = subject.model
    strange = model is not None and not any(id(p) in groups for p in model.parameters())
    for layer in subject.layers:
        times = {name: len(groups.get(id(parameter), ())) for name, parameter in _learning(layer)}
        missing = [name for name, count in times.items() if count == 0]
        repeated = [name for name, count in times.items() if count > 1]
        if missing:
            yield Finding(
                "BN402",
                "warning",
                layer.name,
                f"{' and '.join(GREEK[name] for name in missing)} require gradients, but are in no parameter group"
                + (": the optimizer has none of this model's parameters" if strange else ""),
                f'optimizer.add_param_group({{"params": [{", ".join(f"{layer.path}.{name}" for name in missing)}], '
                f'"weight_decay": 0.0}})',
            )
        if repeated:
            yield Finding(
                "BN402",
                "warning",
                layer.name,
                f"{' and '.join(GREEK[name] for name in repeated)} are in {max(times.values())} parameter groups: each "
                f"step is taken as often",
                _once(layer, repeated),
            )


def _once(layer: LayerState, names: list[str]) -> str:
    """Code that leaves parameters in the first of their groups."""
    tensors = ", ".join(f"{layer.path}.{name}" for name in names)
    return (
        f"for parameter in [{tensors}]:\n"
        f"    places = [(g, i) for g in optimizer.param_groups for i, p in enumerate(g['params']) if p is parameter]\n"
        f"    for group, i in reversed(places[1:]):\n"
        f"        del group['params'][i]"
    )


def no_gradient(subject: Subject) -> Iterator[Finding]:
    """Gamma and beta that learn, but that nothing of the loss comes back to."""
    if subject.model is None or not subject.gradients:
        return
    names = {id(parameter): name for name, parameter in subject.model.named_parameters()}
    # Behind a gamma of 0 nothing comes back, in every new network whose residual blocks begin with one.
    begins = any(layer.weight is not None and _all_zero(layer.weight.detach()) for layer in subject.layers)
    for layer in subject.layers:
        if subject.data is not None and layer.name not in subject.data.layers:
            continue  # BN204: it is not called
        gradients = {
            name: subject.gradients[names[id(parameter)]]
            for name, parameter in _learning(layer)
            if names.get(id(parameter)) in subject.gradients
        }
        absent = [name for name, gradient in gradients.items() if gradient is None]
        zero = not absent and bool(gradients) and all(_all_zero(g) for g in gradients.values() if g is not None)
        if not absent and (not zero or begins):
            continue
        what = " and ".join(GREEK[name] for name in (absent or gradients))
        yield Finding(
            "BN403",
            "warning",
            layer.name,
            f"{what} get {'no gradient' if absent else 'gradients of 0'} from the loss: they do not learn",
            f"# look behind {layer.path} for .detach(), torch.no_grad() or .data; or, if it is not to learn:\n"
            f"{'' if layer.ours is not None else 'bn.convert(model); '}bn.freeze({layer.path})",
        )


def _all_zero(tensor: Tensor) -> bool:
    return not tensor.is_meta and not is_lazy(tensor) and not bool(tensor.any())


class _Rate(NamedTuple):
    """A weight right before a batch-norm layer, and how fast it turns.

    Attributes:
        layer: the batch-norm layer.
        weight: its path.
        norm: of the weights of one output channel: the root of their mean square norm.
        lr: the learning rate.
    """

    layer: LayerState
    weight: str
    norm: float
    lr: float

    @property
    def effective(self) -> float:
        return self.lr / self.norm**2


def effective_learning_rate(subject: Subject) -> Iterator[Finding]:
    """Weights whose scale makes no difference, and that turn much faster or slower than the others'."""
    if subject.optimizer is None or subject.model is None:
        return
    rates = _rates(subject)
    if len(rates) < 2:
        return
    logs = torch.tensor([rate.effective for rate in rates], dtype=torch.float64).log()
    # Each beside the others, without itself.
    far = torch.stack([logs[i] - torch.cat([logs[:i], logs[i + 1 :]]).median() for i in range(len(rates))])
    order = far.abs().argsort(descending=True)
    table = Table(
        "weights before batch norm, the most unlike the others first",
        ["weight", "norm of a channel", "lr / norm^2", "others'"],
        [
            [
                rates[i].weight,
                f"{rates[i].norm:.3g}",
                f"{rates[i].effective:.3g}",
                f"{rates[i].effective / far[i].exp().item():.3g}",
            ]
            for i in order[:SHOWN].tolist()
        ],
    )
    limit = torch.tensor(APART, dtype=torch.float64).log()
    for i in (far.abs() >= limit).nonzero().flatten().tolist():
        rate, factor = rates[i], float(far[i].abs().exp())
        yield Finding(
            "BN404",
            "info",
            rate.layer.name,
            f"the weight before it, {rate.weight}, turns {factor:.0f} times {'faster' if far[i] > 0 else 'slower'} "
            f"than the others: lr / norm^2 is {rate.effective:.2g} at a norm of {rate.norm:.2g}",
            f"# its scale makes no difference to the output in training, so it may have the others':\n"
            f'model.get_parameter("{rate.weight}").data *= {float((far[i] / 2).exp()):.3g}\n'
            f"bn.recalibrate(model, batches)",
            table,
            weight=factor,
        )


def _rates(subject: Subject) -> list[_Rate]:
    assert subject.model is not None
    groups = _groups(subject)
    names = {id(parameter): name for name, parameter in subject.model.named_parameters()}
    feeding = scale_invariant(subject)
    rates = []
    for layer in subject.layers:
        source = None if layer.module is None else feeding.get(layer.module)
        if source is None:
            continue
        weight = source.parameters()[0]
        if not weight.requires_grad or id(weight) not in groups or weight.is_meta:
            continue
        lr = sum(float(group.get("lr", 0.0)) for group in groups[id(weight)])
        outputs = weight.shape[1] * source.groups if source.transposed else weight.shape[0]
        norm = float(weight.detach().double().norm()) / max(outputs, 1) ** 0.5
        if lr > 0 and 0 < norm < float("inf"):
            rates.append(_Rate(layer, names[id(weight)], norm, lr))
    return rates


GREEK = {"weight": "gamma", "bias": "beta"}


def _learning(layer: LayerState) -> list[tuple[str, Tensor]]:
    """Gamma and beta, by their names in the layer, where they learn."""
    if layer.module is None or (layer.ours is not None and layer.ours.frozen.affine):
        return []
    both = (("weight", layer.weight), ("bias", layer.bias))
    return [(name, p) for name, p in both if p is not None and not is_lazy(p) and p.requires_grad]


def _groups(subject: Subject) -> dict[int, list[dict[str, Any]]]:
    """By the id of a parameter, the optimizer's groups that it is in, as often as it stands there."""
    found: dict[int, list[dict[str, Any]]] = {}
    for group in () if subject.optimizer is None else subject.optimizer.param_groups:
        for parameter in group["params"]:
            found.setdefault(id(parameter), []).append(group)
    return found


CHECKS = (
    Check(
        "BN401",
        "decayed-affine",
        "info",
        "optimizer",
        "weight decay reaches gamma or beta",
        "put them into a parameter group without weight decay",
        fixed=False,
        run=decayed_affine,
    ),
    Check(
        "BN402",
        "not-optimised",
        "warning",
        "optimizer",
        "gamma or beta require gradients, but are in no parameter group of the optimizer, or in two",
        "add them, or leave them in one",
        fixed=False,
        run=not_optimised,
    ),
    Check(
        "BN403",
        "no-gradient",
        "warning",
        "loss",
        "in a training pass, no gradient, or one of 0, reaches gamma or beta",
        "find what is detached after the layer",
        fixed=False,
        run=no_gradient,
    ),
    Check(
        "BN404",
        "effective-learning-rate",
        "info",
        "optimizer",
        "the weights right before a layer turn 50 times faster or slower than those before the other layers, by the "
        "learning rate over their squared norm",
        "give them the others' norm: their scale makes no difference to the output",
        fixed=False,
        run=effective_learning_rate,
    ),
)
