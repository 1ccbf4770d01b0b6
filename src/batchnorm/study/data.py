"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8 pixels, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TEST_IMAGES = 360  # a fifth
_BRIGHTEST = 16.0


@dataclass(frozen=True)
class Part:
    """Some of the images.

    Attributes:
        indices: (N,) which they are in the whole data set.
        images: (N, 64) pixels in [0, 1], float32.
        labels: (N,) the digits 0 to 9.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """The data set, cut in two: each image is in exactly one part, and both hold the digits in equal shares."""

    train: Part
    test: Part


def digits() -> Digits:
    """The digits, always cut the same way."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.float32) / _BRIGHTEST
    labels = torch.from_numpy(targets).to(torch.int64)
    cut = train_test_split(range(len(labels)), test_size=_TEST_IMAGES, stratify=targets, random_state=0)
    train, test = (Part(i, images[i], labels[i]) for i in map(torch.tensor, cut))
    return Digits(train, test)
