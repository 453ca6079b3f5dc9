"""Plays the crash scenario in processes that kill themselves at a fault point, and looks at what each has left.

A program of its own, which has neither threads nor torch nor gRPC when it forks: ``python -m
tests.integration.killed_writer DIRECTORY FAULT...`` prints for each fault how the process ended, or what was wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from layerwise.fault_points import FaultPlan, parse_faults, points
from tests.unit.crash_scenario import Promises, Scenario, check, worlds

VERSIONS = (3, 5, 6, 8)


def killed(directory: Path, fault: str) -> bool:
    """Play with ``fault`` in a child; whether that killed it. What it had promised by then is checked."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            points.watcher = FaultPlan(parse_faults(fault))
            Scenario(directory, lambda line: _write(writer, line), versions=VERSIONS).play()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    promises = Promises()
    with os.fdopen(reader, encoding="ascii") as lines:
        for line in lines:
            promises.take(line)
    _, status = os.waitpid(child, 0)
    check(directory, promises)
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0, "the scenario failed by itself"
        assert promises.result == "done"
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def _write(file: int, line: str) -> None:
    os.write(file, f"{line}\n".encode())


def main(folder: Path, faults: list[str]) -> int:
    """Try each fault; the exit status says whether anything was wrong."""
    wrong = 0
    worlds()
    for number, fault in enumerate(faults):
        directory = folder / str(number)
        directory.mkdir(parents=True)
        try:
            ended = "killed" if killed(directory, fault) else "not reached"
        except Exception as error:
            wrong += 1
            ended = f"WRONG {type(error).__name__}: {error}"
        print(fault, ended, flush=True)  # noqa: T201
        shutil.rmtree(directory)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
