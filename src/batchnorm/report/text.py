"""Reports in a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import rich.box
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.report.document import Outcome, Section, Table, shown

_TICK = 0.25  # seconds from one look at the time left to the next
_LINES = 10.0  # seconds from one line to the next, at first
STYLES: dict[Outcome, str] = {"yes": "bold green", "no": "bold red", "open": "bold yellow", "note": "bold blue"}


def table(content: Table) -> Group:
    """`content` as rich can print it, below its caption. Cells are taken literally, brackets included."""
    content = shown(content)
    drawn = RichTable(box=rich.box.SIMPLE_HEAD)
    drawn.show_edge, drawn.padding = False, (0, 1, 0, 0)
    widths = []
    for i, column in enumerate(content.columns):
        # As narrow as may be, for a terminal of 80 columns: headings break between words, cells do not.
        width = max(map(len, [*column.split(), *(row[i] for row in content.rows)]))
        drawn.add_column(Text(column), justify="left" if i == 0 else "right", width=width)
        widths.append(width + 1)
    drawn.width = sum(widths) + len(widths) - 1
    for row in content.rows:
        drawn.add_row(*map(Text, row))
    return Group(Text(content.caption, style="italic"), drawn)


def show(section: Section, console: Console) -> None:
    """Print the section's title, what became of its statements, its tables and its summary."""
    section = shown(section)
    console.print(Text(section.title, style="bold"))
    for row in section.judged:
        console.print(Text.assemble((row.verdict, STYLES[row.outcome]), f": {row.claim}"))
        console.print(Padding(Text(row.evidence), (0, 0, 0, 2)))
        if row.margin:
            console.print(Padding(Text(row.margin), (0, 0, 0, 2)))
    if section.judged:
        console.print()
    for content in section.tables:
        # Wider than the terminal, it breaks at the edge: rich would leave out what has no room.
        console.print(table(content), crop=False)
    for sentence in section.summary:
        console.print(Text(sentence))
        console.print()


@contextmanager
def progress(console: Console, label: str, work: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, gone at the end; nothing at all where `console` is no terminal.

    Args:
        console: where the bar is drawn.
        label: the words before it.
        work: how many units there are to do.

    Returns:
        A context whose value is a function to call with the number of units just done.
    """
    with _bar(console) as bar:
        task = bar.add_task(label, total=work)
        yield lambda done: bar.advance(task, done)


@contextmanager
def following(console: Console, label: str) -> Iterator[Callable[[int, int | None], None]]:
    """As `progress`, for work of which nobody knows at first how much there is.

    Args:
        console: where the bar is drawn.
        label: the words before it.

    Returns:
        A context whose value is a function to call with the units done so far, and how many there are, or None.
    """
    with _bar(console) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, work: bar.update(task, completed=done, total=work)


@contextmanager
def time_left(console: Console, label: str, now: Callable[[], tuple[float, float] | None]) -> Iterator[None]:
    """Inside, what is done and the time left are shown, whether or not anything gets done meanwhile.

    In a terminal it is a bar, gone at the end. Elsewhere, in a log for instance, it is a line: one at once, one after
    ten seconds, and further ones after ten seconds or a tenth of the time that has passed, whichever is longer.

    Args:
        console: where it is shown.
        label: the words before it.
        now: the share that is done, from 0 to 1, and the seconds left; None where nothing is known yet. It is called
            in a thread.
    """
    stopped = threading.Event()

    def show(bar: Progress) -> None:
        task = bar.add_task(label, total=None, left="")
        started = due = time.monotonic()
        # Where nothing can be shown any more, the work goes on unseen.
        with suppress(OSError, ValueError):
            while not stopped.wait(0 if due == started else _TICK):
                known, passed = now(), time.monotonic() - started
                if known is None:
                    stopped.wait(_TICK)
                elif console.is_terminal:
                    bar.update(task, completed=known[0], total=1, left=in_words(known[1]))
                elif started + passed >= due:
                    console.print(f"{label}: {known[0]:.0%} done, {in_words(known[1])}", soft_wrap=True, markup=False)
                    due = started + passed + max(_LINES, passed / 10)

    with _bar(console, TextColumn("{task.fields[left]}")) as bar:
        thread = threading.Thread(target=show, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def in_words(seconds: float) -> str:
    """A time left, no closer than one can know it: "about 45 s left"."""
    if seconds < 90:
        return f"about {max(5 * round(seconds / 5), 5)} s left"
    return f"about {round(seconds / 60)} min left"


def _bar(console: Console, left: ProgressColumn | None = None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), left or TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
