"""The layers beside torch's: every ModuleInfo case, the same state, and nothing changed by an error."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import batchnorm as bn
from batchnorm import errors
from support import tolerances
from support.comparison import close
from support.samples import LAYOUTS, Layout
from support.torch_options import BIAS_FALSE

PAIRS = [(bn.BatchNorm1d, nn.BatchNorm1d), (bn.BatchNorm2d, nn.BatchNorm2d), (bn.BatchNorm3d, nn.BatchNorm3d)]
OURS = {theirs: ours for ours, theirs in PAIRS}
INFOS = [info for info in module_db if info.module_cls in OURS]
SHAPES = {bn.BatchNorm1d: (6, 4, 5), bn.BatchNorm2d: (6, 4, 5, 3), bn.BatchNorm3d: (6, 4, 2, 3, 2)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def same_state(ours: nn.Module, theirs: nn.Module, **bounds: float) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    for key, value in theirs.state_dict().items():
        close(ours.state_dict()[key], value.to(ours.state_dict()[key].dtype), name=key, **bounds)


def outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    dy = (torch.arange(y.numel()) % 17 / 8 - 1).to(y.dtype).view(y.shape)  # exact in every dtype
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


# --- torch's own cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
def test_every_module_info_sample(info: Any, training: bool, dtype: torch.dtype) -> None:
    cases = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert len(cases) >= 6 + len(BIAS_FALSE)
    for case in cases:
        constructor, call = case.constructor_input, case.forward_input
        ours = OURS[info.module_cls](*constructor.args, **constructor.kwargs).to(dtype).train(training)
        # In half precision torch rounds between its steps, by more than the bounds: there its float64 is the measure.
        exact = dtype if dtype.itemsize > 2 else torch.float64
        theirs = info.module_cls(*constructor.args, **constructor.kwargs).to(exact).train(training)
        untouched = copy.deepcopy(theirs)
        (x,) = call.args
        for _ in range(2):
            expected = outputs_and_gradients(theirs, x.to(exact))
            for a, e in zip(outputs_and_gradients(ours, x), expected, strict=True):
                close(a, e.to(dtype))
        same_state(ours, theirs if x.numel() else untouched)  # nothing comes of an empty batch


@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
def test_every_module_info_error(info: Any) -> None:
    cases = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True)
    assert len(cases) >= 2
    for case in cases:
        assert case.error_on == ModuleErrorEnum.FORWARD_ERROR
        constructor, call = case.module_error_input.constructor_input, case.module_error_input.forward_input
        layer = OURS[info.module_cls](*constructor.args, **constructor.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*call.args, **call.kwargs)


def test_torch_has_entries_for_all_three() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)


# --- drop-in ---------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"affine": False},
    *BIAS_FALSE,
    {"track_running_stats": False},
    {"eps": 1e-3, "momentum": 0.7},
    {"dtype": torch.float64},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours_class", "theirs_class"), PAIRS)
def test_a_few_steps_beside_torch(ours_class: Any, theirs_class: Any, options: dict[str, Any]) -> None:
    dtype = options.get("dtype", torch.float32)
    ours, theirs = ours_class(4, **options), theirs_class(4, **options)
    assert isinstance(ours, theirs_class)
    assert isinstance(ours, bn.BatchNorm)
    for step in range(3):
        x = torch.randn(SHAPES[ours_class], dtype=dtype) * (step + 1) + step
        for a, e in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
            close(a, e)
    same_state(ours, theirs)
    ours.eval(), theirs.eval()
    for a, e in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
        close(a, e)
    same_state(ours, theirs)


@pytest.mark.parametrize(("ours_class", "theirs_class"), PAIRS)
def test_state_goes_both_ways_and_from_before_the_counter(ours_class: Any, theirs_class: Any) -> None:
    ours, theirs = ours_class(4), theirs_class(4)
    theirs(torch.randn(SHAPES[ours_class]))
    ours.load_state_dict(theirs.state_dict())
    same_state(ours, theirs)
    theirs_class(4).load_state_dict(ours.state_dict())
    old = {key: value for key, value in theirs.state_dict().items() if key != "num_batches_tracked"}
    ours_class(4).load_state_dict(old)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: through_a_file(layer)]
)
def test_copies(copied: Any) -> None:
    layer = bn.BatchNorm2d(4, momentum=None, activation="silu", channel_dim=-1)
    layer(torch.randn(3, 5, 5, 4))
    other = copied(layer)
    assert repr(other) == repr(layer)
    x = torch.randn(3, 5, 5, 4)
    assert torch.equal(other(x), layer(x))
    same_state(other, layer)
    assert other.running_mean is not layer.running_mean


def through_a_file(layer: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def test_to_and_repr() -> None:
    layer = bn.BatchNorm2d(4, activation="relu")
    assert repr(layer) == repr(nn.BatchNorm2d(4))[:-1] + ", activation=relu)"
    assert repr(bn.BatchNorm3d(4)) == repr(nn.BatchNorm3d(4))
    assert layer.to(torch.float64).running_mean.dtype == torch.float64
    assert layer(torch.randn(2, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64
    assert bn.BatchNorm1d(4, device="meta").weight.is_meta
    layer.reset_parameters()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_half_input_with_float32_or_half_parameters(dtype: torch.dtype, whole: bool) -> None:
    ours, theirs = bn.BatchNorm2d(4), nn.BatchNorm2d(4)
    x = torch.randn(6, 4, 5, 3).to(dtype)
    if whole:
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    for _ in range(2):
        y, expected = ours(x), theirs(x)
        assert y.dtype == dtype
        close(y, expected)
    # torch keeps the running statistics of a whole layer in half precision, ours are float32.
    relative, absolute = tolerances.AGAINST_TORCH[dtype if whole else torch.float32]
    same_state(ours, theirs, relative=relative, absolute=absolute)


def test_autocast() -> None:
    net = nn.Sequential(nn.Linear(8, 6), bn.BatchNorm1d(6, activation="relu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(torch.randn(16, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert net[1].weight.grad.dtype == torch.float32


def test_checkpoints_of_torch_train_on() -> None:
    """One network of torch's and one of ours stay together through training."""
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    ours = nn.Sequential(
        nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation="relu"), nn.Identity(), *copy.deepcopy(theirs[3:])
    )
    ours.load_state_dict(theirs.state_dict())
    for _ in range(5):
        x, target = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
        for net in (ours, theirs):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), target).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
    same_state(ours, theirs)


