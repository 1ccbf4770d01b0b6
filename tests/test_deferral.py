"""Several forward passes, one commit: torch's statistics of the joined batch, or none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support import oracle, tolerances
from support.comparison import close

# Micro-batches of different sizes and places.
CHUNKS = [torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n)) * n + n for n in (2, 5, 3, 7)]
BATCH = torch.cat(CHUNKS)


def of_torch(*batches: Tensor, **options: Any) -> dict[str, Tensor]:
    """The state of torch's layer after these batches."""
    layer = nn.BatchNorm1d(3, **options)
    for x in batches:
        layer(x)
    return copy.deepcopy(layer.state_dict())


def same(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    assert list(layer.state_dict()) == list(expected)
    for key, value in layer.state_dict().items():
        close(value, expected[key], tolerances.STATISTIC, name=key)


def forwards(layer: nn.Module, chunks: list[Tensor]) -> None:
    for x in chunks:
        layer(x)


# --- one commit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_one_commit_of_what_one_batch_would_give(momentum: float | None) -> None:
    layer = bn.BatchNorm1d(3, momentum=momentum)
    layer(BATCH * 2 + 1)
    before = copy.deepcopy(layer.state_dict())
    with bn.deferred(layer):
        forwards(layer, CHUNKS)
        same(layer, before)
    same(layer, of_torch(BATCH * 2 + 1, BATCH, momentum=momentum))
    assert layer.num_batches_tracked == 2
    with bn.deferred(layer):
        forwards(layer, CHUNKS[:2])
    layer(CHUNKS[2])
    same(layer, of_torch(BATCH * 2 + 1, BATCH, torch.cat(CHUNKS[:2]), CHUNKS[2], momentum=momentum))


def test_each_forward_pass_still_normalises_by_its_own_batch() -> None:
    layer, torch_layer = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    with bn.deferred(layer):
        for x in CHUNKS:
            torch.testing.assert_close(layer(x), torch_layer(x), rtol=relative, atol=absolute)


def test_accumulated_gradients_in_a_network() -> None:
    """Each layer commits the oracle's moments of everything that came into it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 5, 2), bn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 2), bn.BatchNorm1d(4))
    seen: dict[nn.Module, list[Tensor]] = {model[1]: [], model[4]: []}
    for layer in seen:
        layer.register_forward_pre_hook(lambda module, args: seen[module].append(args[0].detach()))
    with bn.deferred(model) as pending:
        for x in CHUNKS:
            model(x).square().mean().backward()
    for layer, inputs in seen.items():
        n, mean, m2 = oracle.moments(torch.cat(inputs).double().numpy())
        joined = pending.moments(layer)
        assert joined.count == n
        close(joined.mean, mean, tolerances.STATISTIC)
        close(joined.m2, m2, tolerances.STATISTIC)
        close(layer.running_mean, mean * 0.1, tolerances.STATISTIC)
        close(layer.running_var, 0.9 + 0.1 * m2 / (n - 1), tolerances.STATISTIC)


def test_masks_and_ghost_batches_join_by_what_counted() -> None:
    layer = bn.BatchNorm1d(3, virtual_batch_size=3)
    masks = [torch.arange(len(x) * 4).view(-1, 4) % 3 != 1 for x in CHUNKS]
    with bn.deferred(layer):
        for x, mask in zip(CHUNKS, masks, strict=True):
            layer(x, mask=mask)
    same(layer, of_torch(BATCH.mT[torch.cat(masks)]))


def test_a_layer_used_twice_joins_both() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(nn.Sequential(layer, nn.Sequential(layer))):
        forwards(layer, CHUNKS)
    same(layer, of_torch(BATCH))


def test_a_channel_that_is_not_finite_is_skipped_and_the_others_move() -> None:
    layer, bad = bn.BatchNorm1d(3), CHUNKS[1].clone()
    bad[0, 1, 0] = torch.nan
    with bn.deferred(layer):
        forwards(layer, [CHUNKS[0], bad])
    expected = of_torch(torch.cat(CHUNKS[:2]))
    expected["running_mean"][1], expected["running_var"][1] = 0, 1
    same(layer, expected)
    assert layer.num_batches_skipped.tolist() == [0, 1, 0]


# --- no commit -------------------------------------------------------------------------------------------------------


def test_discard() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer) as pending:
        forwards(layer, CHUNKS)
        assert pending.moments(layer) is not None
        pending.discard()
        assert pending.moments(layer) is None
    same(layer, of_torch())


def test_forwards_after_a_discard_are_committed() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer) as pending:
        forwards(layer, CHUNKS[:2])
        pending.discard()
        forwards(layer, CHUNKS[2:])
    same(layer, of_torch(torch.cat(CHUNKS[2:])))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_commits_nothing(error: type[BaseException]) -> None:
    layer = bn.BatchNorm1d(3)

    def fail() -> None:
        with bn.deferred(layer):
            forwards(layer, CHUNKS)
            raise error

    with pytest.raises(error):
        fail()
    same(layer, of_torch())
    layer(CHUNKS[0])
    same(layer, of_torch(CHUNKS[0]))


def test_nothing_inside_commits_nothing() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer) as pending:
        layer(torch.zeros(0, 3))
        assert pending.moments(layer) is None
    same(layer, of_torch())


def untracked() -> bn.BatchNorm1d:
    layer = bn.BatchNorm1d(3)
    layer.track_running_stats = False
    return layer


SILENT: dict[str, Callable[[], nn.Module]] = {
    "eval": lambda: bn.BatchNorm1d(3).eval(),
    "frozen": lambda: bn.freeze(bn.BatchNorm1d(3)),
    "frozen statistics": lambda: bn.freeze(bn.BatchNorm1d(3), affine=False, normalization=False),
    "not tracking": untracked,
}


@pytest.mark.parametrize("case", SILENT)
def test_layers_that_propose_nothing(case: str) -> None:
    still, moving = SILENT[case](), bn.BatchNorm1d(3)
    with bn.deferred(nn.ModuleList([still, moving])) as pending:
        for x in CHUNKS:
            still(x), moving(x)
        assert pending.moments(still) is None
    same(still, of_torch())
    same(moving, of_torch(BATCH))


def test_a_layer_frozen_inside_stands_still() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer):
        layer(BATCH)
        bn.freeze(layer)
    same(layer, of_torch())


def test_a_layer_set_to_inference_inside_has_proposed() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer):
        forwards(layer, CHUNKS)
        layer.eval()(BATCH + 1)
    same(layer, of_torch(BATCH))


# --- several contexts ------------------------------------------------------------------------------------------------


def test_an_inner_context_joins_into_the_outer() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer) as outer:
        layer(CHUNKS[0])
        with bn.deferred(layer) as inner:
            forwards(layer, CHUNKS[1:3])
            assert inner.moments(layer).count == 4 * (5 + 3)
            assert outer.moments(layer).count == 4 * 2
        same(layer, of_torch())
        layer(CHUNKS[3])
    same(layer, of_torch(BATCH))


def test_an_inner_discard_or_exception_drops_the_inner_alone() -> None:
    layer = bn.BatchNorm1d(3)

    def fail() -> None:
        with bn.deferred(layer):
            layer(CHUNKS[2])
            raise ZeroDivisionError

    with bn.deferred(layer):
        layer(CHUNKS[0])
        with bn.deferred(layer) as inner:
            layer(CHUNKS[1])
            inner.discard()
        with pytest.raises(ZeroDivisionError):
            fail()
        layer(CHUNKS[3])
    same(layer, of_torch(torch.cat([CHUNKS[0], CHUNKS[3]])))


def test_an_outer_discard_drops_the_inner_too() -> None:
    layer = bn.BatchNorm1d(3)
    with bn.deferred(layer) as outer:
        with bn.deferred(layer):
            forwards(layer, CHUNKS)
        outer.discard()
    same(layer, of_torch())


def test_a_part_of_a_model() -> None:
    model = nn.ModuleList([bn.BatchNorm1d(3), bn.BatchNorm1d(3)])
    with bn.deferred(model[0]) as pending:
        for layer in model:
            forwards(layer, CHUNKS)
        assert pending.moments(model[1]) is None
        same(model[1], of_torch(*CHUNKS))
    same(model[0], of_torch(BATCH))
    same(model[1], of_torch(*CHUNKS))


def test_two_models_at_once() -> None:
    a, b = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    with bn.deferred(a):
        with bn.deferred(b) as pending:
            forwards(a, CHUNKS[:2]), forwards(b, CHUNKS[2:])
            pending.discard()
            b(CHUNKS[0])
        same(b, of_torch(CHUNKS[0]))
        same(a, of_torch())
    same(a, of_torch(torch.cat(CHUNKS[:2])))


def test_torchs_layers_are_named() -> None:
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)), nn.SyncBatchNorm(3))
    with (
        pytest.warns(UserWarning, match=r"commit at once: 1\.0, 2\. Use batchnorm.convert") as caught,
        bn.deferred(model),
    ):
        forwards(model[:2], CHUNKS)
    assert [w.filename for w in caught] == [__file__]
    same(model[0], of_torch(BATCH))
    assert model[1][0].num_batches_tracked == len(CHUNKS)
    with pytest.warns(UserWarning, match="at once: the model itself"), bn.deferred(nn.BatchNorm1d(3)):
        pass


# --- replays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_a_checkpoints_replay_proposes_nothing(use_reentrant: bool, backward_inside: bool) -> None:
    layer, runs = bn.BatchNorm1d(3), []
    layer.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    with bn.deferred(layer):
        outputs = []
        for x in CHUNKS:
            y = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=use_reentrant)
            outputs.append(y.square().sum())
            if backward_inside:
                outputs.pop().backward()
    if not backward_inside:
        sum(outputs).backward()
    assert sorted(runs) == sorted([len(x) for x in CHUNKS] * 2)
    same(layer, of_torch(BATCH) | {name: p.detach() for name, p in layer.named_parameters()})
    assert layer.num_batches_tracked == 1


# --- copies ----------------------------------------------------------------------------------------------------------


def through_a_file(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES: list[Callable[[nn.Module], Any]] = [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    through_a_file,
]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_made_afterwards_commit_at_once(copied: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(bn.BatchNorm1d(3))
    before = vars(model[0]).keys()
    with bn.deferred(model):
        forwards(model, CHUNKS)
    other = copied(model)
    assert vars(model[0]).keys() == vars(other[0]).keys() == before
    other(BATCH)
    same(other[0], of_torch(BATCH, BATCH))
    same(model[0], of_torch(BATCH))


@pytest.mark.parametrize("copied", COPIES)
def test_copies_made_inside_are_outside(copied: Callable[[nn.Module], Any]) -> None:
    """No end of the context would come for them: they commit at once, and nothing of the original's."""
    model = nn.Sequential(bn.BatchNorm1d(3))
    with bn.deferred(model):
        model(CHUNKS[0])
        other = copied(model)
        same(other[0], of_torch())
        other(BATCH)
        same(other[0], of_torch(BATCH))
        forwards(model, CHUNKS[1:])
    same(model[0], of_torch(BATCH))
    same(other[0], of_torch(BATCH))


def test_compiled() -> None:
    layer = bn.BatchNorm1d(3)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(BATCH)
    with bn.deferred(layer):
        forwards(compiled, CHUNKS)
    compiled(BATCH)
    same(layer, of_torch(BATCH, BATCH, BATCH))
