"""Statistics that processes share: what each computes is its part of what one process computes from all parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
import sync_scenarios
from batchnorm.errors import OptionError
from support import oracle, processes, tolerances
from support.comparison import close

Found = list[dict[str, Any]]
SCRIPT = sync_scenarios.__file__
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
WEIGHT, BIAS = np.array([0.5, 1.5, -1.0]), np.array([-1.0, 0.0, 2.0])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes found, in all scenarios."""
    return processes.run(
        list(sync_scenarios.SCENARIOS), 2, tmp_path_factory.mktemp("ranks"), timeout=150, script=SCRIPT
    )


@pytest.fixture(scope="module")
def found_by_three(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return processes.run(list(sync_scenarios.OF_THREE), 3, tmp_path_factory.mktemp("ranks"), timeout=150, script=SCRIPT)


def flat(t: Tensor) -> np.ndarray:
    """(N, C, *S) as (N * S, C): what the processes have is one batch of positions."""
    return t.double().movedim(1, -1).reshape(-1, sync_scenarios.CHANNELS).numpy()


def expected(
    parts: list[dict[str, Tensor]], masks: list[Tensor] | None = None, **options: Any
) -> dict[str, np.ndarray]:
    """One process's results from all parts, by the oracle."""
    x, dy = (np.concatenate([flat(own[name]) for own in parts]) for name in ("x", "dy"))
    weights = None if masks is None else np.concatenate([m.double().reshape(-1).numpy() for m in masks])
    residual = np.concatenate([flat(own["residual"]) for own in parts]) if "activation" in options else None
    y, mean, m2 = oracle.forward(x, WEIGHT, BIAS, residual, weights=weights, **options)
    n = len(x) if weights is None else weights.sum()
    dx, _, dweight, dbias = oracle.backward(dy, x, mean, m2 / n, WEIGHT, BIAS, residual, weights=weights, **options)
    running = oracle.commit((np.zeros(3), np.ones(3)), n, mean, m2, 0.1)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "running_mean": running[0], "running_var": running[1]}


def agree(at: Found, wanted: dict[str, np.ndarray], *, rounding: float = 0.0, last: bool = False) -> None:
    """Each process has its part of the outputs, and all have the same statistics, bit for bit."""
    inputs = (lambda t: t.double().reshape(-1, sync_scenarios.CHANNELS).numpy()) if last else flat
    for name, bound in (("y", tolerances.OUTPUT), ("dx", tolerances.GRADIENT)):
        actual = np.concatenate([inputs(f[name]) for f in at])
        close(actual, wanted[name], bound + rounding, name=name)
    root = len(wanted["y"]) ** 0.5
    for name in ("dweight", "dbias"):
        total = sum(f[name].double().numpy() for f in at)
        close(total, wanted[name], absolute=(tolerances.SUM_PER_ROOT + rounding) * root * 3, name=name)
    for name in ("running_mean", "running_var"):
        assert all(torch.equal(f[name], at[0][name]) for f in at)
        close(at[0][name], wanted[name], relative=tolerances.STATISTIC, name=name)
    assert all(f["num_batches_tracked"] == 1 for f in at)


def parts_of(name: str) -> list[dict[str, Tensor]]:
    return [sync_scenarios.part(shape, rank) for rank, shape in enumerate(sync_scenarios.SHAPES[name])]


# --- the same numbers as one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in sync_scenarios.SHAPES if name != "three"])
def test_parts_of_any_size(found: Found, name: str) -> None:
    agree([f[name] for f in found], expected(parts_of(name)))


def test_three_processes(found_by_three: Found) -> None:
    agree([f["three"] for f in found_by_three], expected(parts_of("three")))


