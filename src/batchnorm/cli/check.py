"""`batchnorm check`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from torch import nn

import batchnorm
from batchnorm.cli.options import COUNT, FILE, number_of_bytes
from batchnorm.cli.output import say
from batchnorm.diagnosis.finding import SEVERITIES, Severity
from batchnorm.errors import UsageError
from batchnorm.files import check_writable, write_text, writing
from batchnorm.loading.data import load_data
from batchnorm.loading.loss import Loss, load_loss
from batchnorm.loading.model import load_model
from batchnorm.loading.object_reference import blaming
from batchnorm.loading.state_dict import (
    SUFFIXES,
    check_state_dict,
    check_state_dict_path,
    read_state_dict,
    save_state_dict,
)
from batchnorm.population.batches import default_forward

if TYPE_CHECKING:
    from batchnorm.diagnosis.report import Report

FAIL_ON: dict[str, Severity | None] = {**{severity: severity for severity in SEVERITIES}, "never": None}


def _codes(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [code.strip().upper() for code in value.split(",")]


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--weights", type=FILE, metavar="FILE", help="Weights to examine, instead of MODEL's own.")
@click.option("--data", metavar="DATA", help="Batches to examine the statistics with.")
@click.option("--second", metavar="DATA", help="Other batches, such as of deployment, to compare with --data.")
@click.option("--loss", metavar="LOSS", help="A function of torch.nn.functional, such as cross_entropy, or a callable.")
@click.option("--html", type=FILE, metavar="FILE", help="Write the report there, as one HTML file.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write every number there.")
@click.option(
    "--select", callback=_codes, metavar="CODES", help="Run only these checks, such as BN301,BN1: all that begin so."
)
@click.option("--ignore", callback=_codes, metavar="CODES", help="Leave these checks out, as in --select.")
@click.option(
    "--fail-on",
    type=click.Choice(list(FAIL_ON)),
    default="error",
    show_default=True,
    help="The lowest severity that makes the exit code 1.",
)
@click.option("--fix", is_flag=True, help="Fix what is safe to fix, and check again; needs --output.")
@click.option("--output", type=FILE, metavar="FILE", help="Write the fixed weights there.")
@click.option("--batch-size", type=COUNT, metavar="N", help="Batch size of .npz files; 32 by default.")
@click.option(
    "--memory-limit",
    callback=number_of_bytes,
    metavar="BYTES",
    help="For suspended passes, such as 2GB; by default half of what is free.",
)
@click.pass_context
def check(context: click.Context, /, model: str | None, fail_on: str, output: Path | None, **options: Any) -> None:  # noqa: ANN401 - what click makes of the other options
    """Say what is wrong with MODEL's batch norm, where, by how much, and what to type.

    MODEL is package.module:callable or path/file.py:callable, and returns the model; or a file of weights, .safetensors
    or .pt, of which the state alone is examined. DATA is such a callable that returns batches, or a .npz file with x
    and, for --loss, y. Without MODEL: a small network with faults.

    Exit code 1: there are findings at or above --fail-on.
    """
    from batchnorm.diagnosis.catalogue import selected
    from batchnorm.diagnosis.document import document
    from batchnorm.diagnosis.tables import done
    from batchnorm.report.page import page

    html, json_file, fix = options["html"], options["json_file"], options["fix"]
    _check_options(model, output, options)
    selected(options["select"], options["ignore"])
    for file in filter(None, (html, json_file)):
        check_writable(file)
    if output is not None:
        check_state_dict_path(output)
    net, report = _examined(model, options, output)
    if fix:
        fixes, report = report.fix()
        _show(done(fixes))
        say("")
        assert output is not None
        assert net is not None
        save_state_dict(net, output)
    _show(report)
    if json_file is not None:
        with writing(json_file):
            report.to_json(json_file)
    if html is not None:
        facts = [("batchnorm", batchnorm.__version__)]
        content = page(document(report, command=_command(model, fail_on, output, options), facts=facts))
        with writing(html):
            write_text(html, content)
    threshold = FAIL_ON[fail_on]
    if threshold is not None and report.at_least(threshold):
        context.exit(1)


def _check_options(model: str | None, output: Path | None, options: dict[str, Any]) -> None:
    """What does not go together."""
    given = [name for name in ("weights", "data", "second", "loss") if options[name] is not None]
    if model is None and given:
        raise UsageError(f"got --{given[0]} without MODEL; it goes with a model of yours. Name it first")
    if model is not None and _of_weights(model) and (given or options["fix"]):
        raise UsageError(
            f"got {'--' + given[0] if given else '--fix'} and MODEL {model}, a file of weights; it needs the model. "
            f"Name what returns it, and give the file as --weights"
        )
    if options["fix"] != (output is not None):
        raise UsageError("got one of --fix and --output; they go together: --fix --output FILE")
    without_data = [name for name in ("second", "loss") if options[name] is not None and options["data"] is None]
    if without_data:
        raise UsageError(f"got --{without_data[0]} without --data; it goes with batches. Give --data DATA too")


def _of_weights(model: str) -> bool:
    return model.endswith(SUFFIXES)


def _examined(model: str | None, options: dict[str, Any], output: Path | None) -> tuple[nn.Module | None, Report]:
    """The model, if there is one, and what is found in it."""
    from rich.console import Console

    from batchnorm.diagnosis.check import check as examine
    from batchnorm.diagnosis.check import check_state_dict as examine_state_dict
    from batchnorm.diagnosis.example import example
    from batchnorm.report import text

    codes = {name: options[name] for name in ("select", "ignore")}
    if model is not None and _of_weights(model):
        return None, examine_state_dict(_weights(Path(model)), **codes)
    net: nn.Module
    batches: Iterable[Any] | None
    loss: Loss | None
    if model is None:
        net, batches, loss = example()
        second = None
    else:
        net = load_model(model, options["weights"])
        batches, second = (_batches(options[name], options["batch_size"]) for name in ("data", "second"))
        loss = None if options["loss"] is None else load_loss(options["loss"])
    if output is not None:
        check_state_dict(net, output)

    def forward(module: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - batches are of any type
        with blaming("the model"):
            return default_forward(module, batch)

    with text.following(Console(stderr=True), "check") as follow:
        report = examine(
            net,
            batches,
            second=second,
            forward=forward,
            loss=loss,
            memory_limit=options["memory_limit"],
            progress=follow,
            **codes,
        )
    return net, report


def _batches(reference: str | None, batch_size: int | None) -> Iterable[Any] | None:
    return None if reference is None else load_data(reference, batch_size=batch_size)


def _weights(path: Path) -> dict[str, Any]:
    """A file's state_dict; that of a checkpoint is one level down."""
    state = read_state_dict(path)
    if not any(isinstance(name, str) and name.rpartition(".")[2] == "running_mean" for name in state):
        names = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise UsageError(
            f"got {path}, which has no running_mean of any layer; it begins with {names}. Give a state_dict"
        )
    return dict(state)


def _show(part: Any) -> None:  # noqa: ANN401 - a report, or a table
    """Print: to a terminal in colour and as wide as it is, to a file in lines as long as they are."""
    from rich.console import Console

    from batchnorm.diagnosis.printing import plain, show

    if sys.stdout.isatty():
        show(part, Console())
    else:
        say(plain(part))


def _command(model: str | None, fail_on: str, output: Path | None, options: dict[str, Any]) -> str:
    """The command line, for the page."""
    parts = ["batchnorm", "check", *([] if model is None else [model])]
    for name in ("weights", "data", "second", "loss", "html", "batch_size", "memory_limit"):
        if options[name] is not None:
            parts += [f"--{name.replace('_', '-')}", str(options[name])]
    for name in ("select", "ignore"):
        if options[name] is not None:
            parts += [f"--{name}", ",".join(options[name])]
    parts += [] if fail_on == "error" else ["--fail-on", fail_on]
    return shlex.join([*parts, *(["--fix", "--output", str(output)] if output is not None else [])])
