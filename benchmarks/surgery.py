"""Surgery on every architecture with batch norm of torchvision, and many of timm's and transformers', as Markdown.

    pip install --no-deps torchvision timm
    pip install transformers
    python benchmarks/surgery.py --json surgery.json

(`--no-deps`, so that pip does not bring another torch; nothing but code is downloaded, no weights.)

Each model has random weights, random gamma and beta, and running statistics of two training passes; those of more than
150 million parameters are left out. In float64: a training step of the converted and of the fused model beside that of
torch's layers (output, gradients, the state afterwards), and the state after converting and reverting, bit for bit. In
float32: the folded model's outputs. In bfloat16: how far from float32 the unfolded model is, it folded, and the folded
one moved to bfloat16. Results are merged into the JSON file and models in it are skipped, so that the run can be cut
into pieces with --seconds.

    python benchmarks/surgery.py --counts --json counts.json

says only what becomes of the layers. (Keep it in a file of its own.)

    python benchmarks/surgery.py --time

measures, for a few of them, inference before and after folding and a training step with torch's layers, converted and
fused: in turn, medians.

    python benchmarks/surgery.py --draws 16 --only NAME

compares only the errors in bfloat16, for that many other draws of the parameters: what the first draw alone shows of
rounding is partly chance. (With scipy, which is in the extra `study`.)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from surgery_tables import COLUMNS, COUNTS, Row, summary, table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import batchnorm as bn
from batchnorm.study.statistics import mean_interval
from batchnorm.surgery.report import Report
from libraries import library
from surgery_networks import LARGEST, Norm, architectures, images, used

TIMED = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "regnet_y_800mf")


def tensors(outputs: object) -> list[Tensor]:
    """The floating tensors of a model's outputs."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def step(model: nn.Module, inputs: dict[str, Any]) -> list[list[Tensor]]:
    """Outputs and gradients of a training step, and the state after it."""
    torch.manual_seed(0)
    model.train().zero_grad()
    outputs = tensors(model(**inputs))
    sum((y.square().mean() for y in outputs), torch.zeros(())).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]  # the step below leaves them
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return [[y.detach() for y in outputs], gradients, list(model.state_dict().values())]


