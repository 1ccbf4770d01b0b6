"""One version's side of `versions.py`: imports the package from one folder, and uses only what is public.

    python -S versions_worker.py TREE PATHS THREADS

PATHS is a JSON list of folders in which the package's dependencies are. Reads requests from stdin, a line of JSON each,
and answers on stdout likewise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path[:] = [sys.argv[1], *json.loads(sys.argv[2]), *sys.path[1:]]

import batchnorm  # noqa: E402 - after the path it is found on

# isort: split
import torch  # noqa: E402 - likewise

LAST, AXIS = "channels last", "(N, L, C)"  # the names of `batchnorm.bench.suites`
Work = Callable[[], Any]


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A (N, C, *S) tensor in the layout of a case."""
    if layout == AXIS:
        return x.movedim(1, -1).contiguous()
    if layout == LAST:
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x.contiguous()


def works(case: dict[str, Any]) -> dict[str, Work]:
    """The work of each phase, for a case as `versions.VersionCase` has it; "answer" begins with y and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = case["shape"], getattr(torch, case["dtype"])
    x, dy, residual = (arranged(torch.randn(shape, generator=generator).to(dtype), case["layout"]) for _ in range(3))
    options: dict[str, torch.Tensor] = {"residual": residual} if case["residual"] else {}
    if case["mask"]:
        options["mask"] = torch.rand(shape[0], *shape[2:], generator=generator) < 0.75
    channel_dim = -1 if case["layout"] == AXIS else 1
    layers = [batchnorm.BatchNorm(shape[1], activation=case["activation"], channel_dim=channel_dim) for _ in range(2)]
    with torch.no_grad():
        weight, bias = (torch.rand(shape[1], generator=generator) + 0.5 for _ in range(2))
        for layer in layers:
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    training, inference = layers[0], layers[1].eval()
    without_mask = {name: value for name, value in options.items() if name != "mask"}
    inputs = [x.requires_grad_(), training.weight, training.bias]
    inputs += [residual.requires_grad_()] if case["residual"] else []

    def both() -> list[torch.Tensor]:
        y = training(x, **options)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    def infer() -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = inference(x, **without_mask)
            return y

    return {"forward": lambda: training(x, **options), "both": both, "inference": infer, "answer": both}


def timed(work: Work, count: int) -> float:
    """Mean seconds."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def main() -> None:
    """Serve requests until stdin ends."""
    torch.set_num_threads(int(sys.argv[3]))
    replies, sys.stdout = sys.stdout, sys.stderr  # what the package may print is not a reply
    known: dict[str, Work] = {}
    for line in sys.stdin:
        request = json.loads(line)
        reply: Any = None
        match request["do"]:
            case "describe":
                reply = {
                    "file": batchnorm.__file__,
                    "version": batchnorm.__version__,
                    "kernels": batchnorm.kernels()[0].implementation,
                }
            case "load":
                known = works(request["case"])
            case "run":
                work = known[request["phase"]]
                work()  # not timed: the other process has run since
                reply = timed(work, request["count"])
            case "answer":
                torch.save([t.detach().float() for t in known["answer"]()[:4]], request["file"])
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
