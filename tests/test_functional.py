"""`functional.batch_norm` against torch's, on torch's own samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.common_methods_invocations import op_db

from batchnorm import errors, functional
from batchnorm.activations import ACTIVATIONS
from batchnorm.errors import DTypeError, OptionError, ShapeError, TransformError
from batchnorm.functional import batch_norm
from support import oracle, tolerances
from support.comparison import close
from support.samples import LAYOUTS, NATIVE, Sample

OPINFOS = [
    info for info in op_db if "batch_norm" in info.name and "native" not in info.name and "update" not in info.name
]
NATIVE_OPINFOS = [info for info in op_db if "batch_norm" in info.name and info not in OPINFOS]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def results(
    function: Callable[..., Tensor], x: Tensor, args: Any, kwargs: Any, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Output, running statistics after, and all gradients, from copies of the arguments; computed in `dtype`."""
    inputs = [
        None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad)
        for t in (x, *args)
    ]
    y = function(*inputs, **kwargs)
    dy = torch.linspace(-1, 1, y.numel(), dtype=x.dtype).view(y.shape).to(y.dtype)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(y, wanted, dy) if y.requires_grad else []
    return [y, *inputs[1:3], *gradients]


def torchs_results(x: Tensor, args: Any, kwargs: Any) -> list[Tensor | None]:
    """In half precision torch rounds between its steps, in some versions by more than the bounds: its float64 then."""
    exact = results(F.batch_norm, x, args, kwargs, dtype=x.dtype if x.dtype.itemsize > 2 else torch.float64)
    return [None if t is None else t.to(x.dtype) for t in exact]


