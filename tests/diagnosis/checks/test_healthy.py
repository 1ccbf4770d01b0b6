"""Healthy networks: nothing above an info, by the checks that need no data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.subject import Subject, subject_of_model, subject_of_state_dict
from diagnosis.healthy import SMALL, TIMM, TORCHVISION, healthy, made

LARGE = pytest.mark.filterwarnings("ignore")  # timm's and torchvision's own, at import
NAMES = [
    *((name, kind) for name in SMALL for kind in ("digits", "noise")),
    *(pytest.param(name, "digits", marks=(pytest.mark.long, LARGE)) for name in TORCHVISION),
    *(pytest.param(name, "noise", marks=(pytest.mark.long, LARGE)) for name in TIMM),
]
CODES = [code for code in CHECKS if code[2] in "014"]


def above_info(subject: Subject) -> Iterator[Finding]:
    for code in CODES:
        yield from (finding for finding in CHECKS[code].run(subject) if finding.severity != "info")


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_nothing_above_an_information(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model, size = made(name)
    batches = healthy(model, kind, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    assert list(above_info(subject_of_model(model, optimizer=optimizer, example=batches[0]))) == []
    assert list(above_info(subject_of_state_dict(model.state_dict()))) == []


@pytest.mark.parametrize("name", SMALL)
def test_one_layer_that_is_wrong_is_found_alone(name: str) -> None:
    torch.manual_seed(0)
    model, size = made(name)
    healthy(model, "digits", size)
    layer = subject_of_model(model).layers[1]
    assert layer.module is not None
    layer.module.reset_running_stats()
    layer.module.momentum = 0.99
    layer.module.train()
    findings = {(finding.code, finding.layer) for finding in above_info(subject_of_model(model))}
    assert findings == {(code, layer.name) for code in ("BN001", "BN101", "BN105")}
