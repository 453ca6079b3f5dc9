"""Keeps child processes running as a `Supervision` decides, with one spare; used by local clusters and by ``layerwise node``."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerwise.child import ChildProcess, Program, describe_status
from layerwise.errors import DeadlineError, NotFoundError
from layerwise.supervision import (
    QUICK_DEATH_SECONDS,
    Decision,
    KillProcess,
    ReportEnd,
    ReportNoSpare,
    StartProcess,
    StartSpare,
    Supervision,
)

TICK_SECONDS = 0.25
SILENT_SECONDS = 2.5
"""After so long without a sign of life the system is asked about a child."""
MOST_RECORDS = 10_000
SPARE = "spare"
VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """Something that happened to a child: ``event`` is one of started, adopted, ready, up, signalled, ended, given up.

    ``time`` is in unix seconds. The spare is called `SPARE`; ``ready`` is its word, ``adopted`` means that it has become
    ``name``, ``up`` is the first sign of life of the event loop. ``detail`` has the signal, or the exit status in words.
    """

    time: float
    name: str
    event: str
    pid: int
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An end that nobody asked for, in one sentence that also says what follows from it.

    ``for_good``: the process is not started again.
    """

    name: str
    sentence: str
    status: int
    for_good: bool


class Supervisor:
    """Children by name, started again when they end. ``on_problem`` hears of unexpected ends, from some thread.

    Without a ``spare_log`` the spare's output, and that of the programs without a log, goes to ``on_line(name, line)``.
    The spare gets ``spare_environment``. Thread-safe: one lock around the `Supervision` and the children.
    """

    def __init__(
        self,
        supervision: Supervision,
        *,
        spare_environment: Mapping[str, str] | None = None,
        spare_log: Path | None = None,
        on_problem: Callable[[Problem], None] = lambda problem: None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self._supervision = supervision
        self._spare_program = Program(name=SPARE, environment=spare_environment or {}, log=spare_log)
        self._on_problem, self._on_line = on_problem, on_line
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._programs: dict[str, Program] = {}
        self._children: dict[str, ChildProcess] = {}
        self._spare: ChildProcess | None = None
        self._ended_children: list[ChildProcess] = []
        self._heard: dict[str, float] = {}
        self._kill_reasons: dict[int, str] = {}
        self._records: deque[ProcessRecord] = deque(maxlen=MOST_RECORDS)
        self._restarts: dict[str, int] = {}
        self._start_errors: dict[str, str] = {}
        self._memory_kills = memory_kills()
        self._stopping = False
        self._stop_ticks = threading.Event()
        self._ticker = threading.Thread(target=self._tick_on, name="layerwise-supervisor", daemon=True)
        self._ticker.start()

    # ---- what people ask for ----

    def start(self, program: Program) -> None:
        """Have ``program`` run under its name; nothing happens when it does."""

        def begin(now: float) -> list[Decision]:
            self._programs[program.name] = program
            return self._supervision.start(program.name, now, warm=program.warm)

        self._feed(begin)

    def keep_spare(self) -> None:
        """From now on keep a spare, once no child is starting."""
        self._feed(self._supervision.keep_spare)

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to ``name`` and all that it started.

        Raises:
            NotFoundError: there is no such process.
        """
        with self._lock:
            child = self._child(name)
            self._record(child, "signalled", number.name)
        child.signal(number)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """End ``name`` on purpose and wait until it is gone; gives the id of the process that it was.

        Raises:
            NotFoundError: there is no such process.
        """
        with self._lock:
            child = self._child(name)
            if not child.running:
                return child.pid
            self._supervision.expect_end(name)
            self._record(child, "signalled", number.name)
        child.signal(number)
        child.wait()
        return child.pid

    def stop(self, seconds: float, *, last: str = "") -> None:
        """End all: by SIGTERM, by force after ``seconds``; ``last`` when all others have ended, with as much time again."""
        with self._lock:
            self._stopping = True
            children, spare = dict(self._children), self._spare
        self._stop_ticks.set()
        self._ticker.join()
        if spare is not None:
            spare.signal(signal.SIGKILL)
        for group in (
            [one for name, one in children.items() if name != last],
            [children[last]] if last in children else [],
        ):
            for child in group:
                child.signal(signal.SIGTERM)
                child.signal(signal.SIGCONT)  # a paused one could not hear it
            deadline = time.monotonic() + seconds
            for child in group:
                child.wait(max(0.0, deadline - time.monotonic()))
        everybody = [*children.values(), *([spare] if spare is not None else [])]
        for child in everybody:
            child.signal(signal.SIGKILL)
        for child in [*everybody, *self._ended_children]:
            child.close()
        with self._changed:
            self._children.clear()
            self._ended_children.clear()
            self._spare = None
            self._changed.notify_all()

    # ---- what there is ----

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that run; without the spare."""
        with self._lock:
            return {name: child.pid for name, child in self._children.items() if child.running}

    @property
    def spare_pid(self) -> int | None:
        """The process id of a spare that is ready."""
        with self._lock:
            return self._spare.pid if self._spare is not None and self._supervision.spare_ready else None

    @property
    def records(self) -> tuple[ProcessRecord, ...]:
        """What has happened, oldest first; the last `MOST_RECORDS`."""
        with self._lock:
            return tuple(self._records)

    @property
    def restarts(self) -> dict[str, int]:
        """How often each process was started again."""
        with self._lock:
            return dict(self._restarts)

    def wait_for(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``holds``, which is asked under the lock at each change; tells whether it came to that in time."""
        with self._changed:
            return self._changed.wait_for(holds, seconds)

    def wait_for_restart(self, name: str, pid: int, seconds: float) -> int:
        """Wait until ``name`` gives signs of life as another process than ``pid``; gives its id.

        Raises:
            DeadlineError: not within ``seconds``.
        """

        def back() -> bool:
            child = self._children.get(name)
            return child is not None and child.running and child.pid != pid and name in self._heard

        if not self.wait_for(back, seconds):
            raise DeadlineError(f"{name} (process {pid}) was not started again within {seconds:.0f} s")
        return self.pids[name]

    # ---- inside ----

    def _child(self, name: str) -> ChildProcess:
        if name not in self._children:
            raise NotFoundError(f"there is no running process {name}; there are {', '.join(self._children) or 'none'}")
        return self._children[name]

    def _feed(self, event: Callable[[float], list[Decision]]) -> None:
        """Let ``event`` decide under the lock and carry that out; problems are told outside of it."""
        problems: list[Problem] = []
        with self._changed:
            if self._stopping:
                return
            decisions = event(time.monotonic())
            while decisions:
                decisions = [more for decision in decisions for more in self._perform(decision, problems)]
            self._changed.notify_all()
        for problem in problems:
            self._on_problem(problem)

    def _perform(self, decision: Decision, problems: list[Problem]) -> list[Decision]:
        match decision:
            case StartProcess(name=name, adopt=adopt):
                return self._start(name, adopt=adopt)
            case StartSpare():
                return self._start_spare()
            case KillProcess(name=name, reason=reason):
                child = self._children[name]
                self._kill_reasons[child.pid] = reason
                self._record(child, "signalled", "SIGKILL")
                child.signal(signal.SIGKILL)
            case ReportEnd():
                problems.append(self._problem(decision))
            case ReportNoSpare(status=status):
                where = f" (log: {self._spare_program.log})" if self._spare_program.log is not None else ""
                sentence = (
                    f"no spare process can be kept, it ends with {describe_status(status)}{where}; restarts take longer"
                )
                problems.append(Problem(name=SPARE, sentence=sentence, status=status, for_good=True))
        return []

    def _start(self, name: str, *, adopt: bool) -> list[Decision]:
        now = time.monotonic()
        old = self._children.pop(name, None)
        if old is not None:
            self._ended_children.append(old)
            self._restarts[name] = self._restarts.get(name, 0) + 1
        self._heard.pop(name, None)
        if adopt and self._spare is not None:
            spare, self._spare = self._spare, None
            if spare.become(self._programs[name]):
                self._children[name] = spare
                self._record(spare, "adopted")
                return []
            spare.signal(signal.SIGKILL)
            self._ended_children.append(spare)
        try:
            self._children[name] = self._new_child(self._programs[name])
        except OSError as error:
            self._start_errors[name] = str(error)
            return self._supervision.on_end(name, 1, now)
        self._record(self._children[name], "started")
        return []

    def _start_spare(self) -> list[Decision]:
        try:
            self._spare = self._new_child(self._spare_program, spare=True)
        except OSError:
            return self._supervision.on_spare_end(1, time.monotonic())
        self._record(self._spare, "started")
        return []

    def _new_child(self, program: Program, *, spare: bool = False) -> ChildProcess:
        return ChildProcess(program, spare=spare, on_exit=self._on_exit, on_line=self._on_line)

    def _on_exit(self, child: ChildProcess, status: int) -> None:
        def ended(now: float) -> list[Decision]:
            if child is self._spare:
                self._spare = None
                self._ended_children.append(child)
                self._record(child, "ended", describe_status(status))
                return self._supervision.on_spare_end(status, now)
            if self._children.get(child.name) is not child:
                return []
            self._record(child, "ended", describe_status(status))
            return self._supervision.on_end(child.name, status, now)

        self._feed(ended)

    def _problem(self, end: ReportEnd) -> Problem:
        child = self._children.get(end.name)
        if child is None:
            sentence = f"{end.name} can't be started: {self._start_errors.pop(end.name)}"
        else:
            reason = self._kill_reasons.pop(child.pid, "")
            told = f"was killed by its supervisor: {reason}" if reason else f"ended with {self._cause(end.status)}"
            words = child.last_words().splitlines()
            sentence = f"{end.name} (process {child.pid}) {told}{f': {words[-1]}' if words else ''}"
            sentence += f" (log: {child.log})" if child.log is not None else ""
        if end.quick_deaths > 1:
            sentence += (
                f"; it has ended {end.quick_deaths} times in a row within {QUICK_DEATH_SECONDS:.0f} s of its start"
            )
        if end.delay is not None:
            sentence += f"; it is started again in {end.delay:.1f} s" if end.delay else "; it was started again"
        return Problem(name=end.name, sentence=sentence, status=end.status, for_good=end.delay is None)

    def _cause(self, status: int) -> str:
        """The exit status in words, with the kernel's part in it."""
        before, self._memory_kills = self._memory_kills, memory_kills()
        short = status == -signal.SIGKILL and self._memory_kills > before
        return describe_status(status) + (", the kernel's way when memory runs out" if short else "")

    def _record(self, child: ChildProcess, event: str, detail: str = "") -> None:
        self._records.append(
            ProcessRecord(time=time.time(), name=child.name, event=event, pid=child.pid, detail=detail)
        )

    def _tick_on(self) -> None:
        while not self._stop_ticks.wait(TICK_SECONDS):
            self._feed(self._tick)

    def _tick(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for name, child in self._children.items():
            alive, _ = child.read_signs()
            if alive:
                if name not in self._heard:
                    self._record(child, "up")
                self._heard[name] = now
                decisions += self._supervision.on_beat(name, now)
            elif child.running and now - self._heard.get(name, 0.0) >= SILENT_SECONDS:
                decisions += self._supervision.on_state(name, child.state, now)
        if self._spare is not None and self._spare.read_signs()[1]:
            self._record(self._spare, "ready")
            decisions += self._supervision.on_spare_ready(now)
        for child in [one for one in self._ended_children if one.over]:
            self._ended_children.remove(child)
            child.close()
        return decisions + self._supervision.on_tick(now)


def memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory since it started; 0 where it does not tell."""
    try:
        lines = VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
