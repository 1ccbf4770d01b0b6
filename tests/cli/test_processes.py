"""The processes that torchrun started."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from batchnorm.cli.processes import processes


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the only process that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")


def test_alone() -> None:
    with processes() as group:
        assert (group.rank, group.size) == (0, 1)
        assert not dist.is_initialized()


def test_a_world_size_alone_is_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with processes() as group:
        assert group.size == 1


def test_under_torchrun(torchrun: None) -> None:
    with processes() as group:
        assert (group.rank, group.size) == (0, 1)
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()


def test_the_group_ends_with_an_error_too(torchrun: None) -> None:
    with pytest.raises(KeyboardInterrupt), processes():
        raise KeyboardInterrupt
    assert not dist.is_initialized()
