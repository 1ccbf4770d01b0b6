"""The training loop, and prediction."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.study import training
from batchnorm.study.dataset import Data, Part
from batchnorm.study.training import NO_CLASS, accuracy, batches, first_step, infer, one_thread, predict, settle


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.1, 0.5, 0.9, 0.94), None),
        ((0.1, 0.95, 0.9, 0.99), 10),
        ((0.96, 0.97, 0.98, 0.99), 5),
        ((0.1, 0.2, 0.3, 0.96), 20),
        ((0.0, 0.0, 0.0, 0.0), None),
    ],
)
def test_first_step(accuracies: tuple[float, ...], expected: int | None) -> None:
    assert first_step((5, 10, 15, 20), accuracies, 0.95) == expected


def test_batches_use_each_image_at_most_once_an_epoch_in_a_new_order() -> None:
    taken = [batch.tolist() for batch in itertools.islice(batches(10, 3, torch.Generator().manual_seed(0)), 6)]
    epochs = [list(itertools.chain(*taken[:3])), list(itertools.chain(*taken[3:]))]
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert epochs[0] != epochs[1]


def test_batches_follow_the_generator() -> None:
    def taken(seed: int) -> list[list[int]]:
        return [b.tolist() for b in itertools.islice(batches(50, 8, torch.Generator().manual_seed(seed)), 12)]

    assert taken(1) == taken(1)
    assert taken(1) != taken(2)


def test_gradient_steps_are_those_of_sgd() -> None:
    mine = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    others = copy.deepcopy(mine)
    optimizer = torch.optim.SGD(others.parameters(), 0.3)
    for _ in range(3):
        x = torch.randn(6, 5)
        training.gradient_step(
            [*mine.parameters()], torch.autograd.grad(mine(x).square().sum(), [*mine.parameters()]), 0.3
        )
        optimizer.zero_grad()
        others(x).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, mine.parameters(), others.parameters()))


class Watcher(nn.Module):
    """Outputs its input, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.modes.append(self.training)
        return x


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (None, [5])])
def test_predict_shows_the_network_so_many_at_a_time(batch_size: int | None, sizes: list[int]) -> None:
    watcher = Watcher()
    images = torch.eye(5)[[3, 1, 4, 0, 2]]
    assert predict(watcher, images, batch_size).tolist() == [3, 1, 4, 0, 2]
    assert watcher.sizes == sizes
    assert not any(watcher.modes)
    assert watcher.training


def test_predict_keeps_the_mode_even_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        predict(network, torch.zeros(1, 4))
    assert network.training
    network.eval()
    predict(network, torch.zeros(1, 3))
    assert not network.training


def test_outputs_that_are_not_numbers_are_no_class() -> None:
    outputs = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [1.0, 0.0]])
    predictions = predict(nn.Identity(), outputs)
    assert predictions.tolist() == [1, NO_CLASS, NO_CLASS, 0]
    assert accuracy(predictions, torch.tensor([1, 0, 0, 1])) == 0.25


def test_one_at_a_time_uses_the_running_statistics() -> None:
    """By a batch's own statistics a single image could not be normalised at all, and a batch would differ."""
    torch.manual_seed(0)
    network = nn.Sequential(batchnorm.BatchNorm1d(4))
    for _ in range(50):
        network(torch.randn(32, 4) * 3 + 5)
    images = torch.randn(10, 4) * 3 + 5
    statistics = [t.clone() for t in network.buffers()]
    assert torch.equal(predict(network, images, 1), predict(network, images, 5))
    for before, after in zip(statistics, network.buffers(), strict=True):
        assert torch.equal(before, after)


def data_of(train: Tensor, test: Tensor) -> Data:
    """Two classes, told by the first feature."""
    parts = [Part(torch.arange(len(x)), x, (x[:, 0] > 0).long()) for x in (train, test)]
    return Data(*parts, tuple(train.shape[1:]), 2, "made")


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return data_of(torch.randn(64, 3, generator=generator), torch.randn(20, 3, generator=generator))


def trained(
    network: nn.Module, data: Data, *, steps: int, rate: float = 0.5, evaluate_every: int = 4
) -> training.LearningCurve:
    return training.train(
        network,
        data,
        learning_rate=rate,
        batch_size=16,
        steps=steps,
        evaluate_every=evaluate_every,
        generator=torch.Generator().manual_seed(1),
    )


def fixed_linear() -> nn.Linear:
    linear = nn.Linear(3, 2)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def test_training_learns(data: Data) -> None:
    curve = trained(fixed_linear(), data, steps=100)
    assert curve.test_accuracy[-1] >= 0.9
    first, last = curve.training_loss[0], curve.training_loss[-1]
    assert first is not None
    assert last is not None
    assert last < first / 2


