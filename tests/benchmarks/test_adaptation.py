"""The script's corruptions, orders and tables."""

from __future__ import annotations

import adaptation
import pytest
import torch

from batchnorm.study.dataset import digits
from support.comparison import close

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = digits().test.inputs[:20]


@pytest.mark.parametrize("name", adaptation.CORRUPTIONS)
def test_corruptions_are_stronger_and_stronger(name: str) -> None:
    corrupt, strengths = adaptation.CORRUPTIONS[name]
    distances = []
    for strength in strengths:
        changed = corrupt(IMAGES, strength, torch.Generator().manual_seed(1))
        assert changed.shape == IMAGES.shape
        distances.append(float((changed - IMAGES).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_corruptions_by_hand() -> None:
    flat = torch.full((1, 1, 8, 8), 0.5)
    close(adaptation.blur(flat, 0.9, GENERATOR)[..., 4, 4], [[0.5]], 1e-3)
    close(adaptation.contrast(IMAGES, 0.75, GENERATOR).std((1, 2, 3)), 0.25 * IMAGES.std((1, 2, 3)), 1e-6)
    close(adaptation.brightness(IMAGES, 0.5, GENERATOR), IMAGES + 0.5)
    close(adaptation.invert(IMAGES, 1.0, GENERATOR), 1 - IMAGES)
    random = torch.rand(1, 1, 8, 8, generator=GENERATOR)
    blocks = adaptation.pixelate(random, 4, GENERATOR)
    assert len(blocks.unique()) == 16
    close(blocks[..., :2, :2], random[..., :2, :2].mean().expand(1, 1, 2, 2))


@pytest.mark.filterwarnings("ignore:layer .* is adapted by")
def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(adaptation, "STEPS", 30)
    monkeypatch.setattr(adaptation, "CORRUPTIONS", dict(list(adaptation.CORRUPTIONS.items())[:1]))
    for kind, corrupted in ((adaptation.RESIDUAL, 3), (adaptation.PERCEPTRON, 1)):
        results = adaptation.measure(kind, range(2), 16)
        assert {len(values) for cases in results.values() for values in cases.values()} == {2}
        assert {len(cases) for cases in results.values()} == {1 + corrupted}
        single = [s for s in results if isinstance(s, adaptation.Setting) and s.size == 1 and s.prior == 0]
        assert bool(single) == (kind == adaptation.RESIDUAL)
        adaptation.show(kind, results, 16)
        lines = capsys.readouterr().out.splitlines()
        assert f"Mean of {corrupted} corruptions:" in lines
        rows = [line for line in lines if line.startswith("| all so far, prior 16 |")]
        assert [row.count("|") for row in rows] == [8, 8]
        assert sum(line.startswith("| noise, ") for line in lines) == corrupted


@pytest.mark.filterwarnings("ignore:layer .* is adapted by")
def test_what_a_setting_is() -> None:
    """Alone and without a prior, a batch is normalised as in training."""
    network = adaptation.trained(adaptation.RESIDUAL, digits().train, 0)
    x = digits().test.inputs[:12]
    with torch.no_grad():
        network.train()
        expected = [network(batch).argmax(1) for batch in x.split(6)]
        network.eval()
    setting = adaptation.Setting(adaptation.SHUFFLED, adaptation.ALONE, 6, 0.0)
    assert torch.equal(adaptation.online(network, x, setting), torch.cat(expected))
