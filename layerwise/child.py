"""One service started as a child process: its log file, its end, its stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TAIL_BYTES = 4096
TAIL_LINES = 5


class ChildProcess:
    """``layerwise <arguments>`` as a child whose life ends with ours.

    The child leads a session of its own, so a terminal's Ctrl-C reaches the parent only; its standard input is a pipe
    whose end tells it that the parent is gone, however that came about. What it prints is appended to ``log``.
    ``on_exit`` is called once, from a thread of its own, with the exit status (negative: the signal that ended it).
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        on_exit: Callable[[ChildProcess, int], None],
    ) -> None:
        self.name = name
        self.log = log
        self._on_exit = on_exit
        self._ended = threading.Event()
        with log.open("ab") as output:
            # -P: a file of the working directory that is called like a module must not take that module's place.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "layerwise", *arguments, "--exit-with-parent", "--debug"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._watcher = threading.Thread(target=self._watch, name=f"layerwise-child-{name}", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its end has not been seen yet."""
        return not self._ended.is_set()

    @property
    def status(self) -> int | None:
        """The exit status, once ended."""
        return self._process.returncode if self._ended.is_set() else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and all that it started; nothing happens when it has ended."""
        if self.running:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end; tells whether it came."""
        return self._ended.wait(seconds)

    def close(self) -> None:
        """After the end: join the thread and give back the pipe."""
        self._watcher.join()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def last_words(self) -> str:
        """The last lines of its log."""
        return last_lines(self.log)

    def _watch(self) -> None:
        status = self._process.wait()
        self._ended.set()
        self._on_exit(self, status)


def last_lines(path: Path) -> str:
    """The end of a log file, at most a few lines; empty when there is none."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
