"""Linear layers are told by what they call: of any class, with anything before, and nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm._torch import thread_modes
from batchnorm.surgery.linear import LinearLayer
from batchnorm.surgery.recognising import linear_layers
from support.networks import draw


def told(module: nn.Module, *inputs: Any) -> LinearLayer | str | None:
    """What a module is taken for."""
    with linear_layers(module) as known:
        module(*inputs)
    return known[module]


class Convolution(nn.Conv2d):
    """A convolution of 2 channels to 4 with a forward of its own."""

    def __init__(self, forward: Any, inside: nn.Module | None = None, **options: Any) -> None:
        super().__init__(2, 4, 3, **options)
        self.code, self.inside = forward, inside

    def forward(self, *inputs: Any) -> Any:
        return self.code(self, *inputs)


def convolve(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, m.bias)


IMAGES = (2, 2, 5, 5)
# As timm and EfficientNet-lite pad: by the size of the input, or with a module of their own.
ACCEPTED: dict[str, Any] = {
    "by position": convolve,
    "by keyword": lambda m, x: F.conv2d(input=x, weight=m.weight, bias=m.bias),
    "padded first": lambda m, x: convolve(m, F.pad(x, (0, x.shape[-1] % 2, 1, 1))),
    "as torch's own": lambda m, x: m._conv_forward(x, m.weight, m.bias),
    "another operation first": lambda m, x: convolve(m, torch.tanh(x)),
    "the result looked at": lambda m, x: (y := convolve(m, x)) if x.dim() == 4 else y.size(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_a_convolution(name: str, bias: bool) -> None:
    module = Convolution(ACCEPTED[name], bias=bias)
    found = told(module, torch.randn(IMAGES))
    assert isinstance(found, LinearLayer), found
    assert found.parameters() == (module.weight, module.bias)
    assert (found.transposed, found.groups) == (False, 1)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = convolve(m, x)
    y += 1
    return y


def at_a_place(m: Any, x: Tensor) -> Tensor:
    y = convolve(m, x)
    y[:, 0] = 0
    return y


REFUSED: dict[str, tuple[Any, str | None]] = {
    "nothing linear": (lambda m, x: x, None),
    "standardized": (
        lambda m, x: F.conv2d(x, (m.weight - m.weight.mean()) / m.weight.std(), m.bias),
        "computes the weight or bias that it uses",
    ),
    "a scaled bias": (lambda m, x: F.conv2d(x, m.weight, 2 * m.bias), "computes the weight or bias that it uses"),
    "twice": (lambda m, x: F.conv2d(convolve(m, x), m.weight.transpose(0, 1)), "calls 2 linear functions"),
    "an activation behind": (
        lambda m, x: torch.relu(convolve(m, x)),
        "does more with what its linear function gives",
    ),
    "written over": (in_place, "does more with what its linear function gives"),
    "written into": (at_a_place, "does more with what its linear function gives"),
    "activated in place": (lambda m, x: convolve(m, x).relu_(), "does more with what its linear function gives"),
    "in a tuple": (lambda m, x: (convolve(m, x),), "does more with what its linear function gives"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none(name: str) -> None:
    forward, reason = REFUSED[name]
    assert told(Convolution(forward), torch.randn(IMAGES)) == reason


class Own(nn.Module):
    """Parameters under names of their own."""

    def __init__(self, *shape: int, **more: nn.Module) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[0]))
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel, self.offset)


def test_names_are_the_modules() -> None:
    found = told(Own(3, 2), torch.randn(5, 2))
    assert isinstance(found, LinearLayer)
    assert (found.weight, found.bias) == ("kernel", "offset")


def test_modules_without_a_place_for_a_bias_or_with_batch_norm_inside() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    assert told(Bare(), torch.randn(5, 2)) == "has no place for a bias"
    assert told(Own(3, 2, norm=nn.BatchNorm1d(2)), torch.randn(5, 2)) == "has batch norm inside"


def test_a_vector_gives_no_channels() -> None:
    module = nn.Linear(2, 1, bias=False)
    module.weight = nn.Parameter(torch.randn(2))
    assert told(module, torch.randn(5, 2)) == "gives no channels"


def test_who_calls_another_module_is_not_what_that_one_is() -> None:
    inner = nn.Conv2d(2, 4, 1)
    outer = nn.Sequential(inner)
    with linear_layers(outer) as known:
        outer(torch.randn(IMAGES))
    assert isinstance(known[inner], LinearLayer)
    assert known[outer] is None


def test_a_module_that_computes_two_things() -> None:
    module = Convolution(lambda m, x: x if x.shape[-1] == 1 else convolve(m, x))
    with linear_layers(module) as known:
        module(torch.randn(IMAGES)), module(torch.randn(2, 2, 1, 1))
    assert known[module] == "its calls compute different things"


@pytest.mark.parametrize("transposed", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions(transposed: Any) -> None:
    module = transposed(4, 6, 3, groups=2)
    found = told(module, torch.randn(2, 4, *[5] * (module.weight.dim() - 2)))
    assert isinstance(found, LinearLayer)
    assert (found.transposed, found.groups) == (True, 2)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(2, 3, 3), IMAGES, None),
        (nn.Conv2d(2, 3, 3, padding="valid"), IMAGES, None),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGES, None),
        (nn.Conv2d(2, 3, 1, padding="same"), IMAGES, None),
        (nn.Linear(2, 3), (5, 2), None),
        (Convolution(convolve), IMAGES, None),
        (nn.Conv2d(2, 3, 3, padding=1), IMAGES, "pads with zeros"),
        (nn.Conv2d(2, 3, 3, padding="same"), IMAGES, "pads with zeros"),
        (nn.Conv1d(2, 3, 3, padding=(2,)), (2, 2, 5), "pads with zeros"),
        (nn.ConvTranspose2d(2, 3, 3), IMAGES, "transposed convolution"),
        (Convolution(ACCEPTED["padded first"]), IMAGES, "does something with its input before"),
        (Convolution(lambda m, x: convolve(m, x.mul_(2))), IMAGES, "does something with its input before"),
        (
            Convolution(lambda m, x: convolve(m, m.inside(x)), nn.ReLU(inplace=True)),
            IMAGES,
            "does something with its input before",
        ),
        (Convolution(lambda m, x: convolve(m, torch.ones_like(x))), IMAGES, "does something with its input before"),
        (Convolution(lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1)), IMAGES, "pads with zeros"),
    ],
    ids=str,
)
def test_where_a_shift_before_is_no_constant_behind(layer: Any, shape: tuple[int, ...], reason: str | None) -> None:
    found = told(layer.double(), draw(*shape))
    assert isinstance(found, LinearLayer), found
    assert reason is None if found.why_not_before is None else reason in found.why_not_before


def test_nothing_stays_behind() -> None:
    module, before = nn.Conv2d(2, 4, 3), thread_modes()
    with pytest.raises(RuntimeError, match="expected input"), linear_layers(module):
        module(torch.randn(1, 3, 5, 5))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert thread_modes() == before
