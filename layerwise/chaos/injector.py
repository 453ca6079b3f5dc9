"""Carries out planned faults of processes, when the job has come far enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from layerwise.chaos.faults import EVERYBODY, ProcessFault, ProcessFaultKind, process_named, works_for
from layerwise.chaos.log_tail import LogTail
from layerwise.chaos.recovery import RecoveryWatch
from layerwise.ids import COORDINATOR


class Processes(Protocol):
    """The processes that can be hit: `layerwise.cluster.LocalCluster`."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Those that run."""
        ...

    def kill(self, name: str) -> object:
        """End one by force and wait until it is gone."""
        ...

    def pause(self, name: str) -> None:
        """Stop one where it stands."""
        ...

    def unpause(self, name: str) -> None:
        """Let it go on."""
        ...


class Injector:
    """Call `step` often; it does what is due. ``document`` gives the newest known document of the job.

    Faults happen in the order of the plan, each once. One whose process is not there at the time waits for it: a fault
    that hits nobody would prove nothing.
    """

    def __init__(
        self,
        faults: Sequence[ProcessFault],
        processes: Processes,
        tail: LogTail,
        watch: RecoveryWatch,
        document: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._waiting = sorted(faults, key=lambda fault: fault.at_version)
        self._processes = processes
        self._tail = tail
        self._watch = watch
        self._document = document
        self._due_at: float | None = None
        self._paused: dict[str, float] = {}

    @property
    def waiting(self) -> tuple[ProcessFault, ...]:
        """What has not happened yet."""
        return tuple(self._waiting)

    @property
    def paused(self) -> tuple[str, ...]:
        """Processes that are stopped now."""
        return tuple(self._paused)

    def step(self, now: float) -> bool:
        """Do what is due at ``now``; tells whether anything was."""
        acted = False
        for name in [name for name, until in self._paused.items() if now >= until]:
            del self._paused[name]
            if name != COORDINATOR:
                self._watch.note_replaced(name, replaced=not works_for(name, self._document()))
            self._processes.unpause(name)
            acted = True
        if self._waiting and self._due_at is None and self._tail.lowest_version >= self._waiting[0].at_version:
            self._due_at = now + self._waiting[0].after
        if self._due_at is not None and now >= self._due_at and self._inject(self._waiting[0]):
            self._waiting.pop(0)
            self._due_at = None
            acted = True
        return acted

    def end(self) -> None:
        """Let every process go on."""
        for name in self.paused:
            self._processes.unpause(name)
        self._paused.clear()

    def _inject(self, fault: ProcessFault) -> bool:
        running = self._processes.pids
        if fault.target == EVERYBODY:
            names = tuple(running)
        else:
            name = process_named(fault.target, self._document())
            names = (name,) if name is not None and name in running and name not in self._paused else ()
        if not names:
            return False
        for name in names:
            if fault.kind is ProcessFaultKind.KILL:
                self._processes.kill(name)
                self._paused.pop(name, None)
            else:
                self._processes.pause(name)
                self._paused[name] = time.monotonic() + fault.seconds
        # What was written until now was written before: none of it is a sign of recovery.
        now = time.monotonic()
        self._tail.poll(now)
        self._watch.begin(
            fault=str(fault),
            kind=str(fault.kind),
            process=", ".join(names),
            version=self._tail.lowest_version,
            layers=self._tail.layers,
            now=now,
        )
        return True
