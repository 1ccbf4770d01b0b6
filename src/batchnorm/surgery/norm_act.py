"""timm's `BatchNormAct2d` as one of ours: an instance of both classes, so that timm's own tools treat it rightly."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, fx, nn

from batchnorm import activations
from batchnorm._torch import called_by
from batchnorm.errors import OptionError
from batchnorm.models.hooks import has_hooks
from batchnorm.modules import BatchNorm, BatchNorm2d
from batchnorm.surgery.classes import reduced_by

_TIMM_CLASS = "timm.layers.norm_act.BatchNormAct2d"
TIMMS_OPTIONS = ("activation", "act")  # timm's class has them too, and its tools hand `act` and `drop` on


def is_timm_norm_act(layer: nn.Module) -> bool:
    """Whether a layer is exactly timm's `BatchNormAct2d`, recognised where timm is not imported."""
    return activations.qualified_name(type(layer)) == _TIMM_CLASS


class NormAct(BatchNorm2d):
    """`BatchNorm2d` with timm's two modules behind it: y = act(drop(normalised)).

    Where they are one of our activations alone, they are computed inside; else they are called. They are looked at in
    each call, so that one that is exchanged, or hooked, is heeded. `norm_act_class` makes the classes that layers have.
    """

    act: nn.Module
    drop: nn.Module

    @property
    def activation(self) -> str | None:
        """The one of our activations that `drop` and `act` are together; None where they are none."""
        return self._behind()[0]

    @activation.setter
    def activation(self, value: str | None) -> None:
        raise OptionError(
            f"got activation={value!r} for {self._title()}, which is timm's and computes what its module `act` says. "
            f"Set layer.act to a module, torch.nn.Identity() for none"
        )

    def _behind(self) -> tuple[str | None, str | None]:
        """One of our activations, or else the class of a module that has to be called."""
        act, drop = self.act, self.drop
        if type(drop) is not nn.Identity or has_hooks(drop):
            return None, type(drop).__qualname__
        if type(act) is nn.Identity and not has_hooks(act):
            return None, None
        name = None if has_hooks(act) else activations.of_module(act)[0]
        return name, None if name else type(act).__qualname__

    def options(self) -> dict[str, Any]:
        """`BatchNorm.options`, and a module that is called."""
        called = self._behind()[1]
        return super().options() | ({} if called is None else {"act": called})

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """`BatchNorm.forward`; then, where they are more than one of our activations, `drop` and `act`."""
        called = None if isinstance(input, fx.Proxy) else self._behind()[1]
        if called is not None and (residual is not None or activation is not None):
            raise OptionError(
                f"got a residual or an activation for {self._title()}, which calls {called} after the normalisation. "
                f"Add them outside, or set layer.act to one of our activations and layer.drop to torch.nn.Identity()"
            )
        y = super().forward(input, residual=residual, mask=mask, activation=activation)
        return y if called is None else self.act(self.drop(y))

    def _lost(self, name: str) -> dict[str, Any]:
        lost = super()._lost(name)
        if called_by("timm", 3):  # a property and what it asks are between
            for known in TIMMS_OPTIONS:
                lost.pop(known, None)
        return lost


@functools.cache
def norm_act_class(timm_class: Any) -> type[NormAct]:  # noqa: ANN401 - a class of modules
    """The class of our layers that are instances of timm's."""
    reduce_ex = reduced_by(NormAct, norm_act_class, timm_class)
    members = {"__reduce_ex__": reduce_ex, "__module__": NormAct.__module__, "__doc__": NormAct.__doc__}
    return type(timm_class.__name__, (NormAct, timm_class), members)


def inside(layer: BatchNorm) -> str | None:
    """What a layer computes behind its normalisation: an activation's name, or a module's class; None for nothing."""
    if not isinstance(layer, NormAct):
        return layer.activation
    name, called = layer._behind()
    return name or called


def has_our_forward(layer: nn.Module) -> bool:
    """Whether a layer computes what our classes say: no subclass, and nothing in its place, has another forward."""
    own = type(layer).forward in (BatchNorm.forward, NormAct.forward)
    return isinstance(layer, BatchNorm) and own and "forward" not in vars(layer)
