"""The digits and their cut."""

from __future__ import annotations

import torch

from batchnorm.study.data import Digits, digits


def test_every_image_is_in_exactly_one_part() -> None:
    data = digits()
    indices = torch.cat([data.train.indices, data.test.indices])
    assert indices.sort().values.tolist() == list(range(1797))


def test_both_parts_hold_the_digits_in_equal_shares() -> None:
    data = digits()
    train, test = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.test))
    expected = (train + test) * len(data.test.labels) / 1797
    assert (test - expected).abs().max() < 1, "rounding to whole images is all that may differ"


def test_images_are_pixels_in_the_unit_interval() -> None:
    data = digits()
    for part in (data.train, data.test):
        assert part.images.shape == (len(part.labels), 64) == (len(part.indices), 64)
        assert part.images.dtype == torch.float32
        assert part.images.min() == 0
        assert part.images.max() == 1


def test_images_and_labels_belong_together() -> None:
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    part = digits().test
    torch.testing.assert_close(part.images.double() * 16, torch.from_numpy(pixels)[part.indices], rtol=0, atol=0)
    assert part.labels.tolist() == targets[part.indices.numpy()].tolist()


def test_the_cut_is_always_the_same() -> None:
    def order(data: Digits) -> list[int]:
        return data.train.indices.tolist() + data.test.indices.tolist()

    torch.manual_seed(1)
    first = order(digits())
    torch.manual_seed(2)
    assert order(digits()) == first
