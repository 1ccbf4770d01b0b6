"""timm's `BatchNormAct2d` as one of ours: an instance of both classes, so that timm's own tools treat it rightly."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

from torch import Tensor, fx, nn

from batchnorm import activations
from batchnorm._torch import HOOK_DICTS, called_by
from batchnorm.errors import OptionError
from batchnorm.modules import BatchNorm, BatchNorm2d

_TIMM_CLASS = "timm.layers.norm_act.BatchNormAct2d"


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
        """What comes after the normalisation: one of our names, or that of a module's class; None for nothing."""
        name, other = self._behind()
        return name or other

    @activation.setter
    def activation(self, value: str | None) -> None:
        raise OptionError(
            f"got activation={value!r} for {self._title()}, which is timm's and computes what its module `act` says. "
            f"Set layer.act to a module, torch.nn.Identity() for none"
        )

    def _behind(self) -> tuple[str | None, str | None]:
        """One of our activations that `drop` and `act` are, or else the class of one that has to be called."""
        act, drop = self.act, self.drop
        if type(drop) is not nn.Identity or any(getattr(drop, hooks) for hooks in HOOK_DICTS):
            return None, type(drop).__qualname__
        if any(getattr(act, hooks) for hooks in HOOK_DICTS):
            return None, type(act).__qualname__
        if type(act) is nn.Identity:
            return None, None
        name = activations.of_module(act)[0]
        return name, None if name else type(act).__qualname__

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """`BatchNorm.forward`; then, where they are more than one of our activations, `drop` and `act`."""
        name, other = self._behind()
        if other is None or isinstance(input, fx.Proxy):
            return super().forward(input, residual=residual, mask=mask, activation=activation)
        if residual is not None or activation is not None:
            raise OptionError(
                f"got a residual or an activation for {self._title()}, which calls {other} behind the normalisation. "
                f"Add them outside, or set layer.act to one of our activations and layer.drop to torch.nn.Identity()"
            )
        y: Tensor = self.act(self.drop(self._normalize(input, None, mask, name)))
        return y

    def _lost(self, name: str) -> dict[str, Any]:
        lost = super()._lost(name)
        if called_by("timm", 3):  # a property and what it asks are between
            lost.pop("activation", None)  # timm's tools know these layers, and hand `act` and `drop` on
        return lost


@functools.cache
def norm_act_class(timm_class: Any) -> type[NormAct]:  # noqa: ANN401 - a class of modules
    """The class of our layers that are instances of timm's."""

    def __reduce_ex__(self: NormAct, protocol: Any) -> Any:  # noqa: ANN401, N807 - Python's own
        reduced: Any = NormAct.__reduce_ex__(self, protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return _blank, (timm_class,), *reduced[2:]

    members = {"__reduce_ex__": __reduce_ex__, "__module__": NormAct.__module__, "__doc__": NormAct.__doc__}
    return type(timm_class.__name__, (NormAct, timm_class), members)


def _blank(timm_class: type[nn.Module]) -> NormAct:
    cls = norm_act_class(timm_class)  # type: ignore[arg-type]  # mypy doubts its hash
    return cls.__new__(cls)


def has_our_forward(layer: nn.Module) -> bool:
    """Whether a layer computes what our classes say: no subclass, and nothing in its place, has another forward."""
    own = type(layer).forward in (BatchNorm.forward, NormAct.forward)
    return isinstance(layer, BatchNorm) and own and "forward" not in vars(layer)
