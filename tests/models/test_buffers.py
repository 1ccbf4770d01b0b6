"""Buffers come back as the same objects with the same values, but for those that are to stay as they have become."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import OptionError
from batchnorm.models.buffers import SavedBuffers, put_back


def test_objects_and_values_come_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, device="meta"))
    model.register_buffer("none", None)
    named = {name: id(buffer) for name, buffer in model.named_buffers()}
    saved = SavedBuffers(model)
    model[0].running_mean += 1
    model[0].running_var = torch.zeros(2)
    model[0].register_buffer("new", torch.zeros(1))
    del model[0].num_batches_tracked
    model.none = torch.zeros(1)
    saved.restore()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == named
    assert model.none is None
    assert model[0].running_mean.tolist() == [0, 0]
    assert model[0].running_var.tolist() == [1, 1]


def test_what_is_accepted_stays() -> None:
    model = nn.BatchNorm1d(2)
    saved = SavedBuffers(model)
    model.running_mean += 1
    model.running_var += 1
    saved.accept([model.running_mean])
    saved.restore()
    assert (model.running_mean.tolist(), model.running_var.tolist()) == ([1, 1], [1, 1])


def test_what_did_not_change_is_not_written() -> None:
    """A graph that saved a buffer would be told that it is another."""
    model = nn.BatchNorm1d(2)
    saved = SavedBuffers(model)
    model.running_mean += 1
    versions = model.running_mean._version, model.running_var._version
    saved.restore()
    assert (model.running_mean._version, model.running_var._version) == (versions[0] + 1, versions[1])


def test_inference_tensors_are_written() -> None:
    with torch.inference_mode():
        model = nn.BatchNorm1d(2)
        saved = SavedBuffers(model)
        model.running_mean += 1
    saved.restore()
    assert model.running_mean.tolist() == [0, 0]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nested, strided": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "dense": lambda: torch.ones(3),
    "view": lambda: torch.ones(7)[2:5],
}


def values(tensor: Tensor) -> list[list[float]]:
    if tensor.is_nested:
        return [part.tolist() for part in tensor.unbind()]
    return [(tensor.dequantize() if tensor.is_quantized else tensor.to_dense()).tolist()]


@pytest.mark.filterwarnings("ignore")  # torch's, of layouts in the making
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_of_every_layout_come_back(layout: str) -> None:
    model = nn.BatchNorm1d(2)
    buffer = LAYOUTS[layout]()
    model.register_buffer("odd", buffer)
    before, saved = values(buffer), SavedBuffers(model)
    if layout == "quantized":
        buffer.copy_(torch.zeros(3))
    else:
        buffer.data = buffer.detach() * 2
    model.running_mean += 1
    saved.restore()
    assert model.odd is buffer
    assert values(buffer) == before
    assert model.running_mean.tolist() == [0, 0]


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "larger": lambda t: t.resize_(100).fill_(2),
    "smaller": lambda t: t.resize_(1).fill_(2),
    "transposed": lambda t: t.t_().fill_(2),
    "other memory": lambda t: t.set_(torch.zeros(5)),
    "emptied": lambda t: t.untyped_storage().resize_(0),
    "by data": lambda t: setattr(t, "data", torch.zeros(4, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_shapes_and_memory_come_back(change: str) -> None:
    model = nn.Module()
    base = torch.arange(6.0)
    model.register_buffer("b", base.view(2, 3))
    buffer, saved = model.b, SavedBuffers(model)
    CHANGES[change](buffer)
    saved.restore()
    assert model.b is buffer
    assert buffer.tolist() == [[0, 1, 2], [3, 4, 5]]
    if change != "emptied":
        assert buffer.data_ptr() == base.data_ptr()


def test_all_steps_are_taken_and_all_failures_told() -> None:
    done: list[int] = []

    def fail() -> None:
        raise LookupError("it is gone")

    with pytest.raises(
        OptionError, match=r"put back 2 .*: a \(LookupError: it is gone\); c \(LookupError: it is gone\)\."
    ):
        put_back(iter([("a", fail), ("b", lambda: done.append(1)), ("c", fail), ("d", lambda: done.append(2))]))
    assert done == [1, 2]
