"""What an experiment is."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.report.document import Section, Table
from batchnorm.study import networks, shift
from batchnorm.study.dataset import digits
from batchnorm.study.experiment import Conclusion, Setting
from batchnorm.study.experiments import EXPERIMENTS
from batchnorm.study.networks import OURS, TORCH, Placement


def test_it_travels_to_other_processes() -> None:
    setting = pickle.loads(pickle.dumps(Setting(digits(), OURS)))
    assert setting.data.digest == digits().digest
    assert setting.layers is not None
    for row in EXPERIMENTS:
        run, plan = pickle.loads(pickle.dumps((row.run, row.full)))
        assert run is row.run
        assert plan == row.full


def test_it_cannot_be_changed() -> None:
    for row in EXPERIMENTS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.full.seeds = 3
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.claims = ()  # type: ignore[misc]  # on purpose


def test_a_section_has_the_parts_of_a_conclusion() -> None:
    conclusion = Conclusion({}, [], ["It is so."], [Table("t", [], [])], [], ["a note"])
    section = replace(EXPERIMENTS[0], name="key", title="Is it so?", code="print(1)").section(conclusion)
    assert section == Section("key", "Is it so?", ["It is so."], [], conclusion.tables, [], ["a note"], "print(1)")


def test_a_quick_plan_trains_as_long_as_the_full_one() -> None:
    """So that no claim is judged at another stage of training."""
    with pytest.raises(ValueError, match=r"trains for 80 steps, the full one for 300; .* quick=None"):
        replace(shift.EXPERIMENT, quick=shift.Plan(seeds=6, steps=80))
    replace(shift.EXPERIMENT, quick=shift.Plan(seeds=6, hidden=(8, 8)))


def test_without_a_plan_every_claim_needs_the_full_study() -> None:
    row = replace(shift.EXPERIMENT, quick=None)
    section = row.section(None)
    assert [found.claim for found in row.postponed()] == list(row.claims)
    assert {(judged.outcome, judged.verdict) for judged in section.judged} == {("note", "needs the full study")}
    assert "needs the full study" in " ".join(section.summary)
    assert section.code == row.code


@pytest.mark.parametrize("placement", ["before", "after", "none"])
def test_networks_for_the_data_and_of_the_layers(placement: Placement) -> None:
    """As those that are made by hand: equal weights from equal generators, of the setting's layers."""
    setting = Setting(digits(), TORCH)
    made = setting.perceptron((5, 3), placement, torch.Generator().manual_seed(0), dropout=0.2)
    generator = torch.Generator().manual_seed(0)
    options: Any = {"placement": placement, "layers": TORCH, "generator": generator}
    alike(made, networks.perceptron(64, (5, 3), 10, dropout=0.2, **options))
    made = setting.residual(4, 2, placement, torch.Generator().manual_seed(1))
    generator.manual_seed(1)
    alike(made, networks.residual((1, 8, 8), 4, 2, 10, **options))


def alike(a: nn.Module, b: nn.Module) -> None:
    assert str(a) == str(b)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
