"""A budget of memory: what goes beyond it is spilled or repeated, and no bit of the result changes."""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.population import memory
from batchnorm.population.memory import spilling_is_cheaper
from batchnorm.population.spill import Spill
from support.memory import mapped_files
from support.populations import everything, images, layers, made

BATCHES = [batch.repeat(1, 1, 8, 8) for batch in images(*[4] * 10)]
WAYS = {"spill": lambda *_: True, "replay": lambda *_: False, "in turn": None}
# "in turn" is a mixture of the two, and half as long again as both.
EACH_WAY = ["spill", "replay", pytest.param("in turn", marks=pytest.mark.long)]


@pytest.fixture(params=EACH_WAY)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways, and both mixed."""
    turns = iter(range(10**9))
    monkeypatch.setattr(memory, "spilling_is_cheaper", WAYS[request.param] or (lambda *_: next(turns) % 2 == 0))
    return request.param


def statistics(model: nn.Module) -> list[list[float]]:
    return [t.tolist() for layer in layers(model).values() for t in (layer.running_mean, layer.running_var)]


def unlimited(net: str, **options: Any) -> tuple[list[list[float]], bn.Recalibration]:
    model = made(net)
    result = bn.recalibrate(model, BATCHES, memory_limit=2**40, **options)
    return statistics(model), result


@pytest.mark.parametrize("share", [10, 2, 10**9])
@pytest.mark.parametrize("net", ["residual", "fused", "plain"])
def test_the_same_bits_with_a_tenth_with_half_and_with_nothing(net: str, share: int, way: str) -> None:
    expected, whole = unlimited(net)
    assert whole.memory is not None
    assert whole.memory.spilled == whole.memory.replays == 0
    assert whole.memory.peak > 0
    model, limit = made(net), whole.memory.peak // share
    used = bn.recalibrate(model, BATCHES, memory_limit=limit).memory
    assert statistics(model) == expected
    assert used is not None
    assert used.limit == limit
    assert used.peak <= limit
    assert (used.spilled > 0) == (way != "replay" and share < 100)
    assert used.replays > 0  # who finds no room first is not known to own what it holds


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.linear, self.bn2 = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.bn1(x + torch.rand_like(x)))
        return self.bn2(x * torch.rand_like(x))


def test_random_models_draw_the_same_when_they_are_repeated(way: str) -> None:
    data = [torch.randn(5, 3) for _ in range(6)]
    torch.manual_seed(1)
    models = [Random() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, limit in zip(models, (2**40, 0), strict=True):
        torch.manual_seed(2)
        bn.recalibrate(model, data, memory_limit=limit)
    assert statistics(models[0]) == statistics(models[1])


def test_what_is_not_the_passs_alone_stays(way: str) -> None:
    """Parameters, buffers, batches, and what batches are made of inside the forward pass."""
    data = torch.cat(BATCHES)
    model = made("plain")
    expected = made("plain")
    bn.recalibrate(expected, data.split(4))

    class Cached(nn.Module):
        """Keeps what it computed for the first batch of a size, and gives the same tensor to all others."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, Tensor] = {}
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) not in self.kept:
                self.kept[len(x)] = torch.zeros(len(x), 1, 1, 1)
            return x + self.identity(self.kept[len(x)])

    cached = Cached()

    def forward(net: nn.Module, i: int) -> None:
        net(cached(data[4 * i : 4 * i + 4]))

    original = data.clone()
    for limit in (0, 3000):
        bn.recalibrate(model, range(10), forward=forward, memory_limit=limit)
        assert statistics(model) == statistics(expected)
        assert torch.equal(data, original)
        assert cached.kept[4].tolist() == torch.zeros(4, 1, 1, 1).tolist()
    model = nn.Sequential(cached, *made("plain"))
    bn.recalibrate(model, data.split(4), memory_limit=0)
    assert statistics(model) == statistics(expected)
    assert torch.equal(data, original)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", range(6))
