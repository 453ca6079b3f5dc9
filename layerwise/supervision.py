"""When to start a process again, when to use the spare, and when to give up: decisions only, no process in sight."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

HANG_SECONDS = 15.0
"""What commands wait, unless told otherwise, before a process that is stopped counts as ended."""
QUICK_DEATH_SECONDS = 10.0
"""A process that dies sooner after its start has not done any work to speak of."""
FIRST_DELAY_SECONDS = 0.5
MOST_DELAY_SECONDS = 30.0
START_SECONDS = 120.0
"""How long a process may take to its first sign of life: importing torch on a loaded machine takes long."""
SILENCE_FACTOR = 4.0
"""A process that runs but gives no sign of life gets so many times the patience of one that is stopped: it may be computing."""
GAP_SECONDS = 5.0
"""When the supervisor itself was not run for so long, nobody's silence in that time counts."""
SPARE_DELAY_SECONDS = 30.0
"""After a spare was lost: most likely memory is short."""
MOST_SPARE_FAILURES = 3
USAGE_STATUS, NOT_ALLOWED_STATUS = 2, 5
CONFIGURATION_STATUSES = (USAGE_STATUS, NOT_ALLOWED_STATUS)
"""Exit statuses of a process that would end in the same way however often it was started."""


class ProcessState(StrEnum):
    """What the operating system says of a process."""

    RUNNING = "running"
    STOPPED = "stopped"
    """By SIGSTOP or SIGTSTP."""
    TRACED = "traced"
    """Under a debugger, which may keep it as long as it likes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProcess:
    """Start ``name``; ``adopt``: let the spare become it."""

    name: str
    adopt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpare:
    """Start a spare process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillProcess:
    """End ``name`` by force: it does nothing any more. Its exit will be reported as any other."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEnd:
    """Tell that ``name`` ended with ``status`` though nobody asked it to.

    It is started again in ``delay`` seconds (0: at once), or never when that is None. ``quick_deaths`` counts the ends
    in a row that came soon after a start, this one included.
    """

    name: str
    status: int
    delay: float | None
    quick_deaths: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportNoSpare:
    """Tell that no spare can be kept, and that none will be tried any more."""

    status: int


Decision = StartProcess | StartSpare | KillProcess | ReportEnd | ReportNoSpare


class _Phase(StrEnum):
    STARTING = "starting"
    UP = "up"
    WAITING = "waiting"
    """For its next start."""
    ENDED = "ended"


@dataclass(slots=True, kw_only=True)
class _Process:
    warm: bool
    phase: _Phase = _Phase.ENDED
    started: float = 0.0
    heard: float = 0.0
    stopped_since: float | None = None
    quick_deaths: int = 0
    start_at: float = 0.0
    expected: bool = False
    killed: bool = False


class _SparePhase(StrEnum):
    NONE = "none"
    STARTING = "starting"
    READY = "ready"


@dataclass(slots=True)
class _Spare:
    wanted: bool = False
    phase: _SparePhase = _SparePhase.NONE
    failures: int = 0
    not_before: float = 0.0


@dataclass(slots=True, kw_only=True)
class Supervision:
    """Decides for a set of processes with names. Times are seconds on one clock that never goes back.

    A process that ends is started again at once; when it ends soon after its start, again and again, after delays that
    double up to `MOST_DELAY_SECONDS`, and with ``most_quick_deaths`` not any more after so many. One that says by its
    exit status that its configuration is wrong is never started again.

    A process that stays stopped for ``hang_seconds``, or gives no sign of life for `SILENCE_FACTOR` times as long, is
    killed, which is an end like any other; None lets all live.

    When a spare is wanted, one is started as soon as no other process is starting, so that it takes no time from them.
    Not thread-safe.
    """

    restart: bool = True
    most_quick_deaths: int | None = None
    hang_seconds: float | None = None
    _processes: dict[str, _Process] = field(default_factory=dict)
    _spare: _Spare = field(default_factory=_Spare)
    _ticked: float | None = None

    @property
    def spare_ready(self) -> bool:
        """Whether a spare waits for a task."""
        return self._spare.phase is _SparePhase.READY

    # ---- what people ask for ----

    def start(self, name: str, now: float, *, warm: bool) -> list[Decision]:
        """``name`` shall run; ``warm``: a spare can become it."""
        process = self._processes.setdefault(name, _Process(warm=warm))
        if process.phase in (_Phase.STARTING, _Phase.UP):
            return []
        process.warm, process.quick_deaths = warm, 0
        return self._start(name, process, now)

    def expect_end(self, name: str) -> None:
        """``name`` is about to be ended on purpose: no failure, but with `restart` it is started again."""
        self._processes[name].expected = True

    def keep_spare(self, now: float) -> list[Decision]:
        """From now on there shall be a spare."""
        self._spare.wanted = True
        return self._spare_wanted(now)

    # ---- what happens ----

    def on_end(self, name: str, status: int, now: float) -> list[Decision]:
        """``name`` has ended; ``status`` is negative for a signal."""
        process = self._processes[name]
        expected, process.expected = process.expected, False
        killed, process.killed = process.killed, False
        quick = now - process.started < QUICK_DEATH_SECONDS and not killed
        process.phase = _Phase.ENDED
        if expected:
            return [*(self._start(name, process, now) if self.restart else []), *self._spare_wanted(now)]
        process.quick_deaths = process.quick_deaths + 1 if quick else 0
        report = ReportEnd(
            name=name, status=status, delay=self._delay(process, status), quick_deaths=process.quick_deaths
        )
        decisions: list[Decision] = [report]
        if report.delay == 0:
            decisions += self._start(name, process, now)
        elif report.delay is not None:
            process.phase, process.start_at = _Phase.WAITING, now + report.delay
        return decisions + self._spare_wanted(now)

    def on_beat(self, name: str, now: float) -> list[Decision]:
        """``name`` has given a sign of life."""
        process = self._processes[name]
        process.heard, process.stopped_since = now, None
        if process.phase is not _Phase.STARTING:
            return []
        process.phase = _Phase.UP
        return self._spare_wanted(now)

    def on_state(self, name: str, state: ProcessState, now: float) -> list[Decision]:
        """What the system says of ``name``, which has been silent for a while."""
        process = self._processes[name]
        if process.phase not in (_Phase.STARTING, _Phase.UP):
            return []
        if state is ProcessState.TRACED:
            process.heard, process.stopped_since = now, None
            process.started = now if process.phase is _Phase.STARTING else process.started
        elif state is ProcessState.RUNNING:
            process.stopped_since = None
        elif process.stopped_since is None:
            process.stopped_since = process.heard if process.phase is _Phase.UP else now
        return []

    def on_spare_ready(self, now: float) -> list[Decision]:
        """The spare waits for its task."""
        if self._spare.phase is _SparePhase.STARTING:
            self._spare.phase, self._spare.failures = _SparePhase.READY, 0
        return []

    def on_spare_end(self, status: int, now: float) -> list[Decision]:
        """The spare has ended before it had a task."""
        spare = self._spare
        if spare.phase is _SparePhase.STARTING:
            spare.failures += 1
        spare.phase, spare.not_before = _SparePhase.NONE, now + SPARE_DELAY_SECONDS
        if spare.failures >= MOST_SPARE_FAILURES and spare.wanted:
            spare.wanted = False
            return [ReportNoSpare(status=status)]
        return []

    def on_tick(self, now: float) -> list[Decision]:
        """Time passes; called some times a second."""
        if self._ticked is not None and now - self._ticked > GAP_SECONDS:
            self._forgive(now)
        self._ticked = now
        decisions: list[Decision] = []
        for name, process in self._processes.items():
            if process.phase is _Phase.WAITING and now >= process.start_at:
                decisions += self._start(name, process, now)
            elif process.phase in (_Phase.STARTING, _Phase.UP) and not process.killed:
                reason = self._why_hung(process, now)
                if reason:
                    process.killed = True
                    decisions.append(KillProcess(name=name, reason=reason))
        return decisions + self._spare_wanted(now)

    # ---- inside ----

    def _start(self, name: str, process: _Process, now: float) -> list[Decision]:
        process.phase, process.started, process.heard = _Phase.STARTING, now, now
        process.stopped_since, process.expected, process.killed = None, False, False
        # One that dies at once, again and again, would use up a spare each time.
        adopt = process.warm and process.quick_deaths < 2 and self.spare_ready
        if adopt:
            self._spare.phase = _SparePhase.NONE
        return [StartProcess(name=name, adopt=adopt)]

    def _delay(self, process: _Process, status: int) -> float | None:
        deaths = process.quick_deaths
        if not self.restart or status in CONFIGURATION_STATUSES:
            return None
        if self.most_quick_deaths is not None and deaths >= self.most_quick_deaths:
            return None
        return 0.0 if deaths < 2 else min(FIRST_DELAY_SECONDS * 2.0 ** (deaths - 2), MOST_DELAY_SECONDS)

    def _why_hung(self, process: _Process, now: float) -> str:
        if self.hang_seconds is None:
            return ""
        if process.stopped_since is not None and now - process.stopped_since >= self.hang_seconds:
            return f"it was stopped (SIGSTOP) for {now - process.stopped_since:.0f} s"
        if process.phase is _Phase.STARTING:
            return f"it did not start within {START_SECONDS:.0f} s" if now - process.started >= START_SECONDS else ""
        silent = now - process.heard
        return f"its event loop stood still for {silent:.0f} s" if silent >= SILENCE_FACTOR * self.hang_seconds else ""

    def _forgive(self, now: float) -> None:
        for process in self._processes.values():
            process.heard, process.stopped_since = now, None
            if process.phase is _Phase.STARTING:
                process.started = now

    def _spare_wanted(self, now: float) -> list[Decision]:
        spare = self._spare
        starting = any(process.phase is _Phase.STARTING for process in self._processes.values())
        if not spare.wanted or spare.phase is not _SparePhase.NONE or starting or now < spare.not_before:
            return []
        spare.phase = _SparePhase.STARTING
        return [StartSpare()]
