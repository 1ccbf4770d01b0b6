"""The processes that torchrun started."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from batchnorm.cli.processes import processes
from batchnorm.errors import ProcessError, UsageError


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


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "two"}, "got LOCAL_WORLD_SIZE=two in the environment; it must be a number"),
        ({"LOCAL_WORLD_SIZE": "0"}, "got LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "9" * 5000}, "got LOCAL_WORLD_SIZE=999"),
        ({"TORCHELASTIC_RUN_ID": "here"}, "got no RANK in the environment"),
        ({"TORCHELASTIC_RUN_ID": "here", "RANK": "x"}, "got RANK=x in"),
        (
            {"TORCHELASTIC_RUN_ID": "here", "RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"},
            "got RANK=2 of WORLD_SIZE=2",
        ),
    ],
)
def test_an_environment_that_torchrun_does_not_make(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught, processes():
        pass
    assert str(caught.value).startswith(message)


def test_processes_that_do_not_find_each_other(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "99999")
    with pytest.raises(ProcessError, match="torchrun's processes do not find each other: "), processes():
        pass
