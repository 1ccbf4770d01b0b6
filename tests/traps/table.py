"""Traps that users of batch normalization report, each as a check that both libraries go through.

    python tests/traps

prints as a Markdown table what was observed in torch.nn and in ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from traps import inputs, population, surgery, updates
from traps.kits import OURS, TORCH, Kit


@dataclass(frozen=True)
class Trap:
    """One way in which statistics go wrong.

    Attributes:
        title: what happens.
        check: from a kit to what was observed; an AssertionError that says so where the trap springs.
        torch_fails: whether it springs in torch.
        section: which of the two tables of docs/traps.md has its row.
    """

    title: str
    check: Callable[[Kit], str]
    torch_fails: bool
    section: str = "statistics"


TRAPS = [
    Trap("one inf in a batch poisons the statistics", partial(updates.one_bad_value, bad=float("inf")), True),
    Trap("one NaN in a batch poisons the statistics", partial(updates.one_bad_value, bad=float("nan")), True),
    Trap("reentrant checkpointing commits twice", partial(updates.checkpointing, reentrant=True), True),
    Trap("non-reentrant checkpointing commits twice", partial(updates.checkpointing, reentrant=False), True),
    Trap("a training pass under no_grad must commit", updates.without_gradients, False),
    Trap("bfloat16 running statistics stall", partial(updates.stalling, dtype=torch.bfloat16), True),
    Trap("float16 running statistics stall", partial(updates.stalling, dtype=torch.float16), True),
    Trap("`.half()` and `.bfloat16()` round the statistics", updates.half_layers, True),
    Trap("momentum=None with a loaded counter of 0 wipes what was loaded", updates.loaded_without_counter, True),
    Trap("a rejected batch is counted", updates.rejected_batch, True),
    Trap("`update_bn` overwrites a frozen layer", updates.frozen_by_recomputation, True),
    Trap("recomputed statistics weigh batches, not samples", population.uneven_batches, True),
    Trap("recomputed statistics are not what inference sees", population.upstream, True),
    Trap("recomputing from no data resets the statistics", population.no_data, True),
    Trap("recomputing that was interrupted changes the model", population.interrupted, True),
    Trap("a constant channel is not exactly beta", inputs.constant_channel, True),
    Trap("an empty batch changes the layer", inputs.empty_batch, True),
    Trap("one value for each channel: an error that does not help", inputs.one_value, True),
    Trap("padding leaks into the statistics", inputs.padding, True),
    Trap("memory orders of input and gradient", inputs.memory_orders, False),
    Trap("many rows, odd numbers of channels", inputs.sizes, False),
    Trap("a spatial size of 0", inputs.no_positions, True),
    Trap("results in another memory format", inputs.memory_formats, False),
    Trap("(N, L, C) without transposing", inputs.features_last, True),
    Trap("the third derivative in training is wrong", inputs.third_derivative, True),
    Trap("vmap over an ensemble in training", partial(inputs.ensemble, momentum=0.1), False),
    Trap("vmap over an ensemble, momentum=None", partial(inputs.ensemble, momentum=None), True),
    Trap("torch.func.grad of a layer in training", inputs.functional_gradient, False),
    Trap("torch.compile in one graph, once", partial(inputs.compiled, momentum=0.1), False),
    Trap("torch.compile in one graph, once, momentum=None", partial(inputs.compiled, momentum=None), True),
    Trap("half input with float32 parameters", partial(inputs.half_precision, pure=False), False),
    Trap("half input and parameters", partial(inputs.half_precision, pure=True), False),
    Trap("a frozen layer drifts after `.train()`", updates.frozen_in_training, True),
    Trap("an averaged copy of a half layer stalls", updates.averaged_copy, True),
    Trap("gradient accumulation counts micro-batches", updates.micro_batches, True),
    Trap("converting drops hooks", surgery.hooks, True, "surgery"),
    Trap("converting makes one shared layer two", surgery.shared, True, "surgery"),
    Trap("converting makes a subclass a plain layer", surgery.subclass, True, "surgery"),
    Trap("folding into Linear before (N, L, C) with L == C", surgery.features_last, True, "surgery"),
    Trap("folding into a convolution that is used twice", surgery.reused, True, "surgery"),
    Trap("folding into a convolution that two layers read", surgery.two_readers, False, "surgery"),
    Trap("folding into a transposed convolution of groups", surgery.grouped, True, "surgery"),
    Trap("folding in half precision", surgery.half_precision, False, "surgery"),
    Trap("momentum as another library means it", surgery.other_words, True, "surgery"),
    Trap("a scale of 1e5 from a variance of next to nothing, silently", surgery.large_scale, True, "surgery"),
]


def observed(trap: Trap, kit: Kit) -> str:
    """What running the check showed; **bold** where the trap springs."""
    try:
        return trap.check(kit)
    except AssertionError as sprung:
        return f"**{sprung}**"


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}; bold is where the trap springs")
    for section in dict.fromkeys(trap.section for trap in TRAPS):
        print("\n| trap | torch.nn | batchnorm |")
        print("|---|---|---|")
        for trap in TRAPS:
            if trap.section == section:
                print(f"| {trap.title} | {observed(trap, TORCH)} | {observed(trap, OURS)} |")


if __name__ == "__main__":
    main()
