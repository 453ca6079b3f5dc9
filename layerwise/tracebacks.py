"""Tracebacks of what a role could not do: users are told a sentence, ``--debug`` has the rest in the process's log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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


def log_ends(folder: Path) -> dict[int, int]:
    """How long each log file in ``folder`` is by now, by inode: one that gives way to another and comes back is known again."""
    found = [path.stat() for path in folder.glob("*.log")]
    return {one.st_ino: one.st_size for one in found}


def logs_with_tracebacks(folder: Path, ends: Mapping[int, int]) -> tuple[Path, ...]:
    """The log files in ``folder`` that hold one behind their ``ends`` of before, by name."""
    return tuple(
        path for path in sorted(folder.glob("*.log")) if HEAD in path.read_bytes()[ends.get(path.stat().st_ino, 0) :]
    )
