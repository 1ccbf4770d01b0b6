from __future__ import annotations

import torch

from batchnorm.population.raw import raw


def test_the_bytes_themselves() -> None:
    t = torch.tensor([1, 2, 3], dtype=torch.uint8)
    view = raw(t.data_ptr(), 3)
    assert bytes(view) == b"\x01\x02\x03"
    view[1] = 9
    assert t.tolist() == [1, 9, 3]
    assert bytes(raw(0, 0)) == b""