def apart(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, of each tensor relative to its largest value, or a thousandth of the others'."""
    floor = 1e-3 * max((float(e.abs().max()) for e in expected if e.numel()), default=0.0) + 1e-300
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if e.numel():
            error = float((a.double() - e.double()).abs().max()) / max(float(e.abs().max()), floor)
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether a model's state has the same keys, dtypes and values."""
    after = model.state_dict()
    return list(after) == list(before) and all(
        after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items()
    )


def rms(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The root of the mean square of the difference, relative to that of the expected."""
    return max(
        float((a.double() - e.double()).norm() / (e.double().norm() + 1e-300))
        for a, e in zip(actual, expected, strict=True)
    )


def counts(report: Report) -> dict[str, int]:
    """How often each thing was done, or was the reason why not."""
    names = Counter(("" if e.done else "left: ") + _short(e.what) for e in report)
    return dict(names.most_common())


def _short(what: str) -> str:
    what = re.sub(r", in .*| of [\w.-]+$", "", what)
    what = re.sub(r"the output of [\w.-]+ has", "the output before it has", what)
    what = re.sub(r"not into [\w.-]+ either", "not into the next either", what)
    what = re.sub(
        r"^([\w.-]+|the model) is not traceable|because ([\w.-]+|the model) is not traceable", "not traceable", what
    )
    return re.sub(r"others use the parameters of [\w.-]+", "others use the parameters of the layer before it", what)


def examine(model: nn.Module, inputs: dict[str, Any]) -> Row:
    """Everything about one model."""
    used(model, inputs)
    doubled = {k: v.double() for k, v in inputs.items()}
    double = copy.deepcopy(model).double()
    state, classes = copy.deepcopy(double.state_dict()), [type(m) for m in double.modules()]
    expected = step(copy.deepcopy(double), doubled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # layers that are left: the reports have them
        converted = bn.convert(copy.deepcopy(double))
        ours = sum(isinstance(m, bn.BatchNorm) for m in converted.modules())
        unchanged = same_bits(bn.revert(copy.deepcopy(converted)), state)
        off = max(map(apart, step(converted, doubled), expected))
        bn.revert(converted)
        reverted = [type(m) for m in converted.modules()] == classes
        del converted  # models in float64 are large: no more of them at a time than needed
        fused: Any = bn.fuse(double)
        fused_report = fused.report
        fused_off = max(map(apart, step(copy.deepcopy(fused), doubled), expected))
        bn.revert(fused)
        reverted &= [type(m) for m in fused.modules()] == classes and same_bits(fused, state)
        del double, fused, expected, state
        freed: Any = bn.remove_dead_biases(copy.deepcopy(model).eval(), inputs)
        model.eval()
        folded: Any = bn.fold(model, inputs)
        bf16 = in_half_precision(model, folded, inputs)
    return {
        "layers": sum(isinstance(m, Norm) for m in model.modules()),
        "converted": ours,
        "bits": unchanged and reverted,
        "step": off,
        "fused": counts(fused_report),
        "fused step": fused_off,
        "folded": counts(folded.report),
        "left": sum(isinstance(m, Norm) for m in folded.modules()),
        "fold": folded.report.error,
        "bfloat16": bf16,
        "biases": len(freed.report.done),
        "biases error": freed.report.error,
    }


def count(model: nn.Module, inputs: dict[str, Any]) -> Row:
    """What becomes of the layers, without training steps in float64 and without half precision."""
    used(model, inputs).eval()
    layers = sum(isinstance(m, Norm) for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        folded: Any = bn.fold(model, inputs)
        freed: Any = bn.remove_dead_biases(copy.deepcopy(model), inputs)
        fused: Any = bn.fuse(model)  # converts as well
    return {
        "layers": layers,
        "converted": sum(isinstance(m, bn.BatchNorm) for m in model.modules()),
        "fused": counts(fused.report),
        "folded": counts(folded.report),
        "left": sum(isinstance(m, Norm) for m in folded.modules()),
        "fold": folded.report.error,
        "biases": len(freed.report.done),
    }


def in_half_precision(model: nn.Module, folded: nn.Module, inputs: dict[str, Any]) -> list[float] | None:
    """How far bfloat16 is from float32: the model, the model folded, and the folded model moved to bfloat16.

    None where torch has no such operation for it.
    """
    half_inputs = {k: v.bfloat16() for k, v in inputs.items()}
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        truth = tensors(model(**inputs))
        try:
            half(**half_inputs)
        except NotImplementedError:  # s3d's average pooling, of torch 2.13 on a CPU
            return None
        # By way of training mode, in which LeViT forgets what it has computed in float32 and would use again.
        halves: list[nn.Module] = [half, bn.fold(half, half_inputs), copy.deepcopy(folded).train().eval().bfloat16()]
        return [rms(tensors(m(**half_inputs)), truth) for m in halves]


def examined(model: nn.Module) -> bool:
    """Whether there is batch norm in it, and memory for it."""
    size = sum(p.numel() for p in model.parameters())
    return any(isinstance(m, Norm) for m in model.modules()) and size <= LARGEST


def redrawn(draws: int, only: str) -> None:
    """Print how far folded models are from float32 in bfloat16, relative to the unfolded ones.

    The geometric mean over draws of all parameters, others than that of `examine`, and its 95 % interval.
    """
    print("| architecture | bf16, then folded | folded, then bf16 |\n|---|---|---|")
    for source, name, build in architectures():
        if only not in f"{source}/{name}" or not examined(build()[0]):
            continue
        rows = [row for seed in range(1, draws + 1) if (row := _drawn(build, seed)) is not None]
        cells = ["torch cannot compute it in bfloat16"] * 2
        if rows:
            ratios = [mean_interval([math.log(row[way] / row[0]) for row in rows]).map(math.exp) for way in (1, 2)]
            cells = [f"{ratio.estimate:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios]
        print(f"| {source}/{name} | {' | '.join(cells)} |", flush=True)


def _drawn(build: Callable[[], tuple[nn.Module, dict[str, Any]]], seed: int) -> list[float] | None:
    """`in_half_precision` of one draw."""
    torch.manual_seed(seed)
    model, inputs = build()
    used(model, inputs, seed).eval()
    return in_half_precision(model, bn.fold(model, inputs), inputs)


def timed(repeats: int) -> str:
    """A few of torchvision's, in turn."""
    heads = ["architecture", "inference, ms", "folded, ms", "ratio", "training step, ms", "converted, ms", "fused, ms"]
    lines = [f"| {' | '.join([*heads, 'ratio'])} |", f"|{'---|' * (len(heads) + 1)}"]
    for name in TIMED:
        x = images(128, batch=8)
        model = used(library("torchvision.models").get_model(name, weights=None), {"x": x}).eval()
        folded = bn.fold(model, x)
        with torch.no_grad():
            before, after = _medians([partial(m, x) for m in (model, folded)], repeats)
        models = [
            copy.deepcopy(model).train(),
            bn.convert(copy.deepcopy(model)).train(),
            bn.fuse(copy.deepcopy(model)).train(),
        ]
        steps = _medians([partial(_train, m, x) for m in models], repeats)
        cells = [f"{1e3 * t:.0f}" for t in (before, after)] + [f"{before / after:.2f}"]
        cells += [f"{1e3 * t:.0f}" for t in steps] + [f"{steps[0] / steps[2]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _train(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def _medians(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, in turn."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for times, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            if turn:  # the first warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def main() -> None:
    """Examine what is not examined yet, and print the tables."""
    parser = argparse.ArgumentParser(description="surgery on many architectures")
    parser.add_argument("--json", type=Path, help="where results are kept; what is there is not done again")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no other model after these")
    parser.add_argument("--threads", type=int, default=1, help="of torch, where nothing is timed")
    parser.add_argument(
        "--counts", action="store_true", help="only what becomes of the layers: a small part of the time"
    )
    parser.add_argument("--time", action="store_true", help="measure times instead")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns")
    parser.add_argument("--draws", type=int, default=0, help="compare errors in bfloat16 for so many draws instead")
    options = parser.parse_args()
    if options.time:
        print(timed(options.repeats))
        return
    torch.set_num_threads(options.threads)
    if options.draws:
        redrawn(options.draws, options.only)
        return
    results: dict[str, Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    end = time.perf_counter() + options.seconds
    for source, name, build in architectures():
        key = f"{source}/{name}"
        if key in results or options.only not in key:
            continue
        if time.perf_counter() > end:
            break
        torch.manual_seed(0)
        model, inputs = build()
        if not examined(model):
            continue
        try:
            results[key] = (count if options.counts else examine)(model, inputs)
        except Exception as error:
            results[key] = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"}
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    columns: Collection[str] = COUNTS if options.counts else COLUMNS
    print(f"torch {torch.__version__}, {bn.kernels()[0].implementation}\n\n{table(results, columns)}\n")
    print(summary(results, counts_only=options.counts))


if __name__ == "__main__":
    main()