# --- what torch does not have ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 2, 2), (2, 4, 2, 2, 2), (2, 4, 2, 1, 2, 3)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    close(bn.BatchNorm(4)(x), nn.functional.batch_norm(x, None, None, training=True))


def test_channels_last_dimension() -> None:
    x = torch.randn(6, 5, 4)
    ours, theirs = bn.BatchNorm1d(4, channel_dim=-1), nn.BatchNorm1d(4)
    close(ours(x), theirs(x.mT).mT)
    same_state(ours, theirs)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "hardswish", "elu"])
@pytest.mark.parametrize("training", [True, False])
def test_activation_and_residual(activation: str, training: bool) -> None:
    ours, theirs = bn.BatchNorm2d(4, activation=activation).train(training), nn.BatchNorm2d(4).train(training)
    x, residual = torch.randn(6, 4, 5, 3), torch.randn(6, 4, 5, 3)
    close(ours(x), getattr(nn.functional, activation)(theirs(x)))
    close(ours(x, residual=residual), getattr(nn.functional, activation)(theirs(x) + residual))
    same_state(ours, theirs)


# --- errors: ours, clear, and nothing changed ------------------------------------------------------------------------

X = torch.randn(2, 3, 4, 4)
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "channels": ({}, {"input": X[:, :2]}, errors.ShapeError, r"got 2 channels in dimension 1.*made for 3"),
    "rank": ({}, {"input": X[0]}, errors.ShapeError, r"expected 4D input \(got 3D input.*batchnorm.BatchNorm"),
    "integer": ({}, {"input": X.int()}, errors.DTypeError, "dtype torch.int32"),
    "one value": ({}, {"input": X[:1, :, :1, :1]}, errors.CountError, "more than 1 value per channel.*drop_last"),
    "eps": ({"eps": 0.0}, {"input": X}, errors.OptionError, "eps must be positive"),
    "residual": ({}, {"input": X, "residual": X[:1]}, errors.ShapeError, "residual of shape"),
    "residual dtype": ({}, {"input": X, "residual": X.double()}, errors.DTypeError, "residual of dtype"),
    "channel_dim": ({"channel_dim": 4}, {"input": X}, errors.ShapeError, "channel_dim=4"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_names_the_layer_and_changes_nothing(case: str) -> None:
    options, call, error, message = BAD[case]
    layer = bn.BatchNorm2d(3, **options)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=r"BatchNorm2d\(3\): .*" + message):
        layer(**call)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_torchs_types_catch_them() -> None:
    with pytest.raises(ValueError, match="4D"):
        bn.BatchNorm2d(3)(X[0])
    with pytest.raises(RuntimeError, match="channels"):
        bn.BatchNorm2d(4)(X)
    with pytest.raises(RuntimeError, match="int32"):
        bn.BatchNorm2d(3)(X.int())


def test_unknown_activation_when_made() -> None:
    with pytest.raises(errors.OptionError, match="got activation='softmax'; it must be one of \"relu\""):
        bn.BatchNorm1d(3, activation="softmax")


