from __future__ import annotations

import io
from typing import Any

import pytest

from layerwise.client import JobEvent
from layerwise.progress import ProgressBar, ProgressLines, describe, format_seconds, progress_view, seconds_left


def document(**changes: Any) -> dict[str, Any]:
    return {
        "state": "running",
        "steps": 50,
        "total_steps": 100,
        "samples": 1600,
        "total_samples": 3200,
        "samples_per_second": 40.0,
        "train_loss": 1.23456,
        "staleness": {"mean": 0.75, "max": 2},
        **changes,
    }


def event(message: str, level: str = "info") -> JobEvent:
    return JobEvent(offset=0, time=0.0, level=level, message=message, fields={})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_loss_speed_staleness_and_time_left() -> None:
    assert describe(document()) == "step 50/100  loss 1.2346  40.0 samples/s  staleness 0.75 (max 2)  0:40 left"


def test_what_is_not_known_yet_is_left_out() -> None:
    early = document(
        steps=0, total_steps=None, samples_per_second=None, train_loss=None, staleness={"mean": None, "max": None}
    )
    assert describe(early) == "step 0"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3600 * 2 + 184, "2:03:04")])
def test_seconds_read_as_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_time_left_is_never_negative() -> None:
    assert seconds_left(document(samples=4000)) == 0.0


def test_lines_come_at_tenths_and_not_for_every_document() -> None:
    stream = io.StringIO()
    lines = ProgressLines(stream)
    for steps in range(101):
        lines.on_document(document(steps=steps))
    shown = stream.getvalue().splitlines()
    assert shown[-1].startswith("step 100/100")
    assert len(shown) <= 11


def test_a_repeated_document_is_shown_once() -> None:
    stream = io.StringIO()
    lines = ProgressLines(stream)
    for _ in range(3):
        lines.on_document(document(steps=100, state="done"))
    assert len(stream.getvalue().splitlines()) == 1


def test_a_resumed_job_is_shown_with_its_first_update_from_there() -> None:
    stream = io.StringIO()
    lines = ProgressLines(stream)
    for state, steps in (("queued", 16), ("preparing", 16), ("running", 16), ("running", 17), ("running", 18)):
        lines.on_document({"state": state, "steps": steps, "total_steps": 1000})
    assert stream.getvalue() == "step 17/1000\n"


def test_who_follows_a_job_that_trains_sees_at_once_how_far_it_is() -> None:
    stream = io.StringIO()
    ProgressLines(stream).on_document({"state": "running", "steps": 16, "total_steps": 1000})
    assert stream.getvalue() == "step 16/1000\n"


def test_quiet_still_shows_warnings() -> None:
    stream = io.StringIO()
    lines = ProgressLines(stream, quiet=True)
    lines.on_event(event("training begins"))
    lines.on_document(document(steps=100))
    lines.on_event(event("forward worker forward-0 was lost", "warning"))
    assert stream.getvalue() == "warning: forward worker forward-0 was lost\n"


def test_a_terminal_gets_a_bar_and_a_file_gets_lines() -> None:
    bar = progress_view(Terminal())
    assert isinstance(bar, ProgressBar)
    bar.close()
    assert isinstance(progress_view(io.StringIO()), ProgressLines)
    assert isinstance(progress_view(Terminal(), quiet=True), ProgressLines)


def test_the_bar_shows_the_same_figures_and_takes_markup_literally() -> None:
    terminal = Terminal()
    bar = ProgressBar(terminal)
    bar.on_event(event("layer [bold] is odd", "warning"))
    bar.on_document(document())
    bar.say("stopping")
    bar.close()
    shown = terminal.getvalue()
    assert "layer [bold] is odd" in shown
    assert "stopping" in shown
    assert "loss 1.2346" in shown


def test_a_narrow_terminal_still_shows_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    bar = ProgressBar(terminal)
    bar.on_document(document(samples_per_second=1290.7, steps=145, total_steps=345))
    bar.close()
    shown = terminal.getvalue()
    assert "145/345" in shown
    assert "loss 1.2346  1290.7 samples/s  staleness 0.75 (max 2)  0:01 left" in shown
