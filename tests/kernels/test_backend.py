"""Implementations are typed by the reference, and found by name."""

from __future__ import annotations

import inspect

from batchnorm import ops
from batchnorm.kernels import reference
from batchnorm.kernels.backend import Operations


def test_an_implementation_has_every_operation() -> None:
    asked: list[str] = []
    made = Operations(lambda name: asked.append(name) or name, eager=False)
    assert asked == list(ops.OPERATIONS)
    assert {name: getattr(made, name) for name in asked} == {name: name for name in asked}
    assert not made.eager


def test_every_function_of_the_reference_is_an_operation_or_a_helper() -> None:
    functions = {
        name
        for name, value in vars(reference).items()
        if inspect.isfunction(value) and value.__module__ == reference.__name__ and not name.startswith("_")
    }
    assert functions - set(ops.OPERATIONS) == {"statistics_dtype", "biased_variance"}


def test_no_two_backends_serve_the_same() -> None:
    served = [
        (device, dtype, activation)
        for backend in ops.BACKENDS
        for device in backend.devices
        for dtype in backend.dtypes
        for activation in backend.activations
    ]
    assert len(served) == len(set(served))
