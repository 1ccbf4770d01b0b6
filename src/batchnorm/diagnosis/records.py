"""What a monitor writes down of one layer in one step, and its form in a file: one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

VERSION = 1  # of the lines; what a reader does not know of, it refuses


class Spread(NamedTuple):
    """How a quantity is spread over a layer's channels; of those where it is finite."""

    min: float
    lower_quartile: float
    median: float
    upper_quartile: float
    max: float


@dataclass(frozen=True)
class LayerRecord:
    """One layer in one step. Running statistics are those after the step's forward pass, parameters before its update.

    None is what there is not: no affine parameters, no running statistics, no gradient, no record before this one.

    Attributes:
        step: the number of the step, from 1.
        layer: its path in the model; "" is the model itself.
        channels: the number of channels, C.
        calls: how often the forward pass called it; its batch is all that came in.
        count: values of each channel in the batch; a float where a mask weighed them.
        batch_mean: of the batch, in the activations' unit.
        batch_var: the batch's biased variance, in the activations' unit squared.
        running_mean: the running mean.
        running_var: the running variance.
        shift: (batch_mean - running_mean) / sqrt(running_var + eps): how far the batch is from the running statistics.
        log_variance_ratio: log((unbiased batch_var + eps) / (running_var + eps)).
        drift: (running_mean - before) / sqrt(running_var before + eps), since the record before.
        log_variance_drift: log((running_var + eps) / (running_var before + eps)), since the record before.
        noise: the distance of this batch's mean to the last recorded one's, in multiples of what the square-root law
            allows for independent values: the root of the mean over channels of
            (mean - before)^2 / (var / count + var before / count before). About 1 where values are independent and the
            weights stand still; more where values of a sample, or samples of a batch, are alike.
        weight: gamma.
        bias: beta.
        weight_gradient: the L2 norm of gamma's gradient, as the optimizer's step left it.
        bias_gradient: of beta's.
        dead: the share of channels that pass nothing on: gamma is 0; or nothing above 0 came out in this batch and the
            gradients of gamma and beta are exactly 0, as behind a ReLU.
        effective_learning_rate: lr / |w|^2 of the weight w of the linear layer before: batch norm takes w's scale away,
            so steps turn it by so much. For steps in proportion to the gradient, as SGD's.
        non_finite: how many channels' batch statistics are not finite.
        skipped: of ours, how many batches the running statistics of a channel skipped because of that, the most of all
            channels.
    """

    step: int
    layer: str
    channels: int
    calls: int
    count: int | float
    batch_mean: Spread | None
    batch_var: Spread | None
    running_mean: Spread | None
    running_var: Spread | None
    shift: Spread | None
    log_variance_ratio: Spread | None
    drift: Spread | None
    log_variance_drift: Spread | None
    noise: float | None
    weight: Spread | None
    bias: Spread | None
    weight_gradient: float | None
    bias_gradient: float | None
    dead: float | None
    effective_learning_rate: float | None
    non_finite: int
    skipped: int | None

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Names and numbers, as curves are drawn of them; of spreads min, median and max."""
        for name in QUANTITIES:
            value = getattr(self, name)
            if isinstance(value, Spread):
                yield from ((f"{name}/{which}", getattr(value, which)) for which in ("min", "median", "max"))
            elif value is not None:
                yield name, value

    def to_json(self, run: str) -> str:
        """One line: an object with "version", "run" and the attributes, spreads as lists; numbers have six digits.

        Args:
            run: what distinguishes this training run from others in the same file.
        """
        values = {field.name: _rounded(getattr(self, field.name)) for field in fields(self)}
        return json.dumps({"version": VERSION, "run": run} | values, allow_nan=False)


SPREADS = tuple(field.name for field in fields(LayerRecord) if str(field.type).startswith("Spread"))
NUMBERS = ("noise", "weight_gradient", "bias_gradient", "dead", "effective_learning_rate", "non_finite", "skipped")
QUANTITIES = tuple(field.name for field in fields(LayerRecord) if field.name in {*SPREADS, *NUMBERS})


def from_json(line: str) -> tuple[str, LayerRecord]:
    """A line's run and record.

    Raises:
        ValueError: it is not such a line.
    """
    content = json.loads(line)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"it is not an object of version {VERSION}")
    names = [field.name for field in fields(LayerRecord)]
    if missing := [name for name in ("run", *names) if name not in content]:
        raise ValueError(f"it has no {missing[0]}")
    values: dict[str, Any] = {name: content[name] for name in names}
    for name in names:
        if not _fits(name, values[name]):
            raise ValueError(f"its {name} is {json.dumps(values[name])[:100]}")
    if not isinstance(content["run"], str):
        raise ValueError("its run is not a string")
    spreads = {name: Spread(*values[name]) for name in SPREADS if values[name] is not None}
    return content["run"], LayerRecord(**values | spreads)


def _rounded(value: Any) -> Any:  # noqa: ANN401 - of the same type
    """Numbers that are not counted, to six digits: a third of the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(number) for number in value] if isinstance(value, Spread) else value


def _fits(name: str, value: object) -> bool:
    """Whether a value can be an attribute of that name."""
    if name == "layer":
        return isinstance(value, str)
    if name in SPREADS:
        return value is None or (
            isinstance(value, list) and len(value) == len(Spread._fields) and all(map(_number, value))
        )
    return _number(value) or (value is None and name in NUMBERS)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
