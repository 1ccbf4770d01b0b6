"""What torch keeps for a thread is put back as it was."""

from __future__ import annotations

import torch

from batchnorm.population.torch_state import TorchState, random_state, seed, set_random_state


def test_the_random_stream_goes_on_where_it_was() -> None:
    state = random_state()
    first = torch.rand(5)
    set_random_state(state)
    assert torch.equal(torch.rand(5), first)
    seed(3)
    seeded = torch.rand(5)
    seed(3)
    assert torch.equal(torch.rand(5), seeded)
    set_random_state(state)
    assert torch.equal(torch.rand(5), first)


def test_everything_is_put_back() -> None:
    before = TorchState.here(["cpu"])
    drawn = torch.rand(3)
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_cache_enabled(False)
    inside = TorchState.here(["cpu"])
    before.restore()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.is_autocast_cache_enabled()
    assert torch.equal(torch.rand(3), drawn)
    inside.restore()
    assert not torch.is_grad_enabled()
    assert torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.float16
    assert not torch.is_autocast_cache_enabled()
    before.restore()
