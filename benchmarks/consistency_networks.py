"""Architectures with batch normalization, of torchvision and transformers, and digits to run them on.

Weights are random: nothing is downloaded. torchvision is built for one release of torch and would bring it along, so it
is installed by itself:

    pip install --no-deps torchvision
    pip install pillow "transformers>=5" scikit-learn
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libraries import library

CLASSES = 10
ZOOM = 1.25  # of an image before a part of it is cut out


@dataclass(frozen=True)
class Architecture:
    """One of them.

    Attributes:
        name: its name in its library.
        make: a network with new weights.
        data: from digits (N, 64) and a source of random numbers to what the network takes.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[Tensor, torch.Generator], Tensor]


def crops(digits: Tensor, generator: torch.Generator, *, size: int) -> Tensor:
    """(N, 3, size, size): each digit larger, and a random part of it."""
    whole = round(size * ZOOM)
    large = F.interpolate(digits.view(-1, 1, 8, 8), size=(whole, whole), mode="bilinear", antialias=True)
    corners = torch.randint(whole - size + 1, (len(digits), 2), generator=generator).tolist()
    cut = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(large, corners, strict=True)]
    return torch.stack(cut).expand(-1, 3, -1, -1).contiguous()


def clips(digits: Tensor, generator: torch.Generator, *, size: int, frames: int) -> Tensor:
    """(N, 3, frames, size, size): another part of the digit in each frame."""
    return torch.stack([crops(digits, generator, size=size) for _ in range(frames)], dim=2)


def waves(digits: Tensor, _: torch.Generator, *, length: int) -> Tensor:
    """(N, length): the pixels one after another, as a sound."""
    return F.interpolate(digits[:, None], size=length, mode="linear")[:, 0]


def series(digits: Tensor, _: torch.Generator, *, length: int) -> Tensor:
    """(N, length, 8): the rows of pixels as series in time."""
    return F.interpolate(digits.view(-1, 8, 8), size=length, mode="linear").transpose(1, 2).contiguous()


def of_torchvision(name: str, **options: object) -> nn.Module:
    """A network of its registry."""
    models = library("torchvision.models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about defaults of options
        network: nn.Module = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return network


def of_transformers(model: str, config: str, **options: object) -> nn.Module:
    """A network that a configuration describes."""
    transformers = library("transformers")
    network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(num_labels=CLASSES, **options))
    return network


def vision(name: str, data: Callable[[Tensor, torch.Generator], Tensor], **options: object) -> Architecture:
    """A row of torchvision's."""
    return Architecture(name, partial(of_torchvision, name, **options), data)


def hugging(
    name: str, model: str, config: str, data: Callable[[Tensor, torch.Generator], Tensor], **options: object
) -> Architecture:
    """A row of transformers'."""
    return Architecture(name, partial(of_transformers, model, config, **options), data)


SMALL, CLIP = partial(crops, size=32), partial(clips, size=32, frames=4)
ONE_OUTPUT: dict[str, object] = {"aux_logits": False, "init_weights": False}
NO_BACKBONE: dict[str, object] = {"weights_backbone": None}
PLAIN = (
    *("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "densenet121"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "mnasnet1_0"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_v2_s"),
    *("regnet_x_400mf", "regnet_x_1_6gf", "regnet_y_400mf", "regnet_y_800mf", "vgg11_bn"),
)
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        *(vision(name, SMALL) for name in PLAIN),
        vision("googlenet", SMALL, **ONE_OUTPUT),
        vision("inception_v3", partial(crops, size=75), **ONE_OUTPUT),
        *(vision(name, CLIP) for name in ("r3d_18", "mc3_18")),
        *(vision(f"{head}_mobilenet_v3_large", SMALL, **NO_BACKBONE) for head in ("deeplabv3", "lraspp")),
        hugging("MobileNetV1", "MobileNetV1ForImageClassification", "MobileNetV1Config", SMALL),
        hugging("LeViT", "LevitForImageClassification", "LevitConfig", partial(crops, size=64), image_size=64),
        hugging("MobileViT", "MobileViTForImageClassification", "MobileViTConfig", partial(crops, size=64)),
        hugging("CvT", "CvtForImageClassification", "CvtConfig", SMALL),
        hugging("HGNet-V2", "HGNetV2ForImageClassification", "HGNetV2Config", SMALL),
        hugging(
            "Wav2Vec2-Conformer",
            "Wav2Vec2ConformerForSequenceClassification",
            "Wav2Vec2ConformerConfig",
            partial(waves, length=3200),
            apply_spec_augment=False,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=192,
            conv_dim=(64,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=32,
        ),
        hugging(
            "PatchTST",
            "PatchTSTForClassification",
            "PatchTSTConfig",
            partial(series, length=64),
            num_input_channels=8,
            num_targets=CLASSES,
            context_length=64,
            patch_length=8,
            patch_stride=8,
        ),
    )
}
