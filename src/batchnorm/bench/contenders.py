"""What is measured: each contender does the same work on the same case, and tells how long it took.

The work is batch normalization with ReLU, in some cases with a residual added in between: "forward" and "inference"
give y; "backward" gives the gradients of x, weight, bias and residual from a forward pass done before; "both" is a
forward and a backward pass.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.bench.suites import AXIS, LAST, Case
from batchnorm.errors import UsageError

PHASES = ("forward", "backward", "both", "inference")
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
WORKER = Path(__file__).with_name("worker.py")


class Contender(Protocol):
    """One library, holding one case at a time."""

    name: str

    def load(self, case: Case) -> bool:
        """Prepare a case; False where this library does not do it."""

    def run(self, phase: str) -> float | None:
        """Do the work once; seconds, or None where it cannot be told from the rest."""

    def answer(self) -> list[Tensor]:
        """The output y, the gradients dx, dweight and dbias and, if any, dresidual; float32, in the case's layout."""

    def close(self) -> None:
        """Free the tensors of the case."""


class Inputs(NamedTuple):
    """What a step is given."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """A case's."""
        x, dy, weight, bias = case.tensors()
        return cls(x, dy, case.added(), weight, bias)


class TorchModule:
    """A torch module on the case's tensors: our layer, torch.nn's, or torch.nn's compiled."""

    def __init__(self, name: str, make: Callable[[Case], nn.Module]) -> None:
        self.name = name
        self._make = make

    def load(self, case: Case) -> bool:
        """Any case."""
        self.hold(case, [Inputs.of(case)])
        return True

    def hold(self, case: Case, inputs: Sequence[Inputs]) -> None:
        """Take a case on these inputs, on one device, in turn; the parameters are the first one's."""
        first = inputs[0]
        self._layers = [self._make(case).to(first.x.device) for _ in range(2)]
        self._layers[1].eval()
        for layer in self._layers:
            with torch.no_grad():
                named = dict(layer.named_parameters())
                for key, value in named.items():
                    value.copy_(first.weight if key.endswith("weight") else first.bias)
        parameters = list(self._layers[0].parameters())
        self._sets = []
        for x, dy, residual, _, _ in inputs:
            given = [t.requires_grad_() for t in (x, residual) if t is not None]
            self._sets.append((given, [x, *parameters, *given[1:]], dy))
        self._turns = itertools.cycle(self._sets)

    def prepare(self, phase: str) -> Callable[[], object]:
        """The work on the next inputs, ready to be timed; a forward pass that a backward pass needs is done already."""
        given, inputs, dy = next(self._turns)
        training, inference = self._layers
        y: Any = training(*given) if phase == "backward" else None

        def infer() -> object:
            with torch.no_grad():
                return inference(*given)

        def both() -> object:
            y = training(*given)
            return y, torch.autograd.grad(y, inputs, dy)

        works: dict[str, Callable[[], object]] = {
            "forward": lambda: training(*given),
            "backward": lambda: torch.autograd.grad(y, inputs, dy),
            "both": both,
            "inference": infer,
        }
        return works[phase]

    def run(self, phase: str) -> float:
        """Do the work once."""
        work = self.prepare(phase)
        start = time.perf_counter()
        results = work()
        seconds = time.perf_counter() - start
        del results, work  # what it takes to free them is not part of the work
        return seconds

    def answer(self) -> list[Tensor]:
        """The output and the gradients."""
        given, inputs, dy = self._sets[0]
        y = self._layers[0](*given)
        return [t.detach().float() for t in (y, *torch.autograd.grad(y, inputs, dy))]

    def close(self) -> None:
        """Free the tensors and compiled code."""
        self.__dict__ = {"name": self.name, "_make": self._make}
        torch.compiler.reset()


class _Ours(nn.Module):
    """Our layer, given a residual."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.layer(x, residual=residual)
        return y


def ours(case: Case) -> nn.Module:
    """Our layer, ReLU inside."""
    layer = batchnorm.BatchNorm(case.channels, activation="relu", channel_dim=case.channel_dim)
    return _Ours(layer) if case.residual else layer


class _Transposed(nn.Module):
    """What torch needs for (N, L, C)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return y


class _Added(nn.Module):
    """A layer, a residual, ReLU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.layer(x) + residual)


def torch_nn(case: Case) -> nn.Module:
    """torch.nn's layer, then ReLU."""
    layer: nn.Module = LAYERS[len(case.shape)](case.channels)
    if case.layout == AXIS:
        layer = _Transposed(layer)
    return _Added(layer) if case.residual else nn.Sequential(layer, nn.ReLU())


def torch_compile(case: Case) -> nn.Module:
    """The same, compiled."""
    module: Any = torch.compile(torch_nn(case), dynamic=False)
    return module  # type: ignore[no-any-return]  # torch.compile's result is typed as a callable


class Peer:
    """TensorFlow or JAX in a process and an environment of its own; requests and replies are lines of JSON."""

    def __init__(self, name: str, environments: Path) -> None:
        python = environments / name / "bin" / "python"
        if not python.exists():
            raise UsageError(f"got --peers, but there is no {python}. Make the peers' environments with: make peers")
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        threads = str(torch.get_num_threads())
        self._process = subprocess.Popen(
            [python, WORKER, name, threads], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **request: Any) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UsageError(f"{self.name} stopped with exit code {self._process.wait()}")
        return json.loads(line)

    def load(self, case: Case) -> bool:
        """A case without a residual, whose memory order this library has."""
        if case.residual:
            return False
        x, dy, weight, bias = case.tensors()
        # As it lies in memory: with the channels last where they are, and the same shape otherwise.
        self._last = case.layout == LAST
        arrays = [t.movedim(1, -1) if self._last else t for t in (x.float(), dy.float())]
        for name, t in zip(("x", "dy", "weight", "bias"), (*arrays, weight, bias), strict=True):
            np.save(Path(self._folder.name) / f"{name}.npy", t.contiguous().numpy())
        axis = -1 if case.layout in (LAST, AXIS) else 1
        loaded: bool = self._ask(do="load", folder=self._folder.name, axis=axis, dtype=case.dtype)
        return loaded

    def run(self, phase: str) -> float | None:
        """Do the work once, timed in that process."""
        seconds: float | None = self._ask(do="run", phase=phase)
        return seconds

    def answer(self) -> list[Tensor]:
        """The output and the gradients, read from files."""
        self._ask(do="answer", folder=self._folder.name)
        names = ("y", "dx", "dweight", "dbias")
        results = [torch.from_numpy(np.load(Path(self._folder.name) / f"{name}.npy")) for name in names]
        return [t.movedim(-1, 1) if self._last and t.dim() > 1 else t for t in results]

    def close(self) -> None:
        """Nothing to do: the next case takes this one's place."""

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._folder.cleanup()
