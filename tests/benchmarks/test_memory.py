"""What is measured of the memory of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from memory import measure
from memory_networks import NETWORKS, with_checkpoints
from support.passes import CHANNELS, chain, images, residual

ROOT = Path(__file__).parents[2]


def test_the_memory_is_what_is_saved() -> None:
    output = 8 * CHANNELS * 32 * 32 * 4  # 512 KiB: not so little that it would be kept
    plain = measure(chain(), images(samples=8))
    net = chain()
    handle = bn.recompute(net)
    found = measure(net, images(samples=8))
    # Of each layer an input and an output, of the last convolution its output; the image was there before.
    assert 7 * output <= plain.saved < 7.1 * output
    assert handle.report.saved == 3 * output
    assert plain.saved - found.saved == pytest.approx(3 * output, abs=3 * 2 * CHANNELS * 4)  # copies of parameters
    assert plain.peak - found.peak >= 2 * output
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients, found.gradients, strict=True))


def test_a_chain_of_residuals_needs_less_at_its_peak_too() -> None:
    plain, net = measure(residual(9), images(samples=8)), residual(9)
    handle = bn.recompute(net)
    found = measure(net, images(samples=8))
    assert found.saved < plain.saved - 0.9 * handle.report.saved
    assert found.peak < plain.peak - 0.7 * handle.report.saved


def test_checkpoints_compute_the_same() -> None:
    torch.manual_seed(0)
    net = NETWORKS["U-Net"].make()
    x = torch.randn(1, 3, 32, 32)
    expected = measure(net, x)
    found = measure(with_checkpoints(net.train(), NETWORKS["U-Net"].blocks), x)
    assert found.saved < expected.saved


@pytest.mark.long
def test_the_script_runs() -> None:
    command = [sys.executable, "benchmarks/memory.py", "--networks", "U-Net", "--batch", "1", "--size", "64"]
    run = subprocess.run(
        [*command, "--repeats", "1"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "| U-Net |" in run.stdout