@pytest.mark.parametrize(("scenario", "kind"), [("bool mask", torch.bool), ("weights", torch.float32)])
def test_masks_weigh_by_what_they_count(found: Found, scenario: str, kind: torch.dtype) -> None:
    """One process's mask leaves nothing."""
    shapes = sync_scenarios.SHAPES["other sizes"]
    masks = [sync_scenarios.positions(shape, rank, kind=kind) for rank, shape in enumerate(shapes)]
    assert masks[0].any()
    assert not masks[1].any()
    agree([f[scenario] for f in found], expected(parts_of("other sizes"), masks))


def test_a_residual_and_an_activation(found: Found) -> None:
    agree([f["residual"] for f in found], expected(parts_of("other sizes"), activation="silu"))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_dtensors_batch_is_that_of_all_parts(found: Found, activation: str | None) -> None:
    wanted = expected(parts_of("equal"), activation=activation)  # type: ignore[arg-type]
    x = np.concatenate([flat(own["x"]) for own in parts_of("equal")])
    z = (x - wanted["running_mean"]) / np.sqrt(wanted["running_var"] + 1e-5) * WEIGHT + BIAS
    for f in (f["one tensor" + " activated" * (activation is not None)] for f in found):
        close(flat(f["y"]), wanted["y"], tolerances.OUTPUT)
        close(flat(f["dx"]), wanted["dx"], tolerances.GRADIENT)
        for name in ("dweight", "dbias"):
            close(f[name], wanted[name], absolute=tolerances.SUM_PER_ROOT * len(x) ** 0.5 * 3, name=name)
        for name in ("running_mean", "running_var"):
            close(f[name], wanted[name], relative=tolerances.STATISTIC, name=name)
        close(flat(f["inference"]), z if activation is None else z.clip(0), relative=10 * tolerances.OUTPUT)
        assert (f["num_batches_tracked"], f["skipped"]) == (1, None)


def test_channels_last(found: Found) -> None:
    agree([f["channels last"] for f in found], expected(parts_of("other sizes")), last=True)


def test_bfloat16(found: Found) -> None:
    rounded = [own | {"x": own["x"].bfloat16()} for own in parts_of("other sizes")]
    rounded = [own | {"dy": own["dy"].bfloat16()} for own in rounded]
    agree([f["bfloat16"] for f in found], expected(rounded), rounding=tolerances.ONE_ROUNDING[torch.bfloat16][0])


def test_the_function(found: Found) -> None:
    wanted = expected(parts_of("nothing here"))
    y = (wanted["y"] - BIAS) / WEIGHT
    close(flat(found[1]["functional"]["y"]), y, absolute=10 * tolerances.OUTPUT)
    assert found[0]["functional"]["y"].shape == (0, 3, 5)
    for f in found:
        close(f["functional"]["running_var"], wanted["running_var"], relative=tolerances.STATISTIC)


def test_without_running_statistics(found: Found) -> None:
    wanted = expected(parts_of("equal"))
    y = np.concatenate([flat(f["no running statistics"]["y"]) for f in found])
    close(y, wanted["y"], absolute=10 * tolerances.OUTPUT)


def test_the_average_of_all_batches(found: Found) -> None:
    x = np.concatenate([flat(own["x"]) for own in parts_of("equal")])
    for f in found:
        close(f["average"]["running_mean"], x.mean(0), relative=tolerances.STATISTIC)
        close(f["average"]["running_var"], x.var(0, ddof=1), relative=tolerances.STATISTIC)


def test_frozen_normalization_shares_what_it_proposes(found: Found) -> None:
    x = flat(parts_of("nothing here")[1]["x"])
    for f in found:
        close(f["normalised by running"]["running_mean"], x.mean(0), relative=tolerances.STATISTIC)
    y = x / np.sqrt(1 + 1e-5) * WEIGHT + BIAS
    close(flat(found[1]["normalised by running"]["y"]), y, relative=tolerances.OUTPUT)


