from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from batchnorm.bench import contenders, suites
from batchnorm.errors import UsageError
from support import tolerances
from support.comparison import close

CASES = [
    suites.Case("test", (6, 5), suites.FIRST, "float32"),
    suites.Case("test", (6, 5, 7), suites.AXIS, "float32"),
    suites.Case("test", (3, 5, 4, 4), suites.LAST, "float32"),
    suites.Case("test", (3, 5, 2, 4, 4), suites.FIRST, "bfloat16"),
    suites.Case("test", (6, 5, 7), suites.AXIS, "float32", residual=True),
    suites.Case("test", (3, 5, 4, 4), suites.LAST, "float16", residual=True),
]


@pytest.mark.parametrize("make", [contenders.ours, contenders.torch_nn], ids=["ours", "torch_nn"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_answer_is_that_of_the_formula(make: contenders.Callable, case: suites.Case) -> None:
    contender = contenders.TorchModule("test", make)
    assert contender.load(case)
    x, dy, weight, bias = (t.double() for t in case.tensors())
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    swapped = x.movedim(case.channel_dim, 1)
    z = F.batch_norm(swapped, None, None, weight, bias, training=True).movedim(1, case.channel_dim)
    if (residual := case.added()) is not None:
        inputs.append(residual.double().requires_grad_())
        z = z + inputs[-1]
    y = F.relu(z)
    expected = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    tolerance = tolerances.BENCH_ANSWER[case.dtype]
    for actual, e in zip(contender.answer(), expected, strict=True):
        close(actual, e.float(), relative=tolerance, absolute=tolerance * 10)


@pytest.mark.parametrize("phase", contenders.PHASES)
def test_every_phase_takes_time_and_leaves_inference_alone(phase: str) -> None:
    contender = contenders.TorchModule("test", contenders.ours)
    contender.load(CASES[0])
    assert contender.run(phase) > 0
    assert contender._layers[1].num_batches_tracked == 0
    assert (contender._layers[0].num_batches_tracked > 0) == (phase != "inference")
    contender.close()
    assert vars(contender).keys() == {"name", "_make"}


def test_a_peer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="make peers"):
        contenders.Peer("jax", tmp_path)
