"""Showing a job while it trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from layerwise.client import JobEvent

LONGEST_SILENCE_SECONDS = 10.0
SHORTEST_SILENCE_SECONDS = 1.0
LINE_FRACTION = 0.1


class ProgressView(Protocol):
    """A `layerwise.follow.Watcher` that can also say something, and be closed."""

    def on_event(self, event: JobEvent) -> None:
        """The job wrote a line to its log."""
        ...

    def on_document(self, document: dict[str, Any]) -> None:
        """The job as it is now."""
        ...

    def note(self, text: str) -> None:
        """A line of the command's own, about what is as it should be."""
        ...

    def say(self, text: str) -> None:
        """A line of the command's own that must be seen."""
        ...

    def close(self) -> None:
        """Leave the last state standing."""
        ...


def progress_view(stream: TextIO, *, quiet: bool = False) -> ProgressView:
    """The bar when ``stream`` is a terminal, lines otherwise; with ``quiet`` only warnings and errors."""
    if stream.isatty() and not quiet:
        return ProgressBar(stream)
    return ProgressLines(stream, quiet=quiet)


class ProgressLines:
    """A line for each event, for the first update seen, for each tenth of the job, and after some seconds without a line."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._shown_steps = 0
        self._shown_at: float | None = None

    def on_event(self, event: JobEvent) -> None:
        """Print it."""
        if event.level != "info":
            self._print(f"{event.level}: {event.message}")
        elif not self._quiet:
            self._print(event.message)

    def on_document(self, document: dict[str, Any]) -> None:
        """Print the figures when enough has happened since the last time."""
        steps, total = document.get("steps") or 0, document.get("total_steps") or 0
        if document.get("state") in ("queued", "preparing"):
            self._shown_steps = steps  # before it was resumed
        if self._quiet or steps <= self._shown_steps:
            return
        silence = math.inf if self._shown_at is None else time.monotonic() - self._shown_at
        tenth = steps - self._shown_steps >= max(1.0, total * LINE_FRACTION)
        due = silence >= LONGEST_SILENCE_SECONDS or steps == total
        if not due and not (tenth and silence >= SHORTEST_SILENCE_SECONDS):
            return
        self._shown_steps, self._shown_at = steps, time.monotonic()
        self._print(describe(document))

    def note(self, text: str) -> None:
        """Print it, unless quiet."""
        if not self._quiet:
            self._print(text)

    def say(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def close(self) -> None:
        """Nothing is left open."""

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class ProgressBar:
    """A bar with loss, speed, staleness and time left under the lines of the events."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        # Where the terminal is narrow, the bar shrinks and the numbers stay.
        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", markup=False),
            console=Console(file=stream, stderr=False, highlight=False),
            refresh_per_second=8,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None, figures="")
        self._progress.start()

    def on_event(self, event: JobEvent) -> None:
        """Print it above the bar."""
        styles = {"warning": "yellow", "error": "red"}
        self._print(event.message, styles.get(event.level, "dim"))

    def on_document(self, document: dict[str, Any]) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            description=str(document.get("state", "")),
            completed=document.get("steps") or 0,
            total=document.get("total_steps"),
            figures="  ".join(_figures(document)),
        )

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._print(text, "dim")

    def say(self, text: str) -> None:
        """Print it above the bar."""
        self._print(text, None)

    def close(self) -> None:
        """Stop the live display."""
        self._progress.stop()

    def _print(self, text: str, style: str | None) -> None:
        self._progress.console.print(text, style=style, markup=False, soft_wrap=True)


def describe(document: Mapping[str, Any]) -> str:
    """One line: step, loss, speed, staleness, time left."""
    steps, total = document.get("steps") or 0, document.get("total_steps")
    where = f"step {steps}" + (f"/{total}" if total else "")
    return "  ".join([where, *_figures(document)])


def seconds_left(document: Mapping[str, Any]) -> float | None:
    """Training time left at the speed so far; None while there is no speed."""
    speed, samples, total = (document.get(key) for key in ("samples_per_second", "samples", "total_samples"))
    if not speed or total is None or samples is None:
        return None
    return max(0.0, float(total - samples) / float(speed))


def format_seconds(seconds: float) -> str:
    """``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(document: Mapping[str, Any]) -> list[str]:
    found = []
    if (loss := document.get("train_loss")) is not None:
        found.append(f"loss {loss:.4f}")
    if speed := document.get("samples_per_second"):
        found.append(f"{speed:.1f} samples/s")
    staleness = document.get("staleness") or {}
    if staleness.get("mean") is not None and document.get("steps"):
        found.append(f"staleness {staleness['mean']:.2f} (max {staleness.get('max') or 0})")
    if left := seconds_left(document):
        found.append(f"{format_seconds(left)} left")
    return found