def test_torch_still_has_the_entries() -> None:
    assert [(i.name, i.variant_test_name) for i in OPINFOS] == [
        ("nn.functional.batch_norm", ""),
        ("nn.functional.batch_norm", "without_cudnn"),
    ]
    assert {i.name for i in NATIVE_OPINFOS} == {
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("info", OPINFOS, ids=lambda i: i.formatted_name)
def test_every_opinfo_sample(info: Any, dtype: torch.dtype) -> None:
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 10
    for sample in samples:
        expected = torchs_results(sample.input, sample.args, sample.kwargs)
        actual = results(batch_norm, sample.input, sample.args, sample.kwargs)
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            close(a, e)
    assert info.error_inputs_func is None, "torch has error inputs now: run ours against them"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("info", NATIVE_OPINFOS, ids=lambda i: i.formatted_name)
def test_every_native_opinfo_sample(info: Any, dtype: torch.dtype) -> None:
    """The lower-level entries: other orders of arguments, the same samples of values."""
    samples = list(info.sample_inputs("cpu", dtype))
    assert len(samples) >= 8
    for sample in samples:
        weight, bias, *rest = sample.args
        *mode, momentum, eps = (a for a in rest if not isinstance(a, Tensor) and a is not None)
        mean, var = [a for a in rest if isinstance(a, Tensor)] or (None, None)
        # _batch_norm_with_update always trains, and the overloads without running statistics always use the batch's.
        training = mode[0] if mode and mean is not None else True
        args, kwargs = (mean, var, weight, bias), {"training": training, "momentum": momentum, "eps": eps}
        for a, e in zip(
            results(batch_norm, sample.input, args, kwargs),
            torchs_results(sample.input, args, kwargs),
            strict=True,
        ):
            close(a, e)


@pytest.mark.parametrize("sample", NATIVE, ids=lambda s: s.name)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_oracles(sample: Sample, training: bool) -> None:
    t = sample.tensors()
    o = sample.oracle_inputs(t)
    options = {"eps": 1e-5, "channel_dim": sample.layout.channel_dim, "activation": sample.activation}
    arrays = (o["weight"], o["bias"], o["residual"], 1e-5, sample.layout.channel_dim, sample.activation)
    n, mean, m2 = oracle.moments(o["x"], sample.layout.channel_dim)
    running_mean, running_var = torch.from_numpy(mean).float(), torch.from_numpy(m2 / n).float()
    if not training:
        mean, m2 = running_mean.double().numpy(), running_var.double().numpy() * n
    z = oracle.preactivation(o["x"], mean, m2 / n, *arrays[:4], sample.layout.channel_dim)
    kinks = (-3, 0, 3) if sample.activation else ()
    clear = torch.ones(z.shape, dtype=torch.bool)
    for kink in kinks:  # near one, the side of z is a matter of rounding
        clear &= torch.from_numpy(abs(z - kink) > 8 * tolerances.OUTPUT)
    dy = t["dy"] * clear

    leaves = {
        key: t[key].detach().requires_grad_() for key in ("x", "weight", "bias", "residual") if t[key] is not None
    }
    y = batch_norm(
        leaves["x"],
        running_mean,
        running_var,
        leaves.get("weight"),
        leaves.get("bias"),
        training,
        residual=leaves.get("residual"),
        **options,
    )
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    dx, dz, dweight, dbias = oracle.backward(dy.double().numpy(), o["x"], mean, m2 / n, *arrays, constants=not training)
    expected = {"x": dx, "weight": dweight, "bias": dbias, "residual": dz}
    for key, gradient in gradients.items():
        scale = 1 + abs(expected[key]) if key in ("x", "residual") else n**0.5
        bound = tolerances.GRADIENT * scale + tolerances.GRADIENT_ZERO
        close(gradient, expected[key], relative=tolerances.ONE_ROUNDING[gradient.dtype][0], absolute=bound, name=key)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_lies_in_memory_as_torchs_does(layout: Any, dtype: torch.dtype) -> None:
    x = layout.arrange(torch.randn(layout.shape, dtype=dtype)).detach().requires_grad_()
    y = batch_norm(x, None, None, training=True, channel_dim=layout.channel_dim, activation="relu")
    expected = F.batch_norm(x, None, None, training=True)
    strides = (
        [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (y, expected)
    )
    assert next(strides) == next(strides)


def test_a_gradient_in_another_memory_order() -> None:
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    dy = torch.randn(3, 4, 5, 6)
    expected = torch.autograd.grad(F.relu(F.batch_norm(x, None, None, training=True)), x, dy)
    for gradient in (dy, dy.contiguous(memory_format=torch.channels_last), dy[:1].expand_as(dy)):
        actual = torch.autograd.grad(batch_norm(x, None, None, training=True, activation="relu"), x, gradient)
        if gradient.stride(0):
            close(actual[0], expected[0])
        else:
            expanded = torch.autograd.grad(F.relu(F.batch_norm(x, None, None, training=True)), x, gradient.clone())
            close(actual[0], expanded[0])


# --- modes, dtypes, bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("residual", [True, False])
def test_activations_and_residual_are_torchs(activation: str, residual: bool) -> None:
    x, r = torch.randn(6, 5, 7, 7), torch.randn(6, 5, 7, 7)
    z = F.batch_norm(x, None, None, training=True) + (r if residual else 0)
    y = batch_norm(x, None, None, training=True, activation=activation, residual=r if residual else None)
    close(y, getattr(F, activation)(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, "same"])
def test_half_inputs(dtype: torch.dtype, parameters: torch.dtype | str) -> None:
    own = dtype if parameters == "same" else torch.float32
    x, weight, bias = torch.randn(9, 4, 5).to(dtype), torch.rand(4).to(own), torch.randn(4).to(own)
    mean, var = torch.zeros(4, dtype=own), torch.ones(4, dtype=own)
    wide = [t.float() for t in (mean, var)]
    y = batch_norm(x, mean, var, weight, bias, True)
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    close(y, exact.to(dtype), relative=tolerances.ONE_ROUNDING[dtype][0])
    F.batch_norm(x.float(), *wide, training=True)
    for a, e in zip((mean, var), wide, strict=True):
        close(a, e.to(own))


def test_empty_input_zero_gradients_no_update() -> None:
    mean, var = torch.full((3,), 7.0), torch.full((3,), 8.0)
    leaves = [torch.zeros(0, 3, 2), torch.ones(3), torch.ones(3), torch.zeros(0, 3, 2)]
    x, weight, bias, residual = (leaf.requires_grad_() for leaf in leaves)
    for training in (True, False):
        y = batch_norm(x, mean, var, weight, bias, training, residual=residual, activation="relu")
        assert y.shape == (0, 3, 2)
        for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))
    assert mean.tolist() == [7] * 3
    assert var.tolist() == [8] * 3


