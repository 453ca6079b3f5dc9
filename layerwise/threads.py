"""Threads without which their process is of no use: if one dies of an exception, the process ends and says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class VitalThread(threading.Thread):
    """A thread that the rest of its process waits for. What it does not catch itself is a bug, heard by `DeathWatch`."""


class DeathWatch:
    """While open, ``on_death(error)`` is called for every exception that ends a `VitalThread`, on that thread.

    A process half of which has died would look alive to everybody and answer nobody. Other threads, such as those of a
    user's own code, are left to Python's own hook. One at a time in a process.
    """

    def __init__(self, on_death: Callable[[Exception], None]) -> None:
        self._on_death = on_death
        self._before = threading.excepthook

    def __enter__(self) -> DeathWatch:
        self._before, threading.excepthook = threading.excepthook, self._hear
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        threading.excepthook = self._before

    def _hear(self, args: threading.ExceptHookArgs) -> None:
        self._before(args)
        if isinstance(args.thread, VitalThread) and isinstance(args.exc_value, Exception):
            self._on_death(args.exc_value)
