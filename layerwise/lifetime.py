"""When a service process ends: a signal, or the end of the parent that started it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys


class Lifetime:
    """Sets ``ended`` on SIGTERM or SIGINT, and with ``exit_with_parent`` also when standard input reaches its end.

    A parent that starts services passes each a pipe as standard input and keeps the other end open; however the parent dies, the kernel
    closes the pipe. Used from the event loop's thread only.
    """

    def __init__(self, *, exit_with_parent: bool) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self._loop = asyncio.get_running_loop()
        self._watches_parent = exit_with_parent
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.end, f"received {number.name}")
        if exit_with_parent:
            os.set_blocking(sys.stdin.fileno(), False)
            self._loop.add_reader(sys.stdin.fileno(), self._on_stdin)

    def end(self, reason: str) -> None:
        """End now; the first reason stands."""
        self.reason = self.reason or reason
        self.ended.set()

    def close(self) -> None:
        """Give back the signals and standard input."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
        if self._watches_parent:
            self._loop.remove_reader(sys.stdin.fileno())

    def _on_stdin(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), 4096)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(sys.stdin.fileno())
            self._watches_parent = False
            self.end("the parent process ended")
