"""One service started as a child process: its output, its signs of life, its end, its stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.lifetime import BEAT, READY
from layerwise.spare import Task
from layerwise.supervision import ProcessState

TAIL_BYTES = 4096
TAIL_LINES = 5
DRAIN_SECONDS = 1.0
"""How long the end of a child waits for the last of its output: a process that it started may hold the pipe for longer."""

_STATES = {"T": ProcessState.STOPPED, "t": ProcessState.TRACED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A service to run as a child: ``layerwise <arguments>``.

    What it prints is appended to the file ``log``; without one it is handed to the parent line by line. ``warm`` ones
    import torch, so that a spare can become them.
    """

    name: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    warm: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments, with the one that every child gets."""
        return (*self.arguments, "--exit-with-parent")


class ChildProcess:
    """A program, or a spare, as a child whose life ends with ours.

    The child leads a session of its own, so a terminal's Ctrl-C reaches the parent only; its standard input is a socket
    whose end tells it that the parent is gone, however that came about, and through which it gives signs of life.
    ``on_exit`` is called once, from a thread of its own, with the exit status (negative: the signal that ended it);
    ``on_line`` from another one.
    """

    def __init__(
        self,
        program: Program,
        *,
        spare: bool = False,
        on_exit: Callable[[ChildProcess, int], None],
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self.program = program
        self._on_exit, self._on_line = on_exit, on_line
        self._ended = threading.Event()
        self._last_lines: deque[str] = deque(maxlen=TAIL_LINES)
        # -P: a file of the working directory that is called like a module must not take that module's place.
        module = ["layerwise.spare"] if spare else ["layerwise", *program.command]
        self._socket, theirs = socket.socketpair()
        try:
            self._process = self._spawn(module, theirs)
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        threads = [threading.Thread(target=self._watch, name=f"layerwise-child-{program.name}", daemon=True)]
        if self._process.stdout is not None:
            threads.append(threading.Thread(target=self._read, name=f"layerwise-log-{program.name}", daemon=True))
        self._watcher, self._reader = threads[0], threads[1] if len(threads) > 1 else None
        for thread in reversed(threads):
            thread.start()

    def _spawn(self, module: list[str], their_end: socket.socket) -> subprocess.Popen[bytes]:
        log = self.program.log
        with log.open("ab") if log is not None else nullcontext(subprocess.PIPE) as output:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", *module],
                stdin=their_end.fileno(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.program.environment},
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        """Which process it is; a spare's changes when it gets a task."""
        return self.program.name

    @property
    def log(self) -> Path | None:
        """The file of its output, if that goes to one."""
        return self.program.log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its end has not been seen yet."""
        return not self._ended.is_set()

    @property
    def over(self) -> bool:
        """Whether its end has been told too, so that `close` does not wait."""
        return not self._watcher.is_alive()

    @property
    def state(self) -> ProcessState:
        """What the system says of it; always running where the system does not tell."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ProcessState.RUNNING
        # The name in brackets may hold anything, brackets too.
        return _STATES.get(text.rpartition(")")[2].split()[0], ProcessState.RUNNING)

    def become(self, program: Program) -> bool:
        """Give a spare that is ready its task; False when it is gone or does not run."""
        if not self.running or self.state is not ProcessState.RUNNING:
            return False
        task = Task(
            name=program.name,
            arguments=program.command,
            environment=dict(program.environment),
            log=str(program.log) if program.log is not None else None,
        )
        try:
            self._socket.sendall(task.to_line())
        except OSError:
            return False
        self.program = program
        self._last_lines.clear()
        return True

    def read_signs(self) -> tuple[bool, bool]:
        """Take what it has written since the last call: whether it has given a sign of life, and said to be ready."""
        said = b""
        try:
            while part := self._socket.recv(4096, socket.MSG_DONTWAIT):
                said += part
        except OSError:  # nothing more to read, or gone: its end is told otherwise
            pass
        return BEAT in said, READY in said

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
        """After the end: join the threads and give back the socket and the pipe."""
        self._watcher.join()
        self._socket.close()
        if self._process.stdout is not None and self._reader is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def last_words(self) -> str:
        """The last lines of its output."""
        return last_lines(self.log) if self.log is not None else "\n".join(self._last_lines)

    def _watch(self) -> None:
        status = self._process.wait()
        self._ended.set()  # at once: from here on the process id may be somebody else's
        if self._reader is not None:
            self._reader.join(DRAIN_SECONDS)
        self._on_exit(self, status)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode("utf-8", errors="replace").rstrip("\n")
            self._last_lines.append(text)
            if self._on_line is not None:
                self._on_line(self.name, text)


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
