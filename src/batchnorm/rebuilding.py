"""The numbers that torch's layers are made from, which tools read to make another layer from one of ours.

Torch's and others' converters, folders and freezers look at a layer's class, read these numbers, and put a layer in its
place that has torch's arguments and no others. Where that layer would compute something else, reading them raises:
otherwise an activation would disappear without a word. Of the alternatives, a layer that is no instance of torch's
class is passed over, as silently, by what resets, freezes or synchronises; and an activation in a child module is
dropped with its parent.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from batchnorm._torch import BatchNormBase
from batchnorm.errors import OptionError, TransformError

# Options that a layer made from these numbers may lack: results are the same.
_REPLACEABLE = ("sync", "process_group", "inplace")
# Options of which inference by scale and shift knows nothing, or which say only where the channels are.
_ONLY_TRAINING = ("virtual_batch_size", "renorm", "frozen", "channel_dim")


def call_layer(layer: nn.Module, input: Tensor, **options: Any) -> Any:  # noqa: ANN401 - handed on
    """A layer's output for an input and what else is given: what graphs of torch.fx call."""
    return layer(input, **options)


class Rebuilding(BatchNormBase):
    """num_features, eps and momentum as true as they can be to whoever reads them.

    They are in the layer's dict, as torch's; and under names of their own, which the layer itself reads: torch.compile
    of torch 2.10 takes `vars(layer)["eps"]` for `layer.eps`, and would ask the question that is refused.
    """

    _num_features: int
    _eps: float
    _momentum: float | None

    def options(self) -> dict[str, Any]:
        """What the layer has that torch's cannot express."""
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """C; raises where a layer of torch.nn made with it would lack options of this one."""
        self._refuse("num_features")
        return self._num_features

    @num_features.setter
    def num_features(self, value: int) -> None:
        vars(self).update(num_features=value, _num_features=value)

    @property
    def eps(self) -> float:
        """Added to the variance; raises where y = (x - mean) / sqrt(var + eps) * weight + bias is not all of it."""
        self._refuse("eps")
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        value = float(value)  # NumPy's numbers are none to compilers
        vars(self).update(eps=value, _eps=value)

    @property
    def momentum(self) -> float | None:
        """The weight of a batch in the running statistics; None for the equal-weight average."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        value = None if value is None else float(value)
        vars(self).update(momentum=value, _momentum=value)

    def reset_parameters(self) -> None:
        """The initial values again, as torch's own, which in torch 2.10 does not know a weight without a bias."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def __dir__(self) -> list[str]:
        """Without what would raise: whoever looks at all there is, torch.jit.trace for one, is not about to rebuild."""
        hidden = {name for name in ("num_features", "eps") if self._lost(name)}
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]  # torch's
        return [name for name in names if name not in hidden]

    def _lost(self, name: str) -> dict[str, Any]:
        """The options that what is made with this number would lack."""
        kept = _REPLACEABLE if name == "num_features" else (*_REPLACEABLE, *_ONLY_TRAINING)
        return {option: value for option, value in self.options().items() if option not in kept}

    def _refuse(self, name: str) -> None:
        if lost := self._lost(name):
            raise OptionError(
                f"got a question for {name} of {type(self).__name__} with "
                f"{', '.join(f'{option}={value}' for option, value in lost.items())}. Tools that ask for it make "
                f"another layer from this one, without {', '.join(lost)}. Use batchnorm.revert(model) or "
                f"batchnorm.fold(model, inputs) first, or batchnorm.convert(model, sync=True) to share statistics; to "
                f"read the number all the same: vars(layer)[{name!r}]"
            )

    def _leaf(self, input: fx.Proxy, residual: object, mask: object, activation: str | None) -> Any:  # noqa: ANN401 - a proxy
        """A node that calls this layer: to torch.fx it is a leaf, as torch's own layers are.

        With more than its input it is a call of a function: torch's and others' rewriters take nodes that call a module
        of torch's class for one of torch's calls, and drop what else is given.
        """
        options = {"residual": residual, "mask": mask, "activation": activation}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        tracer = input.tracer
        assert isinstance(tracer, fx.Tracer)
        path = tracer.path_of_module(self)
        if not given:
            return tracer.create_proxy("call_module", path, (input,), {})
        layer = tracer.create_proxy("get_attr", path, (), {})
        return tracer.create_proxy("call_function", call_layer, (layer, input), given)

    def _tell_opacus(self) -> None:
        """Have opacus refuse and replace this class as torch's, where opacus is loaded: it looks up the exact class."""
        if (loaded := sys.modules.get("opacus.validators.module_validator")) is None:
            return
        cls = type(self)
        torchs = [*(base for base in cls.__mro__ if base.__module__.startswith("torch.")), nn.BatchNorm1d]
        for registry in (loaded.ModuleValidator.VALIDATORS, loaded.ModuleValidator.FIXERS):
            of_torch = next((registry[base] for base in torchs if base in registry), None)
            if of_torch is not None:
                registry.setdefault(cls, of_torch)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TransformError(
            f"got {type(self).__name__} for torch.jit.script, which would compile its Python. Script a model after "
            f"batchnorm.revert(model) or batchnorm.fold(model, inputs); torch.jit.trace and torch.export take ours"
        )
