"""Every private name of torch that this package uses: why, and what happens without it.

Nothing else in the package may use one; `tests/test__torch.py` holds that each exists and behaves. The names that a
subclass of `torch.nn.Module` overrides (`_apply`, `_load_from_state_dict`, `_check_input_dim`) and its own dicts
(`_parameters`, `_buffers`) are torch's protocol for subclasses; `modules.py` uses those.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree

R = TypeVar("R")

# The base of torch's batch-norm layers, SyncBatchNorm too. There is no public one: without it, a list of classes.
BatchNormBase = nn.modules.batchnorm._BatchNorm

# Whether a transform of torch.func is at work: an autograd Function that writes to its inputs cannot take part, plain
# torch can. There is no public question. Without it, every call would have to go through plain torch.
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# The running backward pass, -1 outside of one. There is no public question. Without it, activation checkpointing would
# move the running statistics twice.
current_backward: Callable[[], int] = torch._C._current_graph_task_id


# Whether torch.jit.trace, or the older exporter to ONNX, records: `torch.jit.is_tracing`, which asks this in two frames
# more.
is_traced: Callable[[], bool] = torch._C._is_tracing
# A trace bakes in what is asked of shapes. Of its own code torch does not warn about this, and ours asks only what
# decides between errors and operators.
warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning, module=r"batchnorm\.")


def is_exported() -> bool:
    """Whether torch.export records: `torch.compiler.is_exporting`.

    In a graph of torch.compile, that is True in torch 2.10 even where nothing is exported. This flag, which it returns
    elsewhere, is right in every version.
    """
    return torch.compiler._is_exporting_flag


def in_functorch() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work: they need plain torch."""
    # forward_ad's level: dual tensors could be found by looking at every operand instead.
    return functorch_is_active() or forward_ad._current_level >= 0


def in_backward_recompute() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing repeats it, for gradients alone.

    Its statistics were committed the first time.
    """
    return not torch.compiler.is_compiling() and current_backward() != -1


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place.

    Torch documents it, under this private name. Without it, steps of optimizers that are not torch's are not noticed.
    """
    return tensor._version


def base(tensor: Tensor) -> Tensor | None:
    """What a view was taken from, a view of a view too; None for a tensor that is no view.

    There is no public question. Without it, a flattened output would be kept where the output itself is not.
    """
    return tensor._base


def saved_by(node: Any, name: str) -> Any:  # noqa: ANN401 - torch gives nodes no public type for it
    """What a node of the graph has kept under this name for its backward pass; None if it has no such thing.

    Torch documents these attributes, under their private names. Without them, results of poolings and concatenations
    would be kept.
    """
    return getattr(node, f"_saved_{name}", None)


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its preparations for transforms, which must not be at work.

    They take 2 of the 50 microseconds of a small input. Without this, `function.apply` itself does.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # not in its stub
    return apply


def outside_graphs(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, which torch.compile calls but does not look into: the graph breaks there.

    `torch.compiler.disable`, applied when it is needed: it imports the compiler, which takes as long as torch itself.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:  # noqa: ANN401 - handed on
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-any-return]  # torch's
        return function(*args, **kwargs)

    return call


def registered_tree(cls: type) -> Any:  # noqa: ANN401 - torch gives the entry no public type
    """How torch takes objects of a class apart, `flatten_fn`, and makes them again, `unflatten_fn`; None if it cannot.

    Of trees of tensors torch has nothing public. Without it, outputs of models could only be tuples, lists and dicts.
    """
    return _pytree.SUPPORTED_NODES.get(cls)


def register_tree(cls: type, flatten: Callable[[Any], list[Any]], unflatten: Callable[[list[Any]], Any]) -> None:
    """Have trees go on inside objects of this class."""
    _pytree.register_pytree_node(
        cls,
        lambda value: (flatten(value), None),
        lambda leaves, _: unflatten(list(leaves)),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def thread_modes() -> tuple[object, ...]:
    """What torch keeps for a thread and nobody can exchange, as something to compare.

    Without it, a forward pass that is suspended inside such a mode would leave it to others, silently.
    """
    return (
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def saves_through_hooks() -> bool:
    """Whether hooks for saved tensors are at work: activation checkpointing, or tensors kept elsewhere.

    There is no public question. Without it, every call would have to be prepared for a repetition.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, those that are None too: `named_parameters` leaves these out.

    Torch's dict itself: to set an entry that torch's `__setattr__` would refuse.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name, those that are None too; torch's dict itself."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children by name, None and repeated ones too; torch's dict itself."""
    return module._modules


def without_compiled_code() -> AbstractContextManager[object]:
    """Inside, compiled models run as they were written, so that hooks are called.

    `torch.compiler.set_stance`, where the compiler is loaded: loading it takes seconds, and without it there is nothing
    compiled.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# What a module calls around its forward. There is no public way to see whether there are any.
HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def any_global_hook() -> bool:
    """Whether hooks for all modules are registered (`register_module_forward_hook` and its kind).

    There is no public question. Without it, they would see fused calls instead of those that the model makes.
    """
    return bool(nn.modules.module._has_any_global_hook())


def called_by(package: str, depth: int) -> bool:
    """Whether the function `depth` calls up is a package's own: without frames, nothing tells it from users' code."""
    return str(sys._getframe(depth + 1).f_globals.get("__name__", "")).startswith(f"{package}.")
