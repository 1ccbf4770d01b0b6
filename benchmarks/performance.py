"""The tables of docs/numbers/performance.md, from what `batchnorm bench --json FILE` wrote.

batchnorm bench --peers --json bench.json && python benchmarks/performance.py bench.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTENDERS = ("torch", "compile", "jax", "tensorflow")
OTHERS = CONTENDERS[1:]
Case = tuple[str, str]


def cases(document: dict[str, Any], dtype: str) -> dict[Case, dict[str, dict[str, float]]]:
    """Seconds by contender, by phase, by case."""
    found: dict[Case, dict[str, dict[str, float]]] = {}
    for row in document["rows"]:
        if row["dtype"] == dtype:
            case = f"({', '.join(map(str, row['shape']))})", row["layout"]
            found.setdefault(case, {})[row["phase"]] = row["seconds"]
    return found


def ratio(seconds: dict[str, float], contenders: Sequence[str]) -> float | None:
    """The fastest contender's time over ours."""
    there = [seconds[contender] for contender in contenders if contender in seconds]
    return min(there) / seconds["ours"] if there else None


def cell(value: float | None) -> str:
    """Two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def taking_part(document: dict[str, Any]) -> list[str]:
    """The contenders of a run."""
    return [contender for contender in CONTENDERS if any(contender in row["seconds"] for row in document["rows"])]


def table(document: dict[str, Any], dtype: str) -> str:
    """Every case: our times, and the others' over ours."""
    contenders = taking_part(document)
    heads = ["shape", "layout", "forward, ms", "x torch", "both, ms", *(f"x {contender}" for contender in contenders)]
    heads += ["floor", "inference, ms", "x torch"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for (shape, layout), phases in cases(document, dtype).items():
        forward, both, inference = (phases[phase] for phase in ("forward", "both", "inference"))
        values = [shape, layout, f"{1e3 * forward['ours']:.3f}", cell(ratio(forward, ["torch"]))]
        values += [f"{1e3 * both['ours']:.3f}", *(cell(ratio(both, [contender])) for contender in contenders)]
        values += [cell(both["ours"] / both["floor"])]
        values += [f"{1e3 * inference['ours']:.3f}", cell(ratio(inference, ["torch"]))]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def sentences(document: dict[str, Any], dtype: str) -> list[str]:
    """Geometric means and the least ratio, forward and backward."""
    found = []
    alone = taking_part(document)
    others = [contender for contender in OTHERS if contender in alone]
    best = [(f"the best of {', '.join(others)}", others)] if len(others) > 1 else []
    for name, contenders in [(contender, [contender]) for contender in alone] + best:
        ratios = {
            case: value
            for case, phases in cases(document, dtype).items()
            if (value := ratio(phases["both"], contenders)) is not None
        }
        if ratios:
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            worst = min(ratios, key=lambda case: ratios[case])
            below = sum(value < 1 for value in ratios.values())
            found.append(
                f"- against {name}: geometric mean {mean:.2f} over {len(ratios)} cases, least {ratios[worst]:.2f} at "
                f"{', '.join(worst)}; {below} below 1"
            )
    return found


def main(paths: Sequence[str]) -> None:
    """Print the tables of one file or more."""
    for path in paths:
        document = json.loads(Path(path).read_text())
        machine, versions = document["machine"], document["versions"]
        print(
            f"{machine['processor']}, {machine['threads']} threads, kernels {machine['kernels']}, torch "
            f"{versions['torch']}, {document['outputs']} outputs, {document['date'][:10]}.\n"
        )
        for dtype in dict.fromkeys(row["dtype"] for row in document["rows"]):
            print(f"### {dtype}, {document['outputs']} outputs\n\n{table(document, dtype)}\n")
            print("\n".join(sentences(document, dtype)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
