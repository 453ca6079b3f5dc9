"""Where what decides about a run writes down what a user would want to know."""

from __future__ import annotations

from typing import Protocol


class Journal(Protocol):
    """The job's log."""

    def __call__(self, level: str, message: str, **fields: object) -> None:
        """Append a line."""
        ...