def test_one_value_is_fine_in_inference_but_not_without_statistics() -> None:
    x = torch.randn(1, 3)
    assert bn.BatchNorm1d(3).eval()(x).shape == (1, 3)
    with pytest.raises(errors.CountError):
        bn.BatchNorm1d(3, track_running_stats=False).eval()(x)


def test_empty_batch_leaves_everything() -> None:
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(4, 3))
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.zeros(0, 3)).shape == (0, 3)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_two_forwards_before_one_backward() -> None:
    torch.manual_seed(0)
    ours, theirs, x, z = bn.BatchNorm1d(3), nn.BatchNorm1d(3), torch.randn(4, 3), torch.randn(5, 3)
    for layer in (ours, theirs):
        (layer(x).pow(3).sum() + layer(z).pow(3).sum()).backward()
    close(ours.weight.grad, theirs.weight.grad)
    same_state(ours, theirs)


def test_a_training_pass_between_inference_and_its_backward() -> None:
    """The gradient belongs to the statistics that the forward pass used, though the layer has new ones by then."""
    layer, x = bn.BatchNorm1d(3, affine=False).eval(), torch.randn(5, 3, requires_grad=True)
    y = layer(x)
    layer.train()(torch.randn(9, 3) * 100)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.full((5, 3), (1 + layer.eps) ** -0.5))


def test_statistics_do_not_move_in_inference() -> None:
    layer = bn.BatchNorm1d(3).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(9, 3) + 5)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_tracking_can_be_switched_off_later() -> None:
    ours, theirs = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for layer in (ours, theirs):
        layer.track_running_stats = False
    x = torch.randn(9, 3) + 5
    for training in (True, False):
        close(ours.train(training)(x), theirs.train(training)(x))
    same_state(ours, theirs)


def test_parameters_learn_nothing_when_absent() -> None:
    layer = bn.BatchNorm1d(3, bias=False)
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    with torch.no_grad():
        layer.weight.fill_(2)
    layer.reset_parameters()
    assert layer.weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_in_one_graph(momentum: float | None) -> None:
    ours, theirs = bn.BatchNorm2d(4, momentum=momentum, activation="relu"), nn.BatchNorm2d(4, momentum=momentum)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        x = torch.randn(3, 4, 5, 5)
        close(compiled(x), theirs(x).relu())
    same_state(ours, theirs)


@pytest.mark.parametrize("mask_shape", [None, (), (1,), (5,)], ids=["no mask", "(N,)", "(N, 1)", "(N, L)"])
def test_compile_in_one_graph_for_any_size(mask_shape: tuple[int, ...] | None) -> None:
    torch.compiler.reset()
    layer = bn.BatchNorm1d(3, activation="relu")
    expected = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples in (6, 9):
        x = torch.randn(samples, 3, 5)
        mask = None if mask_shape is None else torch.rand(samples, *mask_shape) > 0.3
        close(compiled(x, mask=mask), expected(x, mask=mask))
    same_state(layer, expected)


def test_compile_in_one_graph_after_other_sizes() -> None:
    """The input's size is a symbol by then, and the mask's a number."""
    torch.compiler.reset()
    layer = bn.BatchNorm1d(3)
    expected = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for samples, masked in ((6, False), (9, False), (8, True)):
        x, mask = torch.randn(samples, 3), torch.arange(samples) % 3 > 0 if masked else None
        close(compiled(x, mask=mask), expected(x, mask=mask))
    same_state(layer, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_is_torchs_own_operators(strict: bool) -> None:
    layer = bn.BatchNorm2d(4, activation="relu").eval()
    x = torch.randn(3, 4, 5, 5)
    program = torch.export.export(layer, (x,), strict=strict)
    close(program.module()(x), layer(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.batch_norm.default", "aten.relu.default"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_inplace_overwrites_the_input_where_nobody_needs_it(layout: Layout) -> None:
    x = layout.arrange(torch.randn(layout.shape))
    options = {"activation": "silu", "channel_dim": layout.channel_dim}
    layer = bn.BatchNorm(layout.channels, inplace=True, **options).eval()
    expected = bn.BatchNorm(layout.channels, **options).eval()(x).detach()
    with torch.no_grad():
        given = x.clone()
        assert layer(given) is given
        assert torch.equal(given, expected)
    y = layer(x.clone().requires_grad_() * 1)
    assert torch.equal(y, expected)
    before = x.clone()
    with torch.no_grad():
        layer.train()(x)
    assert torch.equal(x, before)


def test_inplace_tells_a_graph_that_saved_the_input() -> None:
    leaf = torch.randn(4, 3, requires_grad=True)
    x = leaf * 2
    y = x.square()
    with torch.no_grad():
        bn.BatchNorm1d(3, inplace=True).eval()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
