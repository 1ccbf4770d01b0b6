"""The networks' data: shapes, and digits that are still there. The networks themselves are the script's long run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from consistency_networks import ARCHITECTURES, clips, crops, series, waves

DIGITS = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (partial(crops, size=32), (3, 3, 32, 32)),
        (partial(clips, size=16, frames=4), (3, 3, 4, 16, 16)),
        (partial(waves, length=200), (3, 200)),
        (partial(series, length=24), (3, 24, 8)),
    ],
)
def test_the_same_numbers_give_the_same_data(data: partial[torch.Tensor], shape: tuple[int, ...]) -> None:
    x, again = (data(DIGITS, torch.Generator().manual_seed(1)) for _ in range(2))
    assert x.shape == shape
    assert torch.equal(x, again)
    assert not torch.equal(x[0], x[1])


def test_a_crop_is_a_part_of_its_digit() -> None:
    (crop,) = crops(DIGITS[:1], torch.Generator().manual_seed(1), size=16)
    whole = F.interpolate(DIGITS[:1].view(1, 1, 8, 8), size=(20, 20), mode="bilinear", antialias=True)[0]
    parts = [whole[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    assert sum(torch.equal(crop, part.expand(3, -1, -1)) for part in parts) == 1


def test_frames_differ() -> None:
    (clip,) = clips(DIGITS[:1], torch.Generator().manual_seed(1), size=16, frames=4)
    assert len({tuple(frame.flatten().tolist()) for frame in clip.unbind(1)}) > 1


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) >= 30
