"""Architectures with batch norm from torchvision, timm and transformers, with random weights and small inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from libraries import installed, library

Norm = nn.modules.batchnorm._BatchNorm
Entry = tuple[nn.Module, dict[str, Any]]
LARGEST = 1.5e8  # parameters: several copies in float64 have to fit into memory
# Sizes of images that are not 64: some heads and poolings need more.
TORCHVISION_SIZES = {
    "inception_v3": 299,
    "googlenet": 96,
    "s3d": 224,
    "maxvit": 224,
    "densenet": 64,
    "fcn": 64,
    "vgg": 64,
}
TIMM = """
resnet26d resnet26t seresnext26ts ecaresnet26t skresnet18 resnest14d res2net50_14w_8s resnetv2_50 resnetblur18
legacy_seresnet18 regnetz_b16 gernet_s efficientnet_lite0 tf_efficientnet_b0 tf_mobilenetv3_small_075
mobilenetv4_conv_small mobilenetv2_050 ghostnet_050 ghostnetv2_100 hrnet_w18_small dla34 dla46_c dpn48b
ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53 rexnet_100 repvgg_a0 mobileone_s0 levit_128s lcnet_050
tinynet_e semnasnet_075 fbnetc_100 spnasnet_100 selecsls42 hardcorenas_a mixnet_s inception_v4 xception41
xception71 legacy_xception mobilevit_xxs mobilevitv2_050 efficientvit_b0 efficientvit_m0 fastvit_t8
repvit_m0_9 efficientformer_l1 starnet_s1 visformer_tiny crossvit_9_240 repghostnet_050 edgenext_xx_small
"""
TIMM_SIZES = {"inception_v4": 128, "xception": 128, "crossvit_9_240": 240, "levit": 224}
# Sizes that the network's own positions fix.
TIMM_SIZES |= {"efficientvit_m0": 224, "efficientformer": 224, "visformer": 224, "repvit": 96, "fastvit": 96}


def images(size: int, *, batch: int = 3, channels: int = 3) -> Tensor:
    """A batch from a fixed seed."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def _size(name: str, sizes: dict[str, int]) -> int:
    return next((size for prefix, size in sizes.items() if name.startswith(prefix)), 64)


def _torchvision(name: str) -> Entry:
    models = library("torchvision.models")
    options: dict[str, Any] = {"weights": None}
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # seconds of drawing normal numbers
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    model = models.get_model(name, **options)
    if name in models.list_models(module=models.video):
        # As few and as small frames as the network takes: convolutions of three dimensions are slow in float64.
        shape = (1, 3, 16, 224, 224) if name == "s3d" else (2, 3, 4, 32, 32)
        return model, {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    inputs = images(_size(name, TORCHVISION_SIZES), batch=2 if name == "inception_v3" else 3)
    return model, {next(iter(_arguments(model))): inputs}


def _arguments(model: nn.Module) -> tuple[str, ...]:
    return type(model).forward.__code__.co_varnames[1:]


def _timm(name: str) -> Entry:
    model = library("timm").create_model(name, pretrained=False)
    return model, {"x": images(_size(name, TIMM_SIZES), batch=2 if _size(name, TIMM_SIZES) > 128 else 3)}


TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ResNet": ("ResNetForImageClassification", "ResNetConfig", {"depths": [1, 1, 1, 1]}),
    "ResNet, basic": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"depths": [1, 2], "hidden_sizes": [16, 32], "embedding_size": 16, "layer_type": "basic"},
    ),
    "RegNet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"depths": [1, 1, 1, 1], "groups_width": 16, "hidden_sizes": [32, 64, 64, 96]},
    ),
    "MobileNetV1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}),
    "MobileNetV2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35}),
    "MobileNetV2, segmentation": (
        "MobileNetV2ForSemanticSegmentation",
        "MobileNetV2Config",
        {"depth_multiplier": 0.35},
    ),
    "EfficientNet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    ),
    "MobileViT": ("MobileViTForImageClassification", "MobileViTConfig", {"hidden_sizes": [16, 24, 32]}),
    "MobileViTV2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier": 0.5}),
    "MobileViT, segmentation": ("MobileViTForSemanticSegmentation", "MobileViTConfig", {"hidden_sizes": [16, 24, 32]}),
    "LeViT": ("LevitForImageClassification", "LevitConfig", {"image_size": 64}),
    "CvT": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    ),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    ),
    "HGNetV2": ("HGNetV2ForImageClassification", "HGNetV2Config", {}),
    "TextNet": ("TextNetForImageClassification", "TextNetConfig", {}),
}


def _transformers(name: str) -> Entry:
    transformers = library("transformers")
    model, config, options = TRANSFORMERS[name]
    # Errors of half precision are measured on the outputs: two, their usual number, would be chance.
    made = getattr(transformers, model)(getattr(transformers, config)(num_labels=100, **options))
    return made, {"pixel_values": images(64)}


def architectures() -> Iterator[tuple[str, str, Callable[[], Entry]]]:
    """Library, name, and what makes the model and its inputs; of the libraries that are installed."""
    if installed("torchvision"):
        models = library("torchvision.models")
        for module in (models, models.segmentation, models.video):
            for name in models.list_models(module=module):
                yield "torchvision", name, partial(_torchvision, name)
    for source, build, names in (("timm", _timm, TIMM.split()), ("transformers", _transformers, TRANSFORMERS)):
        if installed(source):
            for name in names:
                yield source, name, partial(build, name)


def used(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> nn.Module:
    """The model with statistics and parameters that are not the initial ones, which hide errors."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    with torch.no_grad():
        for norm in norms:
            if norm.weight is not None:
                norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
                norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=generator))
        for _ in range(2):
            model.train()(**inputs)
    return model
