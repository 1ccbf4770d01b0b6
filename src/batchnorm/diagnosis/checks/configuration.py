"""BN1..: how layers are configured."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnosis.channels import FADED, Channels
from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.models.norm_layers import uninitialized

# Torch's default is 0.1, Keras's 0.99 and Flax's 0.99 in the other convention; nobody averages over fewer than two.
OTHER_CONVENTION = 0.5
# BN103. A tenth of the variance takes 5 % off the output, 1 - 1 / sqrt(1.1), and more where a channel varies less.
OF_VARIANCE = 0.1
# The largest eps that architectures are designed with: Keras's, EfficientNet's, Inception's. Small initial weights give
# healthy networks variances of 0.16 of it (torchvision's mobilenet_v3_small), and of 1e-5 far less (transformers'
# MobileViT); gamma makes up for what it takes off.
USUAL_EPS = 1e-3
TORCH_EPS = 1e-5
# BN105. A module's flag counts as the network's where more than half of the others have the same.
HALF = 0.5


def momentum_convention(subject: Subject) -> Iterator[Finding]:
    """The weight of the new value, taken for the weight of the old one."""
    for layer in subject.layers:
        momentum = layer.momentum
        if (
            layer.module is not None
            and layer.mean is not None
            and momentum is not None
            and momentum >= OTHER_CONVENTION
        ):
            yield Finding(
                "BN101",
                "warning",
                layer.name,
                f"momentum is {momentum:g}: the last batch weighs {momentum:.0%} of the running statistics",
                f"{layer.path}.momentum = {1 - momentum:.6g}",
                weight=momentum,
            )


def statistics_stand_still(subject: Subject) -> Iterator[Finding]:
    """Running statistics that nothing moves, though nobody froze them."""
    for layer in subject.layers:
        if layer.module is None or layer.mean is None or _frozen_statistics(layer):
            continue
        if not layer.module.track_running_stats:
            what, remedy = "track_running_stats is False, beside running statistics", "track_running_stats = True"
        elif layer.momentum == 0:
            what, remedy = "momentum is 0", "momentum = 0.1"
        else:
            continue
        yield Finding(
            "BN102",
            "warning",
            layer.name,
            f"{what}: training does not update them, and inference goes on using them",
            f"{layer.path}.{remedy}\n# or, to have training use them too:\n{_freezing(layer)}",
        )


def eps_size(subject: Subject) -> Iterator[Finding]:
    """An eps that is beside the variance, or so small that it protects from nothing."""
    for layer in subject.layers:
        if layer.module is None:
            continue
        var = Channels.of(layer).var
        # Channels into which only zeros come say nothing of how much inputs vary.
        varying = torch.empty(0) if var is None else var[var.isfinite() & (var > FADED)]
        median = float(varying.median()) if varying.numel() else 1.0
        dtype = torch.float32 if layer.var is None else torch.promote_types(layer.var.dtype, torch.float32)
        least = torch.finfo(dtype).eps / 2
        if layer.eps < least * min(1.0, median):
            scale = "infinite" if layer.eps <= 0 else f"{layer.eps**-0.5:.2g}"
            yield Finding(
                "BN103",
                "warning",
                layer.name,
                f"eps-too-small: {layer.eps:g} is lost when it is added to a variance of {min(1.0, median):.2g}; the "
                f"scale of a channel that does not vary becomes {scale}",
                f"{layer.path}.eps = {TORCH_EPS:g}",
            )
        elif varying.numel() and layer.eps > OF_VARIANCE * median:
            off = 1 - (median / (median + layer.eps)) ** 0.5
            yield Finding(
                "BN103",
                "info" if layer.eps <= USUAL_EPS else "warning",
                layer.name,
                f"eps-too-large: {layer.eps:g} beside a median running variance of {median:.2g} takes {off:.0%} off "
                f"the normalised values",
                f"{layer.path}.eps = {TORCH_EPS:g}  # then train: gamma has learned to make up for it\n"
                f"bn.recalibrate(model, batches)",
                weight=layer.eps / median,
            )


def batch_statistics_at_inference(subject: Subject) -> Iterator[Finding]:
    """Layers that have nothing to normalise by but the batch."""
    for layer in subject.layers:
        if layer.module is None or uninitialized(layer.module):
            continue
        if layer.mean is not None and layer.var is not None:
            continue
        yield Finding(
            "BN104",
            "warning",
            layer.name,
            "no running statistics: in inference, each prediction depends on the others in its batch",
            f"layer = {layer.path}\n"
            f"for name, buffer in type(layer)({layer.num_channels}).named_buffers():\n"
            f"    layer.register_buffer(name, buffer)\n"
            f"layer.track_running_stats = True\n"
            f"bn.recalibrate(model, batches)",
        )


def mixed_modes(subject: Subject) -> Iterator[Finding]:
    """Layers that are in another mode than the network."""
    if subject.model is None:
        return
    norms = {id(inside) for layer in subject.layers if layer.module is not None for inside in layer.module.modules()}
    others = [module.training for module in subject.model.modules() if id(module) not in norms]
    if not others:
        return
    share = sum(others) / len(others)
    training = subject.model.training if share == HALF else share > HALF
    for layer in subject.layers:
        module = layer.module
        if module is None or layer.mean is None or module.training == training or _frozen_statistics(layer):
            continue
        ours = layer.ours
        if ours is not None and ours.frozen.normalization:
            continue
        alike = f"{round(len(others) * (share if training else 1 - share))} of the {len(others)} other modules"
        if training:
            what = f"in inference mode, in a network in training mode ({alike}): the next .train() ends it"
            remedy = f"{_freezing(layer)}\n# or, if it was not meant to stand still:\n{layer.path}.train()"
        else:
            what = (
                f"in training mode, in a network in inference mode ({alike}): it normalises by the batch, and moves "
                f"its statistics"
            )
            remedy = f"{layer.path}.eval()"
        yield Finding("BN105", "warning", layer.name, what, remedy)


def half_frozen(subject: Subject) -> Iterator[Finding]:
    """Gamma and beta that do not learn beside statistics that move."""
    learning = subject.model is not None and any(p.requires_grad for p in subject.model.parameters())
    for layer in subject.layers:
        if layer.module is None or layer.mean is None:
            continue
        affine = list(layer.module.parameters())  # those of a weight that is computed, too
        if not affine or any(p.requires_grad for p in affine):
            continue
        ours = layer.ours
        if not layer.module.track_running_stats or layer.momentum == 0:
            continue  # BN102: its statistics stand still
        if ours is not None and (ours.frozen.statistics or ours.frozen.affine):
            continue
        if not layer.module.training and not learning:
            continue  # a network for inference alone
        moved = "move with every batch" if layer.module.training else "will move after the next .train()"
        yield Finding(
            "BN106",
            "warning",
            layer.name,
            f"gamma and beta do not learn (requires_grad is False), but the running statistics {moved}",
            _freezing(layer),
        )


def _frozen_statistics(layer: LayerState) -> bool:
    return layer.ours is not None and layer.ours.frozen.statistics


def _freezing(layer: LayerState) -> str:
    """Code that freezes a layer; torch.nn's has to become ours before."""
    converted = "" if layer.ours is not None else "bn.convert(model)\n"
    return f"{converted}bn.freeze({layer.path})"