BAD: dict[str, tuple[Callable[[Tensor], dict[str, Any]], type[errors.BatchNormError], str]] = {
    "rank": (lambda x: {"input": x[0, 0]}, errors.ShapeError, "rank 1"),
    "channels": (lambda x: {"input": x.mT}, errors.ShapeError, r"running_mean of shape \(3,\)"),
    "weight": (lambda _: {"weight": torch.ones(2)}, errors.ShapeError, r"weight of shape \(2,\)"),
    "bias": (lambda _: {"bias": torch.ones(3, 1)}, errors.ShapeError, r"bias of shape \(3, 1\)"),
    "integer": (lambda x: {"input": x.int()}, errors.DTypeError, r"dtype torch.int32.*x.float\(\)"),
    "complex": (lambda x: {"input": x.cfloat()}, errors.DTypeError, "complex64"),
    "residual shape": (lambda x: {"residual": x[:1]}, errors.ShapeError, "residual of shape"),
    "residual dtype": (lambda x: {"residual": x.double()}, errors.DTypeError, "float64.*float32"),
    "activation": (lambda _: {"activation": "softmax"}, errors.OptionError, "'softmax'.*\"relu\""),
    "channel_dim": (lambda _: {"channel_dim": 3}, errors.ShapeError, "channel_dim=3"),
    "eps": (lambda _: {"eps": -1.0}, errors.OptionError, "eps=-1.0"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, training: bool) -> None:
    change, error, message = BAD[case]
    x, mean, var = torch.randn(2, 3, 4), torch.full((3,), 7.0), torch.full((3,), 8.0)
    call: dict[str, Any] = {"input": x, "running_mean": mean, "running_var": var, "training": training}
    with pytest.raises(error, match=message):
        batch_norm(**(call | change(x)))
    assert mean.tolist() == [7] * 3
    assert var.tolist() == [8] * 3


def test_one_value_for_each_channel() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(errors.CountError, match=r"more than 1 value per channel when training.*drop_last"):
            batch_norm(torch.randn(shape), mean, var, training=True)
        assert batch_norm(torch.randn(shape), mean, var).shape == shape
    assert mean.tolist() == [0] * 3


def test_inference_needs_statistics_and_training_a_positive_eps() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(errors.ShapeError, match="no running statistics"):
        batch_norm(x, None, None)
    with pytest.raises(errors.OptionError, match="eps=0"):
        batch_norm(x, None, None, training=True, eps=0.0)
    close(batch_norm(x, torch.zeros(3), torch.ones(3), eps=0.0), x)


def statistics_that_learn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(3).double(), torch.rand(3).double() + 0.5


@pytest.mark.parametrize("learns", ["mean", "var", "both", "neither"])
def test_statistics_that_require_a_gradient_get_it(learns: str) -> None:
    x, mean, var = statistics_that_learn()
    dy = torch.randn_like(x)

    def gradients(normalize: Any) -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_(), mean.clone(), var.clone()]
        for leaf, name in zip(leaves[1:], ("mean", "var"), strict=True):
            leaf.requires_grad_(learns in (name, "both"))
        normalize(*leaves).backward(dy)
        return [leaf.grad for leaf in leaves]

    def formula(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return ((x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()).relu()

    ours = gradients(lambda *leaves: functional.batch_norm(*leaves, activation="relu"))
    for actual, expected in zip(ours, gradients(formula), strict=True):
        close(actual, expected)


def test_statistics_computed_from_another_tensor_carry_its_gradient() -> None:
    v = statistics_that_learn()[0].requires_grad_()
    y = functional.batch_norm(v, 0.5 * v.mean((0, 2)), v.var((0, 2)))
    expected = (v - 0.5 * v.mean((0, 2), keepdim=True)) / (v.var((0, 2), keepdim=True) + 1e-5).sqrt()
    dy = torch.randn_like(v)
    close(torch.autograd.grad(y, v, dy)[0], torch.autograd.grad(expected, v, dy)[0])


def test_statistics_with_a_tangent_pass_it_on() -> None:
    x, mean, var = statistics_that_learn()
    tangent = torch.randn_like(mean)
    y, dy = torch.func.jvp(lambda mean: functional.batch_norm(x, mean, var), (mean,), (tangent,))
    close(dy, (-tangent / (var + 1e-5).sqrt())[:, None].expand(6, 3, 4))
    close(y, functional.batch_norm(x, mean, var))
    with forward_ad.dual_level(), pytest.raises(TransformError, match="with a tangent in training"):
        functional.batch_norm(x, forward_ad.make_dual(mean, tangent), var, training=True)


def test_statistics_that_require_a_gradient_do_not_move() -> None:
    x, mean, var = statistics_that_learn()
    before = mean.clone()
    with pytest.raises(OptionError, match="running_var with requires_grad=True in training"):
        functional.batch_norm(x, mean, var.requires_grad_(), training=True)
    assert torch.equal(mean, before)


@pytest.mark.parametrize("training", [True, False])
def test_one_statistic_alone_is_refused(training: bool) -> None:
    x, mean, var = statistics_that_learn()
    with pytest.raises(ShapeError, match="both"):
        functional.batch_norm(x, mean, None, training=training)
    with pytest.raises(ShapeError, match="both"):
        functional.batch_norm(x, None, var, training=training)


WRONG_STATISTICS = {
    "size": (lambda var: var[:2], "shape"),
    "rank": (lambda var: var[None], "shape"),
    "integers": (lambda var: var.long(), "floating dtype"),
    "complex": (lambda var: var.cfloat(), "floating dtype"),
    "meta": (lambda var: var.to("meta"), "got running_.* on device meta for an input on device cpu"),
}


@pytest.mark.parametrize("wrong", WRONG_STATISTICS)
@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_written_before_everything_is_checked(wrong: str, first: bool) -> None:
    x, mean, var = statistics_that_learn()
    change, message = WRONG_STATISTICS[wrong]
    before = mean.clone()
    statistics = (change(var), mean) if first else (mean, change(var))
    with pytest.raises((ShapeError, DTypeError, OptionError), match=message):
        functional.batch_norm(x, *statistics, training=True)
    assert torch.equal(mean, before)


@pytest.mark.parametrize("momentum", [float("nan"), float("inf")])
def test_a_momentum_or_eps_that_is_not_finite_is_refused(momentum: float) -> None:
    x, mean, var = statistics_that_learn()
    with pytest.raises(OptionError, match="momentum"):
        functional.batch_norm(x, mean, var, training=True, momentum=momentum)
    for training in (True, False):
        with pytest.raises(OptionError, match="eps"):
            functional.batch_norm(x, mean, var, training=training, eps=momentum)


@pytest.mark.parametrize("operand", ["weight", "bias", "residual", "mask"])
@pytest.mark.parametrize("training", [True, False])
def test_an_operand_elsewhere_is_named(operand: str, training: bool) -> None:
    x, mean, var = statistics_that_learn()
    shapes = {"weight": (3,), "bias": (3,), "residual": (6, 3, 4), "mask": (6,)}
    other = {operand: torch.ones(shapes[operand], dtype=x.dtype, device="meta")}
    before = mean.clone()
    if operand == "mask" and not training:  # it has no effect there
        assert functional.batch_norm(x, mean, var, **other).isfinite().all()
        return
    with pytest.raises(OptionError, match=f"got {operand} on device meta for an input on device cpu"):
        functional.batch_norm(x, mean, var, training=training, **other)
    assert torch.equal(mean, before)


def test_everything_on_meta_has_shapes_and_no_values() -> None:
    x, mean, var = (t.to("meta") for t in statistics_that_learn())
    mask = torch.ones(6, device="meta")
    for training in (True, False):
        y = functional.batch_norm(x, mean, var, training=training, mask=mask)
        assert y.is_meta
        assert y.shape == x.shape


def test_more_dimensions_than_kernels_have() -> None:
    x = torch.randn(2, 3, *[1] * 17, 5)
    for training in (True, False):
        y = functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=training)
        close(y, torch.nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=training))


def test_an_input_whose_values_share_memory_is_not_written_over() -> None:
    x = torch.randn(1, 3).expand(4, 3)
    with torch.no_grad(), pytest.raises(OptionError, match=r"inplace=True for an input of shape \(4, 3\)"):
        functional.batch_norm(x, torch.zeros(3), torch.ones(3), inplace=True)


def test_advice_on_complex_inputs_keeps_the_imaginary_part() -> None:
    with pytest.raises(DTypeError, match="view_as_real"):
        functional.batch_norm(torch.randn(4, 3, dtype=torch.cfloat), torch.zeros(3), torch.ones(3))
