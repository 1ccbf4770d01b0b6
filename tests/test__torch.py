"""Every private name of torch that the package uses exists, and behaves as it relies on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from batchnorm import _torch


def test_the_base_of_batch_norm_layers() -> None:
    for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(cls, _torch.BatchNormBase)
    assert not issubclass(nn.InstanceNorm1d, _torch.BatchNormBase)


def test_transforms_are_noticed() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(_torch.in_functorch())
        return x.sum()

    x = torch.ones(2, 2)
    function(x)
    torch.func.vmap(function)(x)
    torch.func.grad(function)(x)
    with forward_ad.dual_level():
        function(x)
    function(x)
    assert seen == [False, True, True, True, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_in_a_backward_pass_is_noticed(reentrant: bool) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(_torch.in_backward_recompute())
        return x.square()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(function, x, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert seen == [False, True]
    assert _torch.current_backward() == -1


@pytest.mark.parametrize("strict", [False, True])
def test_only_an_export_is_one(strict: bool) -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if _torch.is_exported() else x + 2

    assert Asking()(torch.zeros(1)) == 2
    assert torch.compile(Asking(), backend="eager")(torch.zeros(1)) == 2
    program = torch.export.export(Asking(), (torch.zeros(1),), strict=strict)
    assert program.module()(torch.zeros(1)) == 1


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return 2 * dy, None


def test_plain_apply_is_apply() -> None:
    x = torch.ones(3, requires_grad=True)
    y = _torch.plain_apply(_Twice)(x, 2.0)
    y.sum().backward()
    assert y.tolist() == [2, 2, 2]
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_what_torch_takes_apart() -> None:
    node = _torch.registered_tree(dict)
    items, context = node.flatten_fn({"a": 1, "b": 2})
    assert items == [1, 2]
    assert node.unflatten_fn([3, 4], context) == {"a": 3, "b": 4}
    assert _torch.registered_tree(int) is None


def test_trees_go_on_inside_registered_classes() -> None:
    class Pair:
        def __init__(self, first: object, second: object) -> None:
            self.both = first, second

    _torch.register_tree(Pair, lambda pair: list(pair.both), lambda leaves: Pair(*leaves))
    node = _torch.registered_tree(Pair)
    items, context = node.flatten_fn(Pair(1, 2))
    assert items == [1, 2]
    assert node.unflatten_fn([3, 4], context).both == (3, 4)
    # And torch.func, which has trees of its own, sees them.
    doubled = torch.func.vmap(lambda pair: Pair(pair.both[0] * 2, pair.both[1]))(Pair(torch.ones(2), torch.zeros(2)))
    assert doubled.both[0].tolist() == [2, 2]


def test_modules_own_dicts() -> None:
    layer = nn.BatchNorm1d(2, affine=False)
    assert _torch.parameters_of(layer) == {"weight": None, "bias": None}
    assert list(_torch.buffers_of(layer)) == ["running_mean", "running_var", "num_batches_tracked"]
    both = nn.Sequential(layer, layer)
    assert list(_torch.children_of(both).values()) == [layer, layer]
    _torch.buffers_of(layer)["running_mean"] = torch.ones(2)
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [1, 1]


COMPILED = """
import sys, torch
from batchnorm import _torch

compiling = []

@_torch.outside_graphs
def function(x):
    compiling.append(torch.compiler.is_compiling())
    return x + 1

assert function(torch.ones(1)) == 2
with _torch.without_compiled_code():
    pass
assert "torch._dynamo" not in sys.modules

compiled = torch.compile(lambda x: function(x * 2) * 3, backend="eager")
assert compiled(torch.ones(1)) == 9
assert compiling == [False, False]

called = []
model = torch.compile(torch.nn.Linear(1, 1), backend="eager")
model(torch.ones(1, 1))
model._orig_mod.register_forward_hook(lambda *_: called.append(torch.compiler.is_compiling()))
with _torch.without_compiled_code():
    model(torch.ones(1, 1))
assert called == [False]
"""


def test_the_compiler_is_kept_out_and_is_not_imported_for_it() -> None:
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


def test_hooks_for_saved_tensors_are_seen() -> None:
    assert not _torch.saves_through_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert _torch.saves_through_hooks()
    assert not _torch.saves_through_hooks()


def test_thread_modes_change_inside_modes() -> None:
    before = _torch.thread_modes()
    with torch.device("meta"):
        inside_device = _torch.thread_modes()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        inside_hooks = _torch.thread_modes()
    with torch.utils._python_dispatch.TorchDispatchMode():
        inside_dispatch = _torch.thread_modes()
    assert _torch.thread_modes() == before
    assert before not in (inside_device, inside_hooks, inside_dispatch)


def test_hooks_are_in_the_modules_dicts() -> None:
    layer = nn.Linear(1, 1)
    assert not any(getattr(layer, name) for name in _torch.HOOK_DICTS)
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_full_backward_pre_hook(lambda *_: None)
    assert all(getattr(layer, name) for name in _torch.HOOK_DICTS)


def test_callers_are_known() -> None:
    seen = []

    class Asked:
        def __torch_function__(self, *_: Any) -> None:
            seen.append(_torch.called_by("torch", 1))

    def here() -> bool:
        return _torch.called_by("torch", 1)

    assert not here()
    hook = nn.Identity()
    hook.register_forward_hook(lambda *_: seen.append(_torch.called_by("torch", 1)))
    hook(torch.ones(1))
    assert seen == [True]


def test_hooks_of_all_modules_are_known() -> None:
    assert not _torch.any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert _torch.any_global_hook()
    handle.remove()
    assert not _torch.any_global_hook()


def test_changes_in_place_are_counted() -> None:
    x = torch.zeros(3)
    before = _torch.version(x)
    x + 1
    assert _torch.version(x) == before
    x.add_(1)
    assert _torch.version(x) > before


def test_the_base_of_a_view() -> None:
    t = torch.zeros(2, 3, requires_grad=True) * 1
    assert _torch.base(t) is None
    assert _torch.base(t.view(3, 2)[0]) is t
    assert _torch.base(t.clone()) is None


def test_what_a_node_has_kept() -> None:
    x = torch.arange(16.0, requires_grad=True).view(1, 1, 4, 4)
    node = nn.functional.max_pool2d(x, 2).grad_fn
    assert node is not None
    assert _torch.saved_by(node, "kernel_size") == (2, 2)
    assert _torch.saved_by(node, "result1").flatten().tolist() == [5, 7, 13, 15]
    assert _torch.saved_by(node, "nothing") is None
