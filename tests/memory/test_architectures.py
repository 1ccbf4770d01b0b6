"""`recompute` on architectures that others wrote: gradients are the same, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.memory import session
from batchnorm.models.nested import tensors
from support.tools import make_importable

TORCHVISION = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg11_bn",
    "vgg16_bn",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "googlenet",
    "inception_v3",
]
TIMM = [
    "resnet26d",
    "seresnext26ts",
    "res2net50_14w_8s",
    "resnetv2_50",
    "efficientnet_lite0",
    "mobilenetv4_conv_small",
    "hrnet_w18_small",
    "dla34",
    "cspresnet50",
    "darknet53",
    "rexnet_100",
    "repvgg_a0",
    "mobilevit_xxs",
    "levit_128s",
    "ghostnet_050",
    "xception41",
    "ese_vovnet19b_dw",
]


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    outputs = model(**inputs)
    loss = sum(t.float().square().mean() for t in tensors(outputs) if t.requires_grad)
    loss.backward()
    found = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.long
@pytest.mark.parametrize("form", ["converted", "fused"])
@pytest.mark.parametrize("name", [f"torchvision/{name}" for name in TORCHVISION] + [f"timm/{name}" for name in TIMM])
def test_an_architecture(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_importable()
    from surgery_networks import architectures

    monkeypatch.setattr(session, "_LEAST", 1)
    torch.manual_seed(0)
    (make,) = (make for library, known, make in architectures() if f"{library}/{known}" == name)
    model, inputs = make()
    model = (bn.convert if form == "converted" else bn.fuse)(model).train()
    plain = copy.deepcopy(model)
    expected = results(plain, inputs)
    handle = bn.recompute(model)
    found = results(model, inputs)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    if form == "fused":  # without, sums of outputs are kept
        assert handle.report.saved > 0.1 * (handle.report.saved + handle.report.kept), str(handle.report)