def test_a_fault_while_some_are_out(way: str, where: int, error: type[BaseException]) -> None:
    data = torch.cat(BATCHES)
    original, model = data.clone(), made("residual")
    outside = data * 2
    passed: list[int] = []

    def fail_at_last(*_: object) -> None:
        passed.append(1)
        if len(passed) > where + 1:  # the look ahead was the first
            raise error

    model.bn3.register_forward_hook(fail_at_last)

    def forward(net: nn.Module, x: Tensor) -> None:
        net(x + 0 * net_identity(outside)[: len(x)])

    net_identity = nn.Identity()
    model.add_module("identity", net_identity)
    before = everything(model)
    with pytest.raises(error):
        bn.recalibrate(model, data.split(4), forward=forward, memory_limit=500_000)
    assert everything(model) == before
    assert torch.equal(data, original)
    assert torch.equal(outside, original * 2)


class Catching(nn.Module):
    """Catches whatever ends it, goes on in another way, and changes what it can."""

    def __init__(self, after: str) -> None:
        super().__init__()
        self.after = after
        self.bn1, self.bn2, self.plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Identity()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.bn1(x * self.scale)
        except BaseException:
            self.scale *= 0.5
            torch.manual_seed(3)
            if self.after == "another layer":
                y = x / x.std()
            elif self.after == "the same layer":
                y = self.bn1(x / x.std())
            elif self.after == "another module":
                y = self.plain(x * 0)
            elif self.after == "another shape":
                y = self.bn2(x[:, :2])
            else:
                raise LookupError from None
        return self.bn2(y * 3 * self.scale + torch.rand(()))


