"""How results lie in memory, what shares memory with them, and memory that is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm.kernels import reference

EPS = 1e-5
native = torch.ops.batchnorm
BOTH = pytest.mark.parametrize("implementation", [reference, native], ids=["reference", "native"])


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


# Inputs of every layout that torch gives its results an order for.
INPUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: values(4, 3, 5, 6),
    "channels_last": lambda: values(4, 3, 5, 6).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: values(4, 3, 5, 6, 2).to(memory_format=torch.channels_last_3d),
    "permuted": lambda: values(4, 5, 6, 3).permute(0, 3, 2, 1),
    "as from channels_last": lambda: values(4, 5, 6, 3).permute(0, 3, 1, 2),
    "samples last": lambda: values(3, 5, 6, 4).permute(3, 0, 1, 2),
    "transposed": lambda: values(4, 6, 3).transpose(1, 2),
    "transposed (N, C)": lambda: values(3, 8).t(),
    "expanded": lambda: values(4, 3, 1, 6).expand(4, 3, 5, 6),
    "expanded channels": lambda: values(4, 1, 5, 6).expand(4, 3, 5, 6),
    "sliced": lambda: values(4, 3, 5, 12)[..., ::2],
    "sliced channels_last": lambda: values(4, 6, 5, 6).to(memory_format=torch.channels_last)[:, ::2],
    "half of channels_last": lambda: values(4, 3, 5, 12).to(memory_format=torch.channels_last)[..., :6],
    "one channel": lambda: values(4, 1, 5, 6).to(memory_format=torch.channels_last),
    "one pixel": lambda: values(4, 3, 1, 1),
    "one pixel, channels_last": lambda: values(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "one sample": lambda: values(1, 3, 5, 6).to(memory_format=torch.channels_last),
    "one column": lambda: values(4, 3, 5, 1).to(memory_format=torch.channels_last),
    "six dimensions": lambda: values(4, 3, 2, 2, 2, 2).movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted 5-D": lambda: values(4, 2, 5, 6, 3).permute(0, 4, 3, 2, 1),
}


def order(t: Tensor) -> list[tuple[int, int]]:
    """The strides that mean something: of a dimension of one value none does."""
    return [(dim, stride) for dim, stride in enumerate(t.stride()) if t.shape[dim] > 1]


@BOTH
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_results_lie_as_torchs(implementation: Any, name: str, with_residual: bool) -> None:
    x = INPUTS[name]()
    residual = torch.randn_like(x, memory_format=torch.contiguous_format) if with_residual else None
    expected = torch.nn.functional.batch_norm(x, None, None, None, None, True)
    affine = (None, None, residual, EPS, 1, "relu")
    y, count, mean, m2 = implementation.forward(x, *affine)
    again = implementation.normalize(x, mean, m2 / count, *affine)
    committed = implementation.forward_commit(
        x, *affine, None, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), *(None,) * 2, 0.1
    )[0]
    dx, *_, dresidual = implementation.backward(torch.ones_like(y), x, count, mean, m2, *affine)
    dx2, dresidual2 = implementation.backward_input(torch.ones_like(y), x, mean, m2 / count, *affine, None, None)
    results = [y, again, committed, dx, dx2, *((dresidual, dresidual2) if with_residual else ())]
    for result in results:
        assert order(result) == order(expected)
    target = expected.relu() if residual is None else (expected + residual).relu()
    for result in results[:3]:
        torch.testing.assert_close(result, target)


@pytest.mark.parametrize("name", INPUTS)
def test_the_kernels_strides_are_those_that_the_compiler_was_told(name: str) -> None:
    x = INPUTS[name]()
    c = x.shape[1]
    statistics = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
    weight = torch.ones(c)
    affine = (weight, weight, torch.randn(x.shape), EPS, 1, "relu")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.forward.default, (x, *affine), test_utils=checks)
    torch.library.opcheck(native.normalize.default, (x, *statistics, *affine), test_utils=checks)
    dy = torch.randn(x.shape)
    moments = (torch.tensor(x.numel() // c), *statistics)
    torch.library.opcheck(native.backward.default, (dy, x, *moments, *affine), test_utils=checks)
    torch.library.opcheck(native.backward_input.default, (dy, x, *statistics, *affine, None, None), test_utils=checks)


def test_the_output_of_a_permuted_input_can_be_viewed() -> None:
    x = values(4, 6, 3).transpose(1, 2)
    assert batchnorm.BatchNorm1d(3)(x).view(-1).shape == (72,)


@BOTH
@pytest.mark.parametrize("name", [name for name in INPUTS if "expanded" not in name])
def test_in_place_the_strides_stay(implementation: Any, name: str) -> None:
    x = INPUTS[name]()
    statistics = torch.full((x.shape[1],), 0.5, dtype=torch.float64), torch.full((x.shape[1],), 2.0).double()
    expected = implementation.normalize(x, *statistics, None, None, None, EPS, 1, "relu")
    strides, address = x.stride(), x.data_ptr()
    implementation.normalize_(x, *statistics, None, None, None, EPS, 1, "relu")
    assert (x.stride(), x.data_ptr()) == (strides, address)
    assert torch.equal(x, expected)


# --- in place ---------------------------------------------------------------------------------------------------------


def in_place(x: Tensor, residual: Tensor | None = None, **others: Tensor) -> None:
    c = x.shape[1]
    given = {
        "mean": torch.zeros(c, dtype=torch.float64),
        "var": torch.ones(c, dtype=torch.float64),
        "weight": None,
        "bias": None,
    } | others
    native.normalize_(x, *given.values(), residual, 0.0, 1, None)


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 3, 37), (2, 3, 64), (5, 3), (40, 37), (3, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_residual_that_is_the_input(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    x = values(*shape).to(dtype)
    expected = x + x
    in_place(x, x)
    assert torch.equal(x, expected)
    in_place(x, x.detach())
    assert torch.equal(x, expected + expected)


def test_in_place_nothing_may_share_a_part_of_the_inputs_memory() -> None:
    memory = values(64)
    x = memory[:48].view(16, 3)
    for name in ("mean", "var", "weight", "bias"):
        with pytest.raises(RuntimeError, match=f"got {name} float32 of shape .3,. that shares memory with x"):
            in_place(x, **{name: memory[46:49]})
    with pytest.raises(RuntimeError, match=r"got residual .* that shares memory with x"):
        in_place(x, memory[3:51].view(16, 3))
    square = values(3, 3)
    with pytest.raises(RuntimeError, match=r"got residual .* that shares memory with x"):
        in_place(square, square.t())


def test_in_place_what_lies_between_the_inputs_values_is_apart() -> None:
    memory = values(16, 8)
    before = memory.clone()
    in_place(memory[:, :3], memory[:, 3:6], weight=memory[0, 5:8])
    expected = before[:, :3] * before[0, 5:8] + before[:, 3:6]
    torch.testing.assert_close(memory[:, :3], expected)
    assert torch.equal(memory[:, 3:], before[:, 3:])


@pytest.mark.parametrize(
    "make", [lambda: values(1, 3).expand(4, 3), lambda: values(4, 1).expand(4, 3), lambda: values(9).unfold(0, 3, 1)]
)
def test_an_input_that_overlaps_itself_is_not_changed_in_place(make: Callable[[], Tensor]) -> None:
    x = make()
    before = x.clone()
    with pytest.raises(RuntimeError, match=r"got x .* share one place in memory.*clone"):
        in_place(x)
    assert torch.equal(x, before)


# --- memory that is gone ----------------------------------------------------------------------------------------------


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def cut(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


ARGUMENTS = ("x", "weight", "bias", "residual", "mask", "dy", "mean", "m2", "count", "running_mean", "running_var")


@pytest.mark.parametrize("how", [freed, cut])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_freed_memory_is_not_read(name: str, how: Callable[[Tensor], Tensor]) -> None:
    def tensors() -> dict[str, Tensor]:
        t = {key: values(8, 4) for key in ("x", "residual", "dy")}
        t |= {key: values(4) for key in ("weight", "bias", "running_mean", "running_var")}
        t |= {key: values(4).double() for key in ("mean", "m2")}
        t["mask"], t["count"] = torch.ones(8, dtype=torch.bool), torch.tensor(8)
        t[name] = how(t[name])
        return t

    calls: dict[str, tuple[str, ...]] = {
        "forward": ("x", "weight", "bias", "residual", "mask"),
        "backward": ("dy", "x", "count", "mean", "m2", "weight", "bias", "residual", "mask"),
        "normalize": ("x", "mean", "m2", "weight", "bias", "residual"),
        "normalize_": ("x", "mean", "m2", "weight", "bias", "residual"),
        "batch_moments": ("x", "mask"),
        "commit": ("running_mean", "running_var", "count", "mean", "m2"),
    }
    for operation, used in calls.items():
        if name not in used:
            continue
        t = tensors()
        options: dict[str, Any] = {"eps": EPS, "channel_dim": 1, "activation": "relu"}
        arguments = {("var" if operation.startswith("normalize") and key == "m2" else key): t[key] for key in used}
        if operation == "commit":
            arguments |= {"num_batches_tracked": None, "num_batches_skipped": None, "momentum": 0.1}  # type: ignore[dict-item]
        elif operation == "batch_moments":
            arguments |= {"channel_dim": 1}  # type: ignore[dict-item]
        else:
            arguments |= options
        with pytest.raises(RuntimeError, match=r"whose storage has .* bytes; it needs"):
            getattr(native, operation)(**arguments)


def test_a_layer_whose_weight_was_freed_says_so() -> None:
    layer = batchnorm.BatchNorm1d(3)
    freed(layer.weight.detach())
    with pytest.raises(RuntimeError, match="got weight float32 of shape"):
        layer(values(4, 3))


# --- what errors say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, v: native.batch_moments(x.int(), 1), "got x int32 of shape (4, 3); it must be floating"),
        (lambda x, v: native.batch_moments(x, 2), "got channel_dim=2 for x float32 of shape (4, 3); it must lie in"),
        (lambda x, v: native.batch_moments(v, 0), "got x float32 of shape (3,); it must have at least 2"),
        (lambda x, v: native.normalize(x, v[:2], v, None, None, None, EPS, 1, None), "got mean float32 of shape (2,)"),
        (lambda x, v: native.forward(x, v.int(), None, None, EPS, 1, None, None), "got weight int32 of shape (3,)"),
        (lambda x, v: native.forward(x, None, None, x.double(), EPS, 1, None, None), "got residual float64 of shape"),
        (lambda x, v: native.forward(x, None, None, None, EPS, 1, None, v.bool()), "got a mask, bool of shape (3,)"),
        (lambda x, v: native.forward(x, None, None, None, EPS, 1, "new", None), "got activation 'new'"),
        (
            lambda x, v: native.backward(x, x, torch.tensor(4.0), v, v, None, None, None, EPS, 1, None, None),
            "got count float32 of shape ()",
        ),
    ],
)
def test_errors_say_what_came_and_not_where_the_library_was_built(
    call: Callable[[Tensor, Tensor], object], said: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        call(values(4, 3), torch.ones(3))
    assert said in str(caught.value)
    assert ".hpp" not in str(caught.value)
    assert "API call" not in str(caught.value)


def test_memory_that_is_not_there_is_told() -> None:
    x = torch.empty(1, dtype=torch.float16).expand(2**24, 2**24)
    with pytest.raises(RuntimeError, match=r"no memory for a tensor of [\d.e+]+ MiB"):
        native.forward(x, None, None, None, EPS, 1, None)
