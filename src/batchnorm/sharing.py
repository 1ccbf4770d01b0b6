"""One batch, of which several processes have a part each.

A module of its own because `torch.compiler.disable` imports the compiler, which takes as long as torch itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.autograd import Shared, apply, transformed
from batchnorm.distributed import Group
from batchnorm.errors import CountError, TransformError
from batchnorm.moments import Moments
from batchnorm.recipe import Recipe


# Not in a compiled graph: what is done depends on what the others have.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def normalized(
    x: Tensor,
    recipe: Recipe,
    mask: Tensor | None,
    moments: Moments,
    correct: Callable[[Moments], tuple[Tensor, Tensor]] | None,
    group: Group,
    place: str,
) -> tuple[Tensor, Moments] | None:
    """This process's part of a batch, by the moments of all of it: `functional.normalize_by_batch`.

    Args:
        x: the part; it may be empty.
        recipe: the rest.
        mask: one value for each of the part's positions.
        moments: of the part.
        correct: of batch renormalization, as in `functional.normalize_by_batch`.
        group: the processes.
        place: the layer, in words.

    Returns:
        The output, and the moments of all parts; None where all parts are empty.

    Raises:
        CountError: one value for each channel together; the same error in all processes.
        TransformError: inside a transform of torch.func.
    """
    if transformed():
        raise TransformError(
            f"got a transform of torch.func around {place}, whose statistics {group.size} processes share; processes "
            f"cannot meet inside one. Use sync=False there"
        )
    own = _positions(x, recipe)
    moments, positions = group.all_reduce_moments(moments, own, place)
    # Who has two positions knows enough, and need not wait for the device.
    if own < 2 and (total := int(positions.item())) < 2:
        if total == 0:
            return None
        raise CountError(
            f"got inputs of {group.size} processes, here of shape {tuple(x.shape)}, with one value for each channel "
            f"together; expected more than 1 value per channel when training, because the variance of one value is 0. "
            f"Use larger batches, switch to inference with .eval(), or drop the last incomplete batch "
            f"(DataLoader(drop_last=True))"
        )
    if correct is not None:
        recipe = recipe.corrected(*correct(moments))
    y: Tensor = apply(x, None, None, *recipe[:3], mask, recipe[3:], None, Shared(moments, group, place))
    return y, moments


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def joined(x: Tensor, recipe: Recipe, moments: Moments, group: Group, place: str) -> Moments | None:
    """The moments of all parts, for a layer that normalises by others; None where all are empty."""
    own = _positions(x, recipe)
    moments, positions = group.all_reduce_moments(moments, own, place)
    return None if own == 0 and positions.item() == 0 else moments


def _positions(x: Tensor, recipe: Recipe) -> int:
    return layout.count(x.shape, layout.channel_axis(x.dim(), recipe.channel_dim))
