"""When a service process ends: a signal, or the end of the parent that started it; and its signs of life until then."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys

BEAT = b"."
READY = b"+"
"""What a spare process says once it can take a task."""
BEAT_SECONDS = 1.0


class Lifetime:
    """Sets ``ended`` on SIGTERM or SIGINT, and with ``exit_with_parent`` also when standard input reaches its end.

    A parent that starts services passes each a pipe or one end of a socket pair as standard input and keeps the other
    end open; however the parent dies, the kernel closes it. Through a socket the parent also gets a byte a second as
    long as the event loop runs. Used from the event loop's thread only.
    """

    def __init__(self, *, exit_with_parent: bool) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self._loop = asyncio.get_running_loop()
        self._watches_parent = exit_with_parent
        self._next_beat: asyncio.TimerHandle | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.end, f"received {number.name}")
        if exit_with_parent:
            self._parent = sys.stdin.fileno()
            os.set_blocking(self._parent, False)
            self._loop.add_reader(self._parent, self._on_stdin)
            if stat.S_ISSOCK(os.fstat(self._parent).st_mode):
                self._beat()

    def end(self, reason: str) -> None:
        """End now; the first reason stands."""
        self.reason = self.reason or reason
        self.ended.set()

    def close(self) -> None:
        """Give back the signals and standard input."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
        self._leave_parent()

    def _beat(self) -> None:
        try:
            os.write(self._parent, BEAT)
        except BlockingIOError:
            pass  # the parent has not read for minutes; what it finds then is enough
        except (BrokenPipeError, ConnectionResetError):
            return  # the reader of standard input hears of it too
        self._next_beat = self._loop.call_later(BEAT_SECONDS, self._beat)

    def _on_stdin(self) -> None:
        try:
            data = os.read(self._parent, 4096)
        except BlockingIOError:
            return
        except ConnectionResetError:  # a socket whose other end was closed with beats unread
            data = b""
        if not data:
            self._leave_parent()
            self.end("the parent process ended")

    def _leave_parent(self) -> None:
        if self._next_beat is not None:
            self._next_beat.cancel()
        if self._watches_parent:
            self._loop.remove_reader(self._parent)
            self._watches_parent = False