@pytest.mark.parametrize(
    "after", ["another layer", "the same layer", "another module", "another shape", "another exception"]
)
def test_a_pass_that_is_ended_changes_nothing(after: str, way: str) -> None:
    data = [20 * torch.randn(50, 3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    answers = []
    for limit in (2**40, 0):
        torch.manual_seed(2)
        model = Catching(after)
        bn.recalibrate(model, data, memory_limit=limit)
        assert model.scale == 1
        answers.append((statistics(model), torch.get_rng_state().tolist()))
    assert answers[0] == answers[1]


class Large(nn.Module):
    """Our layers, whose outputs are so large that their memory is kept for the next ones, and so cannot be resized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), bn.BatchNorm2d(8, activation="relu")
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), bn.BatchNorm2d(8, activation="relu")
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), bn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        return self.bn3(self.conv3(self.bn2(self.conv2(first)))) + first


def pooled_output() -> Tensor:
    return bn.functional.batch_norm(torch.ones(1, 2, 128, 128), torch.zeros(2), torch.ones(2))


def test_outputs_whose_memory_is_kept_for_the_next_ones(way: str) -> None:
    """128 KiB and more; from the first one that cannot go to a file, they lie in memory that can."""
    assert pooled_output().nbytes == 2**17
    kept = not pooled_output().untyped_storage().resizable()
    data = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) + i for i in range(10)]
    torch.manual_seed(0)
    expected = Large()
    model = copy.deepcopy(expected)
    whole = bn.recalibrate(expected, data, memory_limit=2**40).memory
    assert whole is not None
    assert whole.peak >= 10 * 2 * 2 * 8 * 64 * 64 * 4  # conv3's output and bn1's, at the last layer
    used = bn.recalibrate(model, data, memory_limit=whole.peak // 10).memory
    assert statistics(model) == statistics(expected)
    assert used is not None
    assert used.peak <= whole.peak // 10
    assert (used.spilled > 0) == (way != "replay")
    if way == "spill":  # one found room before the next found out; all others began with memory that can be exchanged
        assert used.replays == 2
    assert pooled_output().untyped_storage().resizable() != kept


def test_outputs_memory_is_kept_again_after_a_fault(way: str) -> None:
    kept = not pooled_output().untyped_storage().resizable()

    def forward(net: nn.Module, x: Tensor) -> None:
        net(x)
        raise LookupError

    with pytest.raises(LookupError):
        bn.recalibrate(Large(), [torch.randn(2, 3, 64, 64) for _ in range(4)], forward=forward, memory_limit=0)
    assert pooled_output().untyped_storage().resizable() != kept


class Full:
    """A disk that is full after so many bytes, in all files together."""

    room = 0

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def fileno(self) -> int:
        raise OSError(9, "only writing works here")

    def write(self, data: memoryview) -> int:
        if not Full.room:
            raise OSError(28, "No space left on device")
        Full.room -= (written := min(Full.room, len(data)))
        return written


@pytest.mark.parametrize("room", [0, 1000, 200_000, 10**7])
def test_a_full_disk_repeats_instead(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = unlimited("residual")
    monkeypatch.setattr(Full, "room", room)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(memory, "spilling_is_cheaper", lambda *_: True)
    model = made("residual")
    used = bn.recalibrate(model, BATCHES, memory_limit=10**6).memory
    assert used is not None
    assert used.replays > 0
    assert used.spilled == 0
    assert statistics(model) == expected


# --- what others can reach --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["progress", "loader", "thread"])
def test_others_can_read_their_own_and_what_they_kept(reader: str, way: str) -> None:
    """The user's own tensors, outputs that hooks keep, NumPy's and DLPack's views: whoever reads, whenever."""
    expected, whole = unlimited("residual")
    assert whole.memory is not None
    data, model = [batch.clone() for batch in BATCHES], made("residual")
    kept: list[tuple[Tensor, np.ndarray, Tensor]] = []
    model.bn2.register_forward_pre_hook(
        lambda _, args: kept.append((args[0], np.from_dlpack(args[0]), args[0].double()))
    )

    def read(*_: object) -> None:
        for mine, original in zip(data, BATCHES, strict=True):
            assert torch.equal(mine, original)
        for tensor, array, copied in kept:
            assert np.array_equal(array, copied.numpy())
            assert tensor.numpy().tobytes() == array.tobytes()

    def in_a_thread(*_: object) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                read()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start(), thread.join()
        assert not errors

    def loader() -> Iterator[int]:
        for i in range(10):
            yield i
            if reader == "loader":
                read()

    progress = {"progress": read, "loader": None, "thread": in_a_thread}[reader]
    used = bn.recalibrate(
        model, loader(), forward=lambda m, i: m(data[i]), memory_limit=whole.memory.peak // 2, progress=progress
    ).memory
    assert used is not None
    assert (used.spilled > 0) == (way != "replay")
    assert statistics(model) == expected
    read()


def test_what_there_was_before_a_pass_is_not_the_passs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not counted, and not put out."""
    monkeypatch.setattr(memory, "spilling_is_cheaper", lambda *_: True)
    put: list[torch.UntypedStorage] = []
    original = Spill.put
    monkeypatch.setattr(Spill, "put", lambda self, storage: (put.append(storage), original(self, storage)))
    data, model = [batch.clone() for batch in BATCHES], made("residual")
    _, whole = unlimited("residual")
    assert whole.memory is not None
    bn.recalibrate(model, range(10), forward=lambda m, i: m(data[i]), memory_limit=whole.memory.peak // 2)
    assert put
    assert not {s.data_ptr() for s in put} & {x.untyped_storage().data_ptr() for x in data}


def test_a_pass_that_dies_while_it_is_out_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "spilling_is_cheaper", lambda *_: True)
    _, whole = unlimited("residual")
    assert whole.memory is not None
    model, before = made("residual"), mapped_files()

    def fail(done: int, _: int | None) -> None:
        if done == 12:
            assert mapped_files() > before
            raise LookupError

    with pytest.raises(LookupError):
        bn.recalibrate(model, BATCHES, memory_limit=whole.memory.peak // 3, progress=fail)
    assert mapped_files() == before


def test_the_cheaper_way() -> None:
    assert spilling_is_cheaper(size=100, bytes_per_second=1000, seconds=0.3)
    assert not spilling_is_cheaper(size=100, bytes_per_second=1000, seconds=0.1)


def test_a_model_that_the_hooks_do_not_see_inside() -> None:
    """Nothing is known of what it holds, and nothing breaks."""
    layer = nn.BatchNorm1d(3)
    result = bn.recalibrate(layer, [torch.randn(4, 3) for _ in range(3)], memory_limit=0)
    assert result.memory is not None
    assert result.memory.peak == 0
