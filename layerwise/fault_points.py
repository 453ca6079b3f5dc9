"""Faults of the disk, done on purpose: at every write, sync, rename and deletion of what must survive a crash.

Every such operation goes through `layerwise.disk`, and each is a *point* called ``what.kind``:

    what   cut, manifest, fence, rollback               a cut's layer files, its manifest, who owns a block, what went back
           event-log, log-summary                       the event log and what replaces its removed part
           job-store                                    the coordinator's database (``begin``, ``commit``, ``committed``; its folder)
           spec, result, export                         single files beside a run
    kind   make-folder, create, write, sync, rename, sync-folder, delete, delete-folder, reserve

What happens at which reach of a point is planned before the process starts, in one environment variable that is read
once, when this module is imported. Nothing that comes over a network can change it. Without the variable a point costs
one comparison::

    LAYERWISE_FAULTS="cut.rename:3:kill,event-log.reserve:2-40:enospc,manifest.*:1-:erofs"
                      point      when action

``point`` may hold ``*`` and ``?``. ``when`` counts the process's reaches of points that fit, from 1: ``3``, ``2-40``
(each of them), ``2-`` (all from there on). ``action`` is one of

    kill      the process kills itself (SIGKILL) before the operation
    torn      of a write only the first half reaches the file, then the process kills itself; else as kill
    partial   of a write only the first half reaches the file, then the disk is full; else as enospc
    enospc, erofs, eio, eacces    the operation fails with that error

With ``LAYERWISE_FAULTS_FIRED`` naming a file, every fault is noted there as one line of JSON when it happens for the
first time, and a process that is started again does not repeat it (a range is noted, and goes on in that process).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from layerwise.errors import ConfigError

VARIABLE = "LAYERWISE_FAULTS"
FIRED_VARIABLE = "LAYERWISE_FAULTS_FIRED"


class FaultAction(StrEnum):
    """What happens at a point; see this module's docstring."""

    KILL = "kill"
    TORN = "torn"
    PARTIAL = "partial"
    ENOSPC = "enospc"
    EROFS = "erofs"
    EIO = "eio"
    EACCES = "eacces"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What is about to happen (or has happened) on the disk. ``data`` and ``file`` are those of a write."""

    what: str
    kind: str
    path: str
    target: str = ""
    data: bytes | memoryview = b""
    file: int = -1

    @property
    def point(self) -> str:
        """The name of the fault point."""
        return f"{self.what}.{self.kind}"


class Watcher(Protocol):
    """Who is told of every operation. Any thread may call."""

    def before(self, operation: Operation) -> None:
        """It is about to happen; an ``OSError`` makes it fail."""
        ...

    def after(self, operation: Operation) -> None:
        """It has happened."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFault:
    """``action`` at the reaches ``first`` to ``last`` (from 1; ``None``: all from ``first`` on) of ``point``."""

    point: str
    first: int
    last: int | None
    action: FaultAction

    @classmethod
    def parse(cls, text: str) -> DiskFault:
        """One fault as in the environment variable; ``ValueError`` when it can't be meant."""
        parts = text.strip().split(":")
        if len(parts) != 3 or not parts[0]:
            raise ValueError(f"{text.strip()!r} is not of the form point:when:action")
        begin, dash, end = parts[1].partition("-")
        last = None if dash and not end else int(end if dash else begin)
        first = int(begin)
        if first < 1 or (last is not None and last < first):
            raise ValueError(f"{parts[1]!r} in {text.strip()!r} is no range of reaches")
        return cls(point=parts[0], first=first, last=last, action=FaultAction(parts[2]))

    def __str__(self) -> str:
        when = str(self.first) if self.last == self.first else f"{self.first}-{self.last or ''}"
        return f"{self.point}:{when}:{self.action}"


class FaultPlan:
    """A `Watcher` that lets planned faults happen. ``fired`` is the file that notes them."""

    def __init__(self, faults: tuple[DiskFault, ...], fired: Path | None = None) -> None:
        had = {text for text, _ in fired_disk_faults(fired)} if fired is not None else set()
        self._faults = [fault for fault in faults if str(fault) not in had]
        self._counts = [0] * len(self._faults)
        self._noted: set[DiskFault] = set()
        self._fired = fired

    def before(self, operation: Operation) -> None:
        """Let happen what is planned for this reach of the point."""
        point = operation.point
        for number, fault in enumerate(self._faults):
            if not fnmatchcase(point, fault.point):
                continue
            self._counts[number] += 1
            count = self._counts[number]
            if count >= fault.first and (fault.last is None or count <= fault.last):
                self._note(fault, operation)
                _act(fault.action, operation)

    def after(self, operation: Operation) -> None:
        """Nothing is planned for afterwards."""

    def _note(self, fault: DiskFault, operation: Operation) -> None:
        if fault in self._noted or self._fired is None:
            return
        self._noted.add(fault)
        value = {
            "time": time.time(),
            "pid": os.getpid(),
            "fault": str(fault),
            "point": operation.point,
            "path": operation.path,
        }
        with self._fired.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, separators=(",", ":")) + "\n")


def parse_faults(text: str) -> tuple[DiskFault, ...]:
    """The faults that an environment variable plans.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return tuple(DiskFault.parse(one) for one in text.split(",") if one.strip())
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: no plan of faults can be read from it: {error}") from None


def fired_disk_faults(path: str | Path) -> list[tuple[str, float]]:
    """The faults that have happened by now, in order, as in the variable, and when in unix seconds."""
    file = Path(path)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(str(value["fault"]), float(value["time"])) for value in values]


def _act(action: FaultAction, operation: Operation) -> None:
    if action in (FaultAction.TORN, FaultAction.PARTIAL) and operation.file >= 0:
        os.write(operation.file, operation.data[: len(operation.data) // 2])
    if action in (FaultAction.KILL, FaultAction.TORN):
        os.kill(os.getpid(), signal.SIGKILL)
    number = errno.ENOSPC if action is FaultAction.PARTIAL else getattr(errno, action.upper())
    raise OSError(number, os.strerror(number), operation.path)


def _from_environment(environment: Mapping[str, str]) -> FaultPlan | None:
    faults = parse_faults(environment.get(VARIABLE, ""))
    fired = environment.get(FIRED_VARIABLE, "")
    return FaultPlan(faults, Path(fired) if fired else None) if faults else None


class Points:
    """Where `layerwise.disk` looks: ``watcher`` is ``None`` unless faults are planned for this process."""

    __slots__ = ("watcher",)

    def __init__(self, watcher: Watcher | None) -> None:
        self.watcher = watcher


points = Points(_from_environment(os.environ))
"""This process's. A test puts a watcher of its own there."""