CHECKS = (
    Check(
        "BN101",
        "momentum-convention",
        "warning",
        "state",
        "momentum is 0.5 or more: in Keras, Flax and ONNX it is the weight of the old value, in torch of the new one",
        "set it to 1 - momentum",
        fixed=False,
        run=momentum_convention,
    ),
    Check(
        "BN102",
        "statistics-stand-still",
        "warning",
        "state",
        "momentum is 0, or track_running_stats is False beside running statistics, in a layer that is not frozen",
        "set a momentum, or freeze it",
        fixed=False,
        run=statistics_stand_still,
    ),
    Check(
        "BN103",
        "eps-too-large / too-small",
        "warning",
        "state",
        "eps is more than a tenth of the median running variance, an info while it is 1e-3 at most, as in many "
        "architectures; or it is 0, or lost when it is added",
        "set the usual eps, then train or recalibrate",
        fixed=False,
        run=eps_size,
    ),
    Check(
        "BN104",
        "batch-statistics-at-inference",
        "warning",
        "state",
        "a layer has no running statistics, so that each prediction depends on the others in its batch",
        "give it running statistics and recalibrate",
        fixed=False,
        run=batch_statistics_at_inference,
    ),
    Check(
        "BN105",
        "mixed-modes",
        "warning",
        "state",
        "a layer is in training mode in a network in inference mode, or the reverse, and not frozen",
        "call .train() or .eval(), or freeze it",
        fixed=True,
        run=mixed_modes,
    ),
    Check(
        "BN106",
        "half-frozen",
        "warning",
        "state",
        "gamma and beta do not learn, but the running statistics move, or will after the next .train()",
        "freeze it",
        fixed=True,
        run=half_frozen,
    ),
)
