"""The tables of benchmarks/surgery.py, in Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

STEP = 1e-5  # relative; both are float64, so that it tells another result from rounding
FOLDED = 1e-4  # float32, relative to the output's largest value
NO_WORSE = 1.05  # of two errors that are rounding, either is the larger by chance

Row = dict[str, Any]


def failures(row: Row) -> list[str]:
    """What is not as it should be."""
    found = []
    if not row["bits"]:
        found.append("state or classes differ after reverting")
    found += [f"{k} {row[k]:.0e}" for k in ("step", "fused step") if not row[k] <= STEP]
    if not row["fold"] <= FOLDED:
        found.append(f"fold {row['fold']:.0e}")
    if row["bfloat16"] is not None:
        before, *folded = row["bfloat16"]
        if not min(folded) <= NO_WORSE * before:
            found.append(f"bfloat16 {min(folded):.1e} for {before:.1e}")
    return found


def total(row: Row, key: str, *beginnings: str) -> int:
    """How many layers a row counts under names that begin like this."""
    return sum(n for name, n in row[key].items() if name.startswith(beginnings))


def _halves(row: Row) -> list[str]:
    return ["-"] * 3 if row["bfloat16"] is None else [f"{e:.1e}" for e in row["bfloat16"]]


# What `table` says of an architecture; with --counts only what is known without training steps and half precision.
COLUMNS: dict[str, Callable[[Row], object]] = {
    "layers": lambda row: row["layers"],
    "ours": lambda row: row["converted"],
    "step": lambda row: f"{row['step']:.0e}",
    "act": lambda row: total(row, "fused", "with") - total(row, "fused", "with the addition"),
    "add": lambda row: total(row, "fused", "with the addition") - total(row, "fused", "with the addition and"),
    "add, act": lambda row: total(row, "fused", "with the addition and"),
    "fused step": lambda row: f"{row['fused step']:.0e}",
    "part of": lambda row: total(row, "folded", "part"),
    "alone": lambda row: total(row, "folded", "a scale"),
    "left": lambda row: row["left"],
    "fold": lambda row: f"{row['fold']:.0e}",
    "bf16": lambda row: _halves(row)[0],
    "then folded": lambda row: _halves(row)[1],
    "folded, then bf16": lambda row: _halves(row)[2],
    "biases": lambda row: row["biases"],
    "not as it should be": lambda row: "; ".join(failures(row)),
}
COUNTS = ("layers", "ours", "act", "add", "add, act", "part of", "alone", "left", "fold", "biases")


def table(results: dict[str, Row], columns: Collection[str]) -> str:
    """Every architecture."""
    lines = [f"| {' | '.join(['architecture', *columns])} |", f"|{'---|' * (1 + len(columns))}"]
    for name, row in results.items():
        if "error" in row:
            cells = [row["error"], *[""] * (len(columns) - 1)]
        else:
            cells = [str(COLUMNS[head](row)) for head in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def summary(results: dict[str, Row], *, counts_only: bool) -> str:
    """By library; then the reasons."""
    heads = ["library", "models", "layers", "ours", "fused", "part of another", "scale and shift", "left", "worst fold"]
    if not counts_only:
        heads += ["worst step", "worst fused step", "bf16, then folded", "folded, then bf16"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for source in dict.fromkeys(name.partition("/")[0] for name in results):
        rows = [r for name, r in results.items() if name.startswith(source) and "error" not in r]
        if not rows:
            continue
        cells = [len(rows), sum(r["layers"] for r in rows), sum(r["converted"] for r in rows)]
        cells += [sum(total(r, "fused", "with") for r in rows)]
        cells += [sum(total(r, "folded", "part") for r in rows), sum(total(r, "folded", "a scale") for r in rows)]
        cells += [sum(r["left"] for r in rows)]
        keys = ("fold",) if counts_only else ("fold", "step", "fused step")
        worst = [f"{max(r[key] for r in rows):.0e}" for key in keys]
        half = [] if counts_only else [_ratios(rows, way) for way in (1, 2)]
        lines.append(f"| {source} | {' | '.join(map(str, [*cells, *worst, *half]))} |")
    for key in ("fused", "folded"):
        reasons: Counter[str] = Counter()
        for row in results.values():
            reasons.update(row.get(key, {}))
        lines += ["", f"| {key} | layers |", "|---|---|", *(f"| {what} | {n} |" for what, n in reasons.most_common())]
    return "\n".join(lines)


def _ratios(rows: list[Row], way: int) -> str:
    """Errors in bfloat16, relative to the unfolded model's."""
    ratios = [r["bfloat16"][way] / r["bfloat16"][0] for r in rows if r["bfloat16"] is not None]
    even = sum(ratio <= NO_WORSE for ratio in ratios)
    return f"{statistics.median(ratios):.2f}, no worse in {even} of {len(ratios)}"
