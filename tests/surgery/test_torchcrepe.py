"""Surgery on a network that was trained by others: CREPE, which tells the pitch of a sound, with six layers."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.scale_shift import ScaleShift
from support import tolerances
from support.tools import FOLDER, make_importable

pytestmark = pytest.mark.long

PITCH_BINS = 360
RATE = 16_000  # samples a second
PITCHES = (110.0, 196.0, 261.6, 440.0, 523.3, 659.3, 880.0, 987.8)


def crepe(size: str) -> nn.Module:
    """The network without its package, which imports tools for audio; of the package it asks for one number."""
    make_importable()
    folder, package = FOLDER / "torchcrepe", ModuleType("torchcrepe")
    vars(package)["PITCH_BINS"] = PITCH_BINS
    spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchcrepe", package)
        patch.setitem(sys.modules, "crepe_model", module)
        spec.loader.exec_module(module)
        model: nn.Module = module.Crepe(size)
    model.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


def tones(seed: int = 0) -> Tensor:
    """A frame of 1,024 samples of each pitch: a tone with overtones and noise, normalised as the network expects."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(1024) / RATE
    phases = 2 * math.pi * torch.rand(5, generator=generator)
    sound = torch.stack(
        [sum(torch.sin(2 * math.pi * k * f * time + phases[k]) / k for k in range(1, 5)) for f in PITCHES]
    )
    sound = sound + 0.01 * torch.randn(sound.shape, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)


def heard(y: Tensor) -> list[float]:
    """The pitches that the network hears: the bins are 20 cents apart."""
    return [10 * 2 ** ((1997.3794 + 20 * float(index)) / 1200) for index in y.argmax(1)]


def check(model: nn.Module, original: nn.Module) -> None:
    """The network hears what it heard, and what it was sounded: no operation has taken its training away."""
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    x = tones()
    with torch.no_grad():
        y, expected = model(x), original(x)
    torch.testing.assert_close(y, expected, rtol=relative, atol=absolute)
    assert heard(y) == pytest.approx(PITCHES, rel=0.02)  # a third of a semitone


@pytest.fixture(params=["tiny", "full"])
def original(request: pytest.FixtureRequest) -> nn.Module:
    return crepe(request.param)


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_convert_and_revert(original: nn.Module) -> None:
    model = bn.convert(copy.deepcopy(original))
    assert sum(type(norm) is bn.BatchNorm2d for norm in norms(model)) == 6
    check(model, original)
    state = original.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in bn.revert(model).state_dict().items())
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(model))


def test_fuse_finds_nothing_and_changes_nothing(original: nn.Module) -> None:
    """Its activations come before batch norm, and pooling behind it; `embed` is an optional argument."""
    model = bn.fuse(copy.deepcopy(original))
    assert len(model.report) == 6
    assert set(model.report.left.values()) == {"after it, max_pool2d is not one of our activations"}
    check(model, original)
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    y, expected = (m(tones(), embed=True).detach() for m in (model, original))
    torch.testing.assert_close(y, expected, rtol=relative, atol=absolute * float(expected.abs().max()))


def test_fold_gives_six_scales_and_shifts_that_export(original: nn.Module) -> None:
    """Before each layer is a ReLU, and behind it pooling and a convolution of padded values: nothing linear."""
    folded = bn.fold(original, tones())
    assert str(folded.report).startswith("0 of 6 folded, 6 as a scale and shift, ")
    assert sum(isinstance(module, ScaleShift) for module in folded.modules()) == 6
    assert not norms(folded)
    check(folded, original)
    check(torch.export.export(folded, (tones(),)).module(), original)


def test_an_exported_program_folds_as_the_network_does(original: nn.Module) -> None:
    folded = bn.fold(torch.export.export(original, (tones(),)), tones())
    assert str(folded.report).startswith("0 of 6 folded, 6 as a scale and shift, ")
    check(folded, original)


def test_recalibrated_statistics_are_those_of_what_comes_in(original: nn.Module) -> None:
    model, batches = copy.deepcopy(original), [tones(seed) for seed in range(4)]
    result = bn.recalibrate(model, batches)
    assert len(norms(model)) == 6
    for norm in norms(model):
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
        with torch.no_grad():
            for batch in batches:
                model(batch)
        handle.remove()
        values = torch.cat(seen).transpose(0, 1).flatten(1)
        std = values.std(1, correction=0)
        # A channel that is silent, at 0 behind its ReLU, has no deviation to measure by.
        assert float(((norm.running_mean - values.mean(1)).abs() / std.clamp_min(1e-3)).max()) < tolerances.POPULATION
        ratio = (norm.running_var + norm.eps) / (std.square() + norm.eps)
        assert float(ratio.log().abs().max()) < tolerances.POPULATION
    assert (len(result.layers), result.skipped) == (6, ())
    # These few tones are not the music that it was trained with, and still it hears them.
    assert heard(model(batches[0])) == pytest.approx(PITCHES, rel=0.02)


def test_its_momentum_of_zero_keeps_the_statistics_in_training(original: nn.Module) -> None:
    """So it was brought over from Keras."""
    model = bn.convert(copy.deepcopy(original)).train()
    expected = copy.deepcopy(original).train()
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    torch.testing.assert_close(model(tones()), expected(tones()), rtol=relative, atol=absolute)
    state = original.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) or key.endswith("num_batches_tracked")
