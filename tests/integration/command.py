"""The ``layerwise`` command as a process of its own, read line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil


class Command:
    """``layerwise <arguments>`` in ``folder``; standard error is read as it comes, standard output at the end."""

    def __init__(self, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed on exit)
        self.folder = folder
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "layerwise", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder / "runtime"), **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._output.close()

    def wait_for(self, text: str) -> str:
        """Read standard error up to a line that has ``text``; gives it. Fails when the process ends before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return line
        raise AssertionError(f"ended without saying {text!r}:\n" + "\n".join(self.lines))

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def child(self, name: str) -> psutil.Process:
        """The process called ``name`` of the cluster that the command has started."""
        for process in psutil.Process(self.process.pid).children():
            words = process.cmdline()
            if name in words:
                return process
        raise AssertionError(f"no process {name}")

    def finish(self) -> int:
        """Read to the end; gives the exit status."""
        assert self.process.stderr is not None
        self.lines += [line.rstrip("\n") for line in self.process.stderr]
        return self.process.wait()

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return "\n".join(self.lines)

    @property
    def output(self) -> str:
        """Standard output, after `finish`."""
        self._output.seek(0)
        return self._output.read().decode()

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object in the last line of standard output."""
        value: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return value


def write_job(folder: Path, **sections: Any) -> str:
    """A small job's file in ``folder`` (JSON is YAML too); gives its name."""
    values = {
        "name": "tiny",
        "model": {"name": "mlp", "hidden": [8, 8]},
        "data": {"name": "digits", "batch": 32},
        "train": {"steps": 6, "optimizer": "adamw"},
        **sections,
    }
    (folder / "job.yaml").write_text(json.dumps(values), encoding="utf-8")
    return "job.yaml"
