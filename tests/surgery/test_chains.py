"""Which batch-norm layers stand directly beside which linear ones."""

from __future__ import annotations

import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.chains import Flow, find_chains
from batchnorm.surgery.observing import observe
from batchnorm.surgery.recognising import linear_layers
from batchnorm.surgery.tracing import regions, seen_call
from support.networks import Calls

Norm = nn.modules.batchnorm._BatchNorm


def flow_of(model: nn.Module, *shape: int) -> Flow:
    with linear_layers(model) as known:
        calls, _ = observe(model.eval(), torch.ones(shape))
    return Flow(model, regions(model, lambda module: seen_call(calls, module), (False,)), calls, known)


def chains_of(model: nn.Module, *shape: int) -> tuple[dict[str, tuple[list[str], list[str]]], dict[str, str]]:
    """Chains by the path of the linear layer, with the paths of the layers before and after; reasons by path."""
    names = {module: path for path, module in model.named_modules()}
    chains, why = find_chains(flow_of(model, *shape), [module for module in names if isinstance(module, Norm)])
    found = {
        chain.path: tuple([names[norm] for norm in group] for group in (chain.before, chain.after)) for chain in chains
    }
    return found, {names[norm]: reason for norm, reason in why.items()}


def test_a_layer_between_two_belongs_to_the_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert chains_of(model, 2, 3) == ({"0": ([], ["1"])}, {})


def test_the_order_is_that_of_computing() -> None:
    layers = [nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    assert chains_of(nn.Sequential(*layers), 2, 3) == ({"2": (["0", "1"], ["3", "4"])}, {})


def test_what_does_nothing_in_inference_is_passed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm1d(3))
    assert chains_of(model, 2, 3)[0] == {"0": ([], ["3"])}


def test_what_does_nothing_but_has_hooks_is_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.BatchNorm1d(3))
    model[1].register_forward_hook(lambda *_: None)
    assert chains_of(model, 2, 3) == ({}, {"2": "no linear layer stands directly before it"})


def test_readers_behind_what_does_nothing_count() -> None:
    model = Calls(
        lambda m, x: m.norm(y := m.nothing(m.linear(x))) + y,
        linear=nn.Linear(3, 3),
        nothing=nn.Identity(),
        norm=nn.BatchNorm1d(3),
    )
    assert chains_of(model, 2, 3) == ({}, {"norm": "the output of nothing has 2 readers"})


def test_a_layer_that_reads_an_output_twice_reads_it_twice() -> None:
    model = Calls(lambda m, x: m.norm(y := m.linear(x), residual=y), linear=nn.Linear(3, 3), norm=bn.BatchNorm1d(3))
    assert chains_of(model, 2, 3) == ({}, {"norm": "the output of linear has 2 readers"})


def test_other_modules_between_separate() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    assert chains_of(model, 2, 3) == ({}, {"2": "no linear layer stands directly before it"})


def test_a_loop_that_no_graph_shows_all_of() -> None:
    """A part whose layers are called once in its graph, and another time from outside."""
    part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = Calls(lambda m, x: m.part[0](m.part(x)) if x.sum() else x, part=part)
    assert chains_of(model, 2, 3) == ({}, {"part.1": "part.0 is called 2 times, not always before it"})


def test_alignment_says_both_dimensions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    flow = flow_of(model, 2, 4, 4)
    (layer,) = flow.linear_layers()
    assert flow.why_not_aligned(layer, model[1]) == (
        "its channels are dimension 1 of (2, 4, 4), those of 0 dimension 2"
    )
    flow = flow_of(model, 2, 4)
    (layer,) = flow.linear_layers()
    assert flow.why_not_aligned(layer, model[1]) is None


def test_hooks_of_a_module_around_one_of_them_separate() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    assert chains_of(model, 2, 3)[0] == {"0.0": ([], ["1"])}
    model[0].register_forward_hook(lambda *_: None)
    assert chains_of(model, 2, 3) == ({}, {"1": "a module around 0.0 or it has hooks"})
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model[0].register_forward_hook(lambda *_: None)
    assert chains_of(model, 2, 3)[0] == {"0.0": ([], ["0.1"])}
