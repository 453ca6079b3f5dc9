"""Following a job on the terminal: signals, progress, the result at the end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from layerwise.cli import exit_codes
from layerwise.cli.output import job_facts, print_facts, print_json
from layerwise.client import CoordinatorClient
from layerwise.errors import LayerwiseError
from layerwise.follow import JobFollower
from layerwise.progress import ProgressView, progress_view


@contextmanager
def signals_call(handler: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM call ``handler``; without effect in a thread that is not the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        handler()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[ProgressView]:
    """A view on standard error."""
    view = progress_view(sys.stderr, quiet=quiet)
    try:
        yield view
    finally:
        view.close()


def follow_job(
    client: CoordinatorClient,
    document: dict[str, Any],
    output: str,
    *,
    offset: int = 0,
    quiet: bool = False,
    timeout: float | None = None,
) -> int:
    """Show a cluster's job, by its ``document``, until it has ended, its events from ``offset`` on.

    An interrupt ends the showing only. With JSON, what was last seen of the job is printed however this ends. Returns
    the exit status.
    """

    def leave() -> None:
        raise KeyboardInterrupt

    job = str(document["job"])
    with shown_progress(quiet=quiet) as view, signals_call(leave):
        follower = JobFollower(client, job, view, offset=offset, refresh_seconds=0.5)
        try:
            document = follower.run(timeout=timeout)
        except KeyboardInterrupt:
            show_last(follower.document or document, output)
            view.say(
                f"job {job} goes on; follow it with `layerwise logs -f {job}`, stop it with `layerwise cancel {job}`"
            )
            return exit_codes.INTERRUPTED
        except LayerwiseError:
            show_last(follower.document or document, output)
            raise
    return show_result(document, output)


def show_last(document: dict[str, Any] | None, output: str) -> None:
    """Print what is known of a job whose end was not seen, for programs: people have seen its progress."""
    if output == "json" and document is not None:
        print_json(document)


def show_result(document: dict[str, Any], output: str, *, remedy: str = "") -> int:
    """Print a job that has ended; returns the exit status.

    Why it failed has been seen by whoever saw its events; standard error gets only that it did, and the ``remedy``.
    """
    if output == "json":
        print_json(document)
    else:
        print_facts(job_facts(document))
    state = str(document["state"])
    if state == "failed":
        click.echo(f"layerwise: job {document['job']} failed" + (f"; {remedy}" if remedy else ""), err=True)
    return exit_codes.of_state(state)
