"""The exit status of every way in which a command can end."""

from __future__ import annotations

from layerwise.errors import (
    ConfigError,
    DeadlineError,
    LayerwiseError,
    NotAllowedError,
    NotFoundError,
    OutOfMemoryError,
    UnreachableError,
)

DONE = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
NOT_ALLOWED = 5
CANCELLED = 6
OUT_OF_MEMORY = 7
TIMED_OUT = 124
INTERRUPTED = 130

_OF_ERROR: tuple[tuple[type[LayerwiseError], int], ...] = (
    (ConfigError, USAGE),
    (NotFoundError, NOT_FOUND),
    (NotAllowedError, NOT_ALLOWED),
    (UnreachableError, UNREACHABLE),
    (DeadlineError, TIMED_OUT),
    (OutOfMemoryError, OUT_OF_MEMORY),
)


def of_error(error: LayerwiseError) -> int:
    """For a command that ends with ``error``."""
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), FAILED)


def of_state(state: str) -> int:
    """For a command that followed a job to its end."""
    return {"done": DONE, "cancelled": CANCELLED}.get(state, FAILED)
