"""Exported programs: their operators are layers again, which fold; and folded models export."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.exported import as_module
from batchnorm.surgery.fold import fold
from support.comparison import close
from support.networks import Block, Calls, draw, used

Norm = nn.modules.batchnorm._BatchNorm
F64, F32 = torch.float64, torch.float32
# torch's own, while it exports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx"),
]


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (x,))


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "block": (Block(3, projected=True), (2, 3, 6, 6)),
    "ours": (Block(3, lambda c: bn.BatchNorm2d(c, activation="silu")), (2, 3, 6, 6)),
    "1d": (nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4)), (2, 3, 6)),
    "3d": (nn.Sequential(nn.Conv3d(4, 4, 2, groups=2, stride=2), nn.BatchNorm3d(4)), (2, 4, 4, 4, 4)),
    "linear": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.1, affine=False)), (5, 3)),
    "transposed": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(6), nn.Flatten(2)
        ),
        (2, 4, 3, 3),
    ),
    "transposed 1d and 3d": (
        nn.Sequential(
            nn.ConvTranspose1d(3, 4, 2),
            nn.BatchNorm1d(4),
            nn.Unflatten(2, (2, 2, 2)),
            nn.ConvTranspose3d(4, 2, 2),
            nn.BatchNorm3d(2),
        ),
        (2, 3, 7),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_program_folds(name: str) -> None:
    model, shape = copy.deepcopy(MODELS[name])
    x = draw(*shape)
    program = exported(used(model).double(), x)
    folded = fold(program, x)
    assert not any(isinstance(module, Norm) for module in folded.modules())
    assert folded.report.left == {}
    assert [entry.layer for entry in folded.report] == [
        path for path, module in model.named_modules() if isinstance(module, Norm)
    ]
    assert all(what.startswith("part of ") for what in folded.report.done.values())
    close(folded(x), model(x))
    close(program.module()(x), model(x))


def test_layers_keep_their_paths_parameters_and_options() -> None:
    model, x = used(MODELS["transposed"][0]).double(), draw(2, 4, 3, 3)
    program = exported(model, x)
    module = as_module(program)
    assert torch.equal(module.get_submodule("0").weight, model[0].weight)
    assert [type(layer) for layer in module.children()][:2] == [nn.ConvTranspose2d, nn.BatchNorm2d]
    assert repr(module.get_submodule("0")) == repr(model[0])
    close(module(x), model(x))


def test_a_residual_of_ours_stays_one() -> None:
    model = Calls(lambda m, x: m.norm(m.conv(x), residual=x), conv=nn.Conv2d(3, 3, 1), norm=bn.BatchNorm2d(3))
    model, x = used(model).double(), draw(2, 3, 4, 4)
    folded = fold(exported(model, x), x)
    assert folded.report.done == {"norm": "part of conv"}
    close(folded(x), model(x))


def test_shared_layers_are_one_again() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model, x = used(nn.Sequential(block, block)).double(), draw(2, 3, 4, 4)
    folded = fold(exported(model, x), x)
    assert len(folded.report) == len(folded.report.done) == 1
    close(folded(x), model(x))


def test_statistics_of_the_batch_stay_an_operator() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).double(),
        draw(2, 3, 4, 4),
    )
    folded = fold(exported(model, x), x)
    assert len(folded.report) == 0
    close(folded(x), model.eval()(x))


def test_computed_weights_stay_an_operator() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(nn.functional.conv2d(x, self.conv.weight * 2))
            return y

    model, x = used(Computed()).double(), draw(2, 3, 4, 4)
    folded = fold(exported(model, x), x)
    assert folded.report.done["norm"].startswith("a scale and shift, because no linear layer")
    close(folded(x), model(x))


# --- from a folded model ---------------------------------------------------------------------------------------------


def small(dtype: torch.dtype) -> nn.Module:
    """Folded, alone, and alone with an activation and a residual."""
    tail = Calls(
        lambda m, x: m.b(torch.sigmoid(x), residual=m.a(torch.sigmoid(x))),
        a=bn.BatchNorm2d(4, activation="silu"),
        b=bn.BatchNorm2d(4, activation="relu"),
    )
    return used(nn.Sequential(Block(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), tail)).to(dtype)


def test_a_folded_model_exports() -> None:
    model, x = small(F64), draw(2, 3, 6, 6)
    program = exported(fold(model, x), x)
    close(program.module()(x), model(x))
    assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)


def test_a_folded_model_goes_to_onnx(tmp_path: Path) -> None:
    model, x = small(F32), draw(2, 3, 6, 6, dtype=F32)
    folded, file = fold(model, x), tmp_path / "folded.onnx"
    torch.onnx.export(folded, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (y,) = session.run(None, {name: x.numpy()})
    close(torch.from_numpy(y), model(x).detach())
