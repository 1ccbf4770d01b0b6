"""Passes that take turns: order, stops, what they find around them."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import batchnorm as bn
from batchnorm.errors import OrderError
from batchnorm.population.batches import Batch
from batchnorm.population.lockstep import Lockstep
from support.populations import assert_consistent, everything, images, made, run

SIZES = (8, 3, 5, 1)
LOG: list[str] = []


@pytest.fixture(autouse=True)
def log() -> None:
    LOG.clear()


def lockstep(run: Callable[[Lockstep, Batch], None]) -> Lockstep:
    steps = Lockstep(lambda batch: run(steps, batch), {"cpu"})
    return steps


def two_waits(steps: Lockstep, batch: Batch) -> None:
    try:
        for step in "ab":
            LOG.append(f"{batch.content}{step}")
            steps.wait()
        LOG.append(f"{batch.content}c")
    finally:
        LOG.append(f"{batch.content} cleaned")


def test_turns() -> None:
    with lockstep(two_waits) as steps:
        for i in range(2):
            steps.proceed(steps.add(Batch(i, i)))
        for _ in range(2):
            for batch_pass in steps.passes:
                steps.proceed(batch_pass)
    assert LOG == ["0a", "1a", "0b", "1b", "0c", "0 cleaned", "1c", "1 cleaned"]


def test_the_end_of_the_context_ends_those_that_wait() -> None:
    with lockstep(two_waits) as steps:
        for i in range(3):
            steps.proceed(steps.add(Batch(i, i)))
        stacks = [batch_pass.stack for batch_pass in steps.passes]
    assert LOG[3:] == ["0 cleaned", "1 cleaned", "2 cleaned"]
    assert all(stack is not None and stack.dead for stack in stacks)
    assert not steps.passes


def test_a_pass_that_was_stopped_begins_anew_with_the_same_random_numbers() -> None:
    def run(steps: Lockstep, batch: Batch) -> None:
        LOG.append(str(torch.rand(()).item()))
        steps.wait()

    with lockstep(run) as steps:
        batch_pass, other = (steps.add(Batch(i, i)) for i in range(2))
        steps.proceed(batch_pass), steps.proceed(other)
        steps.stop(batch_pass)
        assert batch_pass.stack is None
        steps.proceed(batch_pass)
    assert LOG[2] == LOG[0] != LOG[1]


def test_an_exception_ends_its_pass_and_goes_on_outside() -> None:
    def run(steps: Lockstep, batch: Batch) -> None:
        steps.wait()
        raise LookupError(batch.content)

    with lockstep(run) as steps:
        batch_pass = steps.add(Batch(0, "x"))
        steps.proceed(batch_pass)
        with pytest.raises(LookupError, match="x"):
            steps.proceed(batch_pass)
        assert steps.current is None
        assert batch_pass.stack is not None
        assert batch_pass.stack.dead


def begun_twice_and_broken(run: Callable[[Lockstep, Batch], None]) -> None:
    with lockstep(run) as steps:
        for i in range(2):
            steps.proceed(steps.add(Batch(i, "x")))
        raise ZeroDivisionError


def test_what_is_raised_in_cleaning_up_is_raised_where_nothing_else_was() -> None:
    def run(steps: Lockstep, batch: Batch) -> None:
        try:
            steps.wait()
        finally:
            LOG.append("cleaned")
            raise LookupError(batch.content)

    steps = lockstep(run)
    with pytest.raises(LookupError, match="x"), steps:
        steps.proceed(steps.add(Batch(0, "x")))
    with pytest.raises(ZeroDivisionError):
        begun_twice_and_broken(run)
    assert LOG == ["cleaned"] * 3


def test_a_pass_that_catches_its_end_is_ended_where_it_waits_next() -> None:
    def run(steps: Lockstep, _: Batch) -> None:
        for i in range(3):
            try:
                steps.wait()
            except BaseException:
                LOG.append(f"caught {i}")

    with lockstep(run) as steps:
        batch_pass = steps.add(Batch(0, "x"))
        steps.proceed(batch_pass)
        stack = batch_pass.stack
        steps.stop(batch_pass)
    assert stack is not None
    assert stack.dead
    assert LOG == ["caught 0", "caught 1", "caught 2"]


def test_a_thousand_passes() -> None:
    """Each is a piece of memory, not a thread."""
    threads = threading.active_count()
    with lockstep(two_waits) as steps:
        for i in range(1000):
            steps.proceed(steps.add(Batch(i, i)))
        assert threading.active_count() == threads
        for batch_pass in steps.passes:
            steps.proceed(batch_pass)
    assert len(LOG) == 3000


# --- what torch keeps for a thread ------------------------------------------------------------------------------------


class Inside(nn.Module):
    """Two layers, and a context of torch's around the first or entered between them."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.context = context
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.seen: list[tuple[Any, ...]] = []

    def look(self, x: Tensor) -> None:
        self.seen.append(
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), x.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        with self.context():
            x = self.conv1(x)
            self.look(x)
            x = self.bn1(x)
            x = self.conv2(x)
            self.look(x)
        self.look(x)
        return self.bn2(x)


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("around", [None, "autocast", "inference_mode"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_inside_a_forward_pass_are_its_own(context: str, around: str | None) -> None:
    """Each pass, suspended inside, sees what it would see alone; what is outside sees nothing of it."""
    torch.manual_seed(0)
    model, batches = Inside(CONTEXTS[context]), images(4, 3, 5)
    with CONTEXTS[around or "no_grad"]():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        with torch.no_grad():
            run(model.eval(), batches[0])
        alone, model.seen = model.seen, []
        between: list[tuple[bool, ...]] = []

        def reading() -> Iterator[Tensor]:
            for batch in batches:
                between.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
                yield batch

        bn.recalibrate(model, reading())
        assert model.seen[: len(alone)] == alone  # the look ahead
        begun, goes_on = alone[:2], alone[2:]
        assert model.seen[len(alone) :] == begun * 3 + goes_on * 3
        assert between == [before[1:]] * 3
        after = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        assert after == before
        assert_consistent(model, batches)


def test_a_forward_pass_under_autocast_is_consistent_with_inference_under_autocast() -> None:
    def forward(model: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch)

    model, batches = made("plain"), images(*SIZES)
    bn.recalibrate(model, batches, forward=forward)
    assert_consistent(model, batches, forward)


@pytest.mark.parametrize("context", [lambda: torch.device("cpu"), lambda: saved_tensors_hooks(id, id)])
def test_what_cannot_be_exchanged_is_refused(context: Any) -> None:
    model = Inside(context)
    before = everything(model)
    with pytest.raises(OrderError, match=r'layer "bn1": got a call inside a mode of torch .* method="pooled"'):
        bn.recalibrate(model, images(2, 3))
    assert everything(model) == before
    bn.recalibrate(model, images(2, 3), method="pooled")
    with context():  # around the whole it disturbs nobody
        bn.recalibrate(made("plain"), images(2, 3))


def test_another_threads_call_is_refused() -> None:
    def forward(model: nn.Module, batch: Tensor) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                model(batch)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    with pytest.raises(OrderError, match="another thread"):
        bn.recalibrate(made("plain"), images(2, 3), forward=forward)


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


def test_context_variables_are_those_of_the_caller() -> None:
    seen: list[str] = []
    token = VARIABLE.set("set")
    try:
        bn.recalibrate(
            made("plain"), images(2, 3), forward=lambda model, batch: (model(batch), seen.append(VARIABLE.get()))
        )
    finally:
        VARIABLE.reset(token)
    assert seen == ["set"] * 3


class Noisy(nn.Module):
    """Random in inference too; it keeps what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.drawn: dict[int, list[float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        mine = self.drawn.setdefault(len(x), [])
        mine.append(torch.rand(()).item())
        x = self.bn1(x)
        mine.append(torch.rand(()).item())
        return self.bn2(x)


def test_each_pass_draws_from_a_stream_of_its_own() -> None:
    def draws(*sizes: int) -> dict[int, list[float]]:
        torch.manual_seed(0)
        model = Noisy()
        before = torch.get_rng_state()
        bn.recalibrate(model, [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in sizes])
        assert torch.equal(torch.get_rng_state(), before)
        return model.drawn

    drawn = draws(5, 6, 7)
    assert drawn == draws(5, 6, 7)
    assert drawn[6] == draws(5, 6)[6]  # whoever runs in between
    assert len({value for n in (5, 6, 7) for value in drawn[n]}) == 6