def test_the_last_step_is_evaluated(data: Data) -> None:
    curve = trained(fixed_linear(), data, steps=10)
    assert curve.steps == (4, 8, 10)
    assert len(curve.test_accuracy) == len(curve.training_loss) == 3


def test_a_step_is_gradient_descent_on_the_mean_cross_entropy(data: Data) -> None:
    """Against the formula: the gradient of the cross-entropy at equal outputs is (1/2 - label) x."""
    linear = fixed_linear()
    curve = trained(linear, data, steps=1)
    chosen = next(batches(64, 16, torch.Generator().manual_seed(1)))
    x, y = data.train.inputs[chosen], nn.functional.one_hot(data.train.labels[chosen], 2)
    torch.testing.assert_close(linear.weight.detach(), -0.5 * (0.5 - y).T @ x / 16)
    assert curve.training_loss == pytest.approx((torch.tensor(2.0).log().item(),))


def test_every_step_has_its_own_gradient(data: Data) -> None:
    linear, expected = fixed_linear(), fixed_linear()
    trained(linear, data, steps=3)
    for chosen in itertools.islice(batches(64, 16, torch.Generator().manual_seed(1)), 3):
        loss = nn.functional.cross_entropy(expected(data.train.inputs[chosen]), data.train.labels[chosen])
        for parameter, gradient in zip(
            expected.parameters(), torch.autograd.grad(loss, list(expected.parameters())), strict=True
        ):
            parameter.data -= 0.5 * gradient
    torch.testing.assert_close(linear.weight, expected.weight)
    torch.testing.assert_close(linear.bias, expected.bias)


def test_the_loss_is_the_mean_since_the_evaluation_before(data: Data) -> None:
    fine = trained(fixed_linear(), data, steps=8, evaluate_every=1)
    coarse = trained(fixed_linear(), data, steps=8, evaluate_every=4)
    losses = [loss for loss in fine.training_loss if loss is not None]
    assert coarse.training_loss == pytest.approx((sum(losses[:4]) / 4, sum(losses[4:]) / 4))


def test_how_often_it_is_evaluated_changes_no_training() -> None:
    generator = torch.Generator().manual_seed(0)
    data = data_of(torch.randn(64, 3, generator=generator), torch.randn(20, 3, generator=generator))
    ends = []
    for every in (1, 3, 12):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2))
        trained(network, data, steps=12, evaluate_every=every)
        assert network.training
        ends.append([t.clone() for t in network.state_dict().values()])
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_a_loss_that_is_not_a_number_is_none(data: Data) -> None:
    broken = replace(data, train=replace(data.train, inputs=torch.full_like(data.train.inputs, float("nan"))))
    curve = trained(fixed_linear(), broken, steps=4)
    assert curve.training_loss == (None,)
    assert curve.test_accuracy == (0.0,)


class Stepped(nn.Module):
    """Right on as many of ten samples as there were steps, however often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(self.steps)
        right = torch.arange(len(x)) < self.steps
        return torch.stack([~right, right], 1).float()

    def descent(self) -> Iterator[Tensor]:
        while True:
            self.steps += 1
            yield torch.zeros(())


@pytest.mark.parametrize(
    ("steps", "evaluated"),
    [(10, [6, 7, 8, 9, 10]), (100, [84, 88, 92, 96, 100]), (25, [21, 22, 23, 24, 25]), (3, [1, 2, 3])],
)
def test_a_training_settles_at_the_mean_of_its_end(steps: int, evaluated: list[int]) -> None:
    network = Stepped()
    tens, hundreds = (Part(torch.arange(n), torch.zeros(n, 1), torch.ones(n, dtype=torch.int64)) for n in (10, 100))
    settled = settle(network, network.descent(), steps, [tens, hundreds])
    assert network.steps == steps
    assert network.asked == [step for step in evaluated for _ in range(2)]
    mean = sum(evaluated) / len(evaluated)
    assert settled[1] == pytest.approx(mean / 100)
    assert settled[0] == pytest.approx(sum(min(step, 10) for step in evaluated) / len(evaluated) / 10)


def test_inference_gives_the_outputs_in_order_and_without_gradient() -> None:
    inputs = torch.arange(10.0)[:, None]
    linear = nn.Linear(1, 2)
    linear.load_state_dict({"weight": torch.tensor([[2.0], [-3.0]]), "bias": torch.tensor([1.0, 5.0])})  # no rounding
    outputs = infer(linear, inputs, 3)
    assert not outputs.requires_grad
    assert torch.equal(outputs, linear(inputs).detach())


def test_one_thread_is_given_back(threads: None) -> None:
    torch.set_num_threads(2)
    seen: list[int] = []

    @one_thread()
    def fail() -> None:
        seen.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 2
