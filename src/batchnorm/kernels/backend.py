"""What an implementation of the operations is: typed functions, and what they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from batchnorm.kernels import reference

P = ParamSpec("P")
R = TypeVar("R")


class Operations:
    """One implementation of every operation, each with the reference's signature.

    Args:
        find: from an operation's name to the function.
        eager: whether they may change running statistics where autograd does not see it; not while a graph is traced.
        differentiable: whether `forward` and `normalize` are for autograd to see through, instead of `autograd`'s
            function around them.
        train: `forward_commit` with its derivatives, where it needs no function of autograd's around it. Returns y.
        train_domains: likewise `forward`, and a `commit` for each domain, of four tensors of running statistics each.

    Attributes:
        eager, differentiable, train, train_domains: as given.
        batch_moments, normalize, normalize_, forward, backward_sums, backward_input, backward, commit, forward_commit:
            the functions; what each means is written in `kernels.reference`.
    """

    def __init__(
        self,
        find: Callable[[str], object],
        *,
        eager: bool = False,
        differentiable: bool = False,
        train: Callable[..., Tensor] | None = None,
        train_domains: Callable[..., Tensor] | None = None,
    ) -> None:
        def typed(function: Callable[P, R]) -> Callable[P, R]:
            return cast("Callable[P, R]", find(function.__name__))

        self.eager, self.differentiable = eager, differentiable
        self.train, self.train_domains = train, train_domains
        self.batch_moments = typed(reference.batch_moments)
        self.normalize = typed(reference.normalize)
        self.normalize_ = typed(reference.normalize_)
        self.forward = typed(reference.forward)
        self.backward_sums = typed(reference.backward_sums)
        self.backward_input = typed(reference.backward_input)
        self.backward = typed(reference.backward)
        self.commit = typed(reference.commit)
        self.forward_commit = typed(reference.forward_commit)


@dataclass(frozen=True)
class Backend:
    """Kernels of ours, and which calls they are for; all other calls go to the reference.

    No backend is given an empty input, or a mask with a value for every value of the input.

    Attributes:
        name: as `kernels()` shows it.
        devices: kinds of devices, as `torch.device.type`.
        dtypes: of the input.
        activations: those that it has, None for no activation among them.
        find: from an operation's name to the function.
        in_graphs: the same for graphs that a compiler is given, where that is something else.
        train, train_domains: as in `Operations`.
    """

    name: Callable[[], str]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    activations: frozenset[str | None]
    find: Callable[[str], object]
    in_graphs: Callable[[str], object] | None = None
    train: Callable[..., Tensor] | None = None
    train_domains: Callable[..., Tensor] | None = None
