"""Tracebacks of what a role could not do: users are told a sentence, ``--debug`` has the rest in the process's log."""

from __future__ import annotations

import logging
from pathlib import Path

from layerwise.errors import LayerwiseError

HEAD = b"Traceback (most recent call last)"

log = logging.getLogger(__name__)


def show_tracebacks() -> None:
    """Have `log_traceback` log in this process, whatever else is logged."""
    log.setLevel(logging.DEBUG)


def log_traceback(what: str, error: BaseException) -> None:
    """Log where ``error`` was raised, unless it is a sentence of our own, which says all, with no other error behind it."""
    if not isinstance(error, LayerwiseError) or error.__cause__ is not None:
        log.debug("%s", what, exc_info=error)


def logs_with_tracebacks(folder: Path) -> tuple[Path, ...]:
    """The log files in ``folder`` that hold one, by name."""
    return tuple(path for path in sorted(folder.glob("*.log")) if HEAD in path.read_bytes())
