"""Where records go: lists, lines, TensorBoard."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import batchnorm as bn
from batchnorm.diagnosis.writers import HISTOGRAMS, JsonLines
from batchnorm.errors import UsageError
from diagnosis.training import LAYERS, network, sgd, train
from support import tolerances
from support.comparison import close


def test_tensorboard_itself(tmp_path: Path) -> None:
    model, twin = network(), network()
    writer = SummaryWriter(str(tmp_path))
    with bn.Monitor(model, every=2, writer=writer) as monitor, bn.Monitor(twin, every=2) as kept:
        train(model, sgd(model), 4)
        train(twin, sgd(twin), 4)
    writer.add_scalar("mine", 1.0, 0)  # it is still open
    writer.close()
    assert not monitor.records
    read = EventAccumulator(str(tmp_path), {"scalars": 0, "histograms": 0}).Reload()
    for record in kept.records:
        for name, value in record.scalars():
            events = {event.step: event.value for event in read.Scalars(f"batchnorm/{record.layer}/{name}")}
            close(events[record.step], value, tolerances.SIX_DIGITS, name=name)
    for layer in LAYERS:
        for name in HISTOGRAMS:
            events = read.Histograms(f"batchnorm/{layer}/{name}")
            assert [event.step for event in events] == [2, 4]
            assert events[0].histogram_value.num == len(model.get_submodule(layer).weight)


def test_what_has_scalars_only() -> None:
    class Scalars:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    model, writer = network(), Scalars()
    with bn.Monitor(model, every=1, writer=writer):
        train(model, sgd(model), 1)
    assert {tag.split("/")[1] for tag, _, _ in writer.seen} == set(LAYERS)
    assert {step for _, _, step in writer.seen} == {1}


@pytest.mark.parametrize("kind", [str, Path])
def test_lines_are_appended(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        model = network()
        with bn.Monitor(model, every=2, writer=kind(path)) as monitor:
            train(model, sgd(model), 4)
        assert not monitor.records
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["layer"]) for line in lines] == 2 * [(s, layer) for s in (2, 4) for layer in LAYERS]
    assert len({line["run"] for line in lines[:6]}) == 1
    assert len({line["run"] for line in lines}) == 2


def test_each_line_is_one_write(tmp_path: Path) -> None:
    """Of several that write to one file at once, lines stay whole."""
    path, model = tmp_path / "run.jsonl", network()
    with bn.Monitor(model, every=1) as monitor:
        train(model, sgd(model), 1)
    measured = list(monitor._before.values())

    def run() -> None:
        lines = JsonLines(path)
        for _ in range(50):
            lines.write(measured)
        lines.close()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3 * 50 * len(LAYERS)


def test_a_line_is_there_when_its_step_has_ended(tmp_path: Path) -> None:
    path, model = tmp_path / "run.jsonl", network()
    with bn.Monitor(model, every=1, writer=path):
        train(model, sgd(model), 1)
        assert len(path.read_text().splitlines()) == len(LAYERS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here that is always full")
def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    model = network()
    with pytest.raises(UsageError, match="cannot write to /dev/full: "), bn.Monitor(model, every=1, writer="/dev/full"):
        train(model, sgd(model), 1)
    assert torch.is_tensor(model[0].weight.grad)