def test_micro_batches_are_joined_over_all(found: Found) -> None:
    parts = [sync_scenarios.part((6, 3, 5), rank)["x"][: 4 + 2 * rank] for rank in range(2)]
    n, mean, m2 = oracle.moments(np.concatenate([flat(x) for x in parts]))
    running = oracle.commit((np.zeros(3), np.ones(3)), n, mean, m2, 0.1)
    for f in (f["micro-batches"] for f in found):
        close(f["running_mean"], running[0], relative=tolerances.STATISTIC)
        close(f["running_var"], running[1], relative=tolerances.STATISTIC)
        assert f["num_batches_tracked"] == 1


def test_a_repeated_forward_pass_commits_once(found: Found) -> None:
    wanted = expected(parts_of("equal"))
    for f, dx in zip((f["repeated"] for f in found), np.split(wanted["dx"], 2), strict=True):
        assert f["num_batches_tracked"] == 1
        close(f["running_var"], wanted["running_var"], relative=tolerances.STATISTIC)
        close(flat(f["dx"]), dx, absolute=10 * tolerances.GRADIENT)


def test_batch_renormalization(found: Found) -> None:
    """Against one process; `test_renorm` has the formula."""
    parts = parts_of("equal")
    together = {name: torch.cat([own[name] for own in parts]) for name in ("x", "dy")}
    single = sync_scenarios.step(sync_scenarios.layer(sync=False, renorm=bn.Renorm(1.5, 0.5)), together)
    for name in ("y", "dx"):
        actual = torch.cat([f["renormalised"][name] for f in found])
        close(actual, single[name], absolute=20 * tolerances.GRADIENT)


def test_a_compiled_model(found: Found) -> None:
    agree([f["compiled"] for f in found], expected(parts_of("equal")))


# --- training --------------------------------------------------------------------------------------------------------


def test_data_parallel_training_is_that_of_one_process(found: Found) -> None:
    """torch.nn's layers on whole batches, in one process."""
    single = sync_scenarios.network()
    sync_scenarios.train(single, sync_scenarios.samples())
    for f in found:
        for name, value in single.state_dict().items():
            close(f["trained"][name], value, name=name)
            # A process's statistics are everyone's, so that it does not matter whose are saved.
            assert torch.equal(f["trained"][name], found[0]["trained"][name])


def test_two_forward_passes_before_one_backward_pass(found: Found) -> None:
    parts = parts_of("equal")
    x = torch.cat([own["x"] for own in parts]).double().requires_grad_()
    layer = nn.BatchNorm1d(3, dtype=torch.float64)  # in float32 torch's own rounding at a mean of 100 would be seen
    layer.load_state_dict(sync_scenarios.layer().state_dict())
    (layer(x) * torch.cat([own["dy"] for own in parts]) + 2 * layer(x)).sum().backward()
    dx = torch.cat([f["twice"]["dx"] for f in found])
    assert x.grad is not None
    close(dx, x.grad.numpy())
    for f in found:  # of the mean over processes
        for name, wanted in (("dweight", layer.weight.grad / 2), ("running_mean", layer.running_mean)):
            close(f["twice"][name], wanted.numpy(), name=name)


def test_a_group_of_some(found_by_three: Found) -> None:
    own = [sync_scenarios.part((4, 3, 5), rank) for rank in range(3)]
    agree([found_by_three[0]["some"], found_by_three[2]["some"]], expected([own[0], own[2]]))
    agree([found_by_three[1]["some"]], expected([own[1]]))
    for f in found_by_three:
        assert f["some"]["error"][0] == OptionError.__name__
        assert "a process group that this process is not in" in f["some"]["error"][1]


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_one_value_together_is_the_same_error_in_all(found: Found) -> None:
    for f, shape in zip((f["one value"] for f in found), ("(1, 3)", "(0, 3)"), strict=True):
        kind, message = f["error"]
        assert kind == "CountError"
        assert message.startswith(f"BatchNorm(3): got inputs of 2 processes, here of shape {shape}, with one value")
        assert f["batches"] == 0


