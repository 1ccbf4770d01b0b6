"""BN1..: how layers are configured."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.subject import Subject

# Torch's default is 0.1, Keras's 0.99 and Flax's 0.99 in the other convention; nobody averages over fewer than two.
OTHER_CONVENTION = 0.5


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
)
