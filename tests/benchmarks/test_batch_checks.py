"""The script's orders, and what it makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batch_checks
from diagnosis.observed import draw, observe
from support.comparison import close

LABELS = torch.arange(96) % 5


@pytest.mark.parametrize("name", batch_checks.ORDERS)
def test_every_sample_comes_once(name: str) -> None:
    drawn = batch_checks.ORDERS[name](LABELS, 8, torch.Generator().manual_seed(0))
    assert torch.cat(drawn).sort()[0].tolist() == list(range(96))
    assert max(len(batch) for batch in drawn) == 8


def test_the_orders_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    in_order = LABELS[torch.cat(batch_checks.in_order(LABELS, 8, generator))]
    assert torch.equal(in_order, LABELS.sort()[0])
    halves = torch.cat([batch[:4] for batch in batch_checks.half_in_order(LABELS, 8, generator)])
    assert torch.equal(LABELS[halves], LABELS[halves].sort()[0])
    assert all(len(LABELS[batch].unique()) == 1 for batch in batch_checks.one_class(LABELS, 8, generator))
    assert len(set(LABELS[batch_checks.shuffled(LABELS, 8, generator)[0]].tolist())) > 1


def test_batches_put_together_are_those_that_run() -> None:
    torch.manual_seed(0)
    model, images = batch_checks.cnn(), draw(48, 1, 8, 8)
    seen = batch_checks.seen_by(model, images)
    drawn = batch_checks.shuffled(LABELS[:48], 16, torch.Generator().manual_seed(0))
    made = batch_checks.subject(model, seen, drawn).data
    ran = observe(model, [images[batch] for batch in drawn], recalibrated=False)
    assert made is not None
    assert (made.batches, made.samples) == (ran.batches, ran.samples) == (3, 48)
    for name, layer in ran.layers.items():
        assert torch.equal(made.layers[name].batch_of, layer.batch_of)
        close(made.layers[name].sample_means, layer.sample_means, 1e-5)
        for one, other in zip(made.layers[name].batches, layer.batches, strict=True):
            assert one.count == other.count
            close(one.mean, other.mean, 1e-5), close(one.m2, other.m2, 1e-4)


def test_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_checks, "SIZES", (32,))
    batch_checks.rates(4)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| s")]
    assert [row for row in rows if "shuffled" in row] == [
        "| shuffled | BN303 | 0.0% |",
        "| shuffled | BN302 | 0.0% |",
    ] * 2
    assert rows.count("| sorted | BN303 | 100.0% |") == 2


def test_networks_have_layers_to_look_at() -> None:
    for build in (batch_checks.mlp, batch_checks.cnn):
        assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in build().modules()) >= 3