def test_nothing_together_changes_nothing(found: Found) -> None:
    for f in (f["no value"] for f in found):
        assert (f["error"], f["batches"], f["dx"].shape) == (None, 0, (0, 3))


def test_inference_waits_for_nobody(found: Found) -> None:
    x = sync_scenarios.part((4, 3), 0)["x"].double().numpy()
    y = x / np.sqrt(1 + 1e-5) * WEIGHT + BIAS
    close(found[0]["inference"]["y"], y, relative=tolerances.OUTPUT)


@pytest.mark.parametrize(
    ("scenario", "kind", "message"),
    [
        ("twice derived", "TransformError", "got create_graph=True for statistics that processes share"),
        ("transformed", "TransformError", "whose statistics 2 processes share"),
        ("ghosts", "OptionError", "got virtual_batch_size=2 with statistics that processes share"),
    ],
)
def test_what_processes_cannot_do_together(found: Found, scenario: str, kind: str, message: str) -> None:
    for f in found:
        assert f[scenario]["error"][0] == kind
        assert message in f[scenario]["error"][1]


def test_other_numbers_of_channels_are_the_same_error_in_all(found: Found) -> None:
    for f in found:
        kind, message = f["other channels"]["error"]
        assert kind == "OrderError"
        assert "rank 0 at BatchNorm1d(3), number" in message
        assert "rank 1 at BatchNorm1d(4), number" in message
        assert f["other channels"]["batches"] == [0, 0]
        assert not f["other channels"]["mean"].any()
        kind, message = f["other channels backward"]["error"]
        assert kind == "OrderError"
        assert "rank 1 at the backward pass of BatchNorm1d(4)" in message
        assert f["other channels backward"]["batches"] == [1, 1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("scenario", "size", "places"),
    [
        ("equal", 2, None),
        ("other order", 3, "ranks 0, 1 at BatchNorm1d(3), a; rank 2 at BatchNorm1d(3), b;"),
        ("early end", 2, "rank 0 at BatchNorm1d(3), b; rank 1 at the backward pass of BatchNorm1d(3), a;"),
    ],
)
def test_who_is_elsewhere_is_named(tmp_path: Path, scenario: str, size: int, places: str | None) -> None:
    found = processes.run([scenario], size, tmp_path, timeout=90, script=SCRIPT, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    for f in found:
        assert f is not None
        if places is None:
            assert f[scenario]["num_batches_tracked"] == 1
        else:
            assert f[scenario]["error"][0] == "OrderError"
            assert f"got processes at different places: {places}" in f[scenario]["error"][1]


@pytest.mark.long
def test_a_process_that_is_gone_is_an_error(tmp_path: Path) -> None:
    found = processes.run(["killed"], 2, tmp_path, timeout=90, script=SCRIPT)
    assert found[1] is None
    assert found[0] is not None
    assert found[0]["killed"]["error"][0] == "ProcessError"
    assert "another process of the group is gone" in found[0]["killed"]["error"][1]


# --- alone -----------------------------------------------------------------------------------------------------------


def test_alone_it_is_a_layer_like_any_other() -> None:
    own = sync_scenarios.part((4, 3, 5), 0)
    shared, single = (sync_scenarios.step(sync_scenarios.layer(sync=sync), own) for sync in (True, False))
    assert all(torch.equal(shared[name], single[name]) for name in single)


def test_layers_are_told_apart() -> None:
    first, second = sync_scenarios.layer(), sync_scenarios.layer()
    assert first.label != second.label
    model = bn.convert(nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm1d(3))}), sync=True)
    assert model["a"][0].label == "a.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_group": object()}, "got a process_group without sync=True"),
        ({"sync": True, "virtual_batch_size": 4}, "got virtual_batch_size=4 with statistics that processes share"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bn.BatchNorm1d(3, **options)
    with pytest.raises(OptionError, match=message):
        bn.convert(nn.BatchNorm1d(3), **options)
