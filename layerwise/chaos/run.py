"""A job under planned faults, from submission to the report."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.audit_report import AuditReport
from layerwise.chaos.faults import EVERYBODY, ProcessFault
from layerwise.chaos.injector import Injector
from layerwise.chaos.log_facts import LogFacts, read_log_facts
from layerwise.chaos.log_tail import LayerProgress, LogTail
from layerwise.chaos.plan import ChaosPlan
from layerwise.chaos.recovery import FaultOutcome, RecoveryWatch, time_to_updates
from layerwise.chaos.report import ChaosReport, Hang, ReplayOutcome
from layerwise.chaos.stacks import dump_stacks
from layerwise.chaos.status_watch import StatusWatch
from layerwise.chaos.watchdog import Stand, Watchdog, silent_seconds, waiting_seconds
from layerwise.cluster import LocalCluster
from layerwise.errors import ConfigError, CorruptError, LayerwiseError, NotFoundError
from layerwise.fault_points import fired_disk_faults
from layerwise.faults import fired_faults
from layerwise.job import JobSpec
from layerwise.job_audit import audit_job

POLL_SECONDS = 0.01
GAVE_UP = "nothing has moved"
"""So begins what a job says that has noticed by itself that it hangs."""
_LOST_SHARDS = re.compile(r"\bwas lost\b|\blost its shard\b|processes or links failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class FiredFiles:
    """Where the processes of a cluster note the planned faults that they have had."""

    frames: Path
    disk: Path

    @classmethod
    def below(cls, directory: Path) -> FiredFiles:
        """Their names in a folder."""
        return cls(frames=directory / "fired-frames.jsonl", disk=directory / "fired-disk.jsonl")


class ChaosRun:
    """Runs ``spec`` once on ``cluster``, whose processes were started with the frame and disk faults of ``plan``.

    The cluster starts killed processes again, and may have served other jobs before. ``fired`` is needed when the plan
    has faults of frames or disks. ``watchdog_seconds``: how long nothing may move (default: what the job's time-outs
    say, see `silent_seconds`).
    """

    def __init__(
        self,
        cluster: LocalCluster,
        spec: JobSpec,
        plan: ChaosPlan,
        *,
        fired: FiredFiles | None = None,
        watchdog_seconds: float | None = None,
    ) -> None:
        self._cluster = cluster
        self._spec = spec
        self._plan = plan
        self._fired = fired
        self._watchdog_seconds = watchdog_seconds or silent_seconds(spec.timeouts)
        self._process_faults = sorted(plan.process_faults, key=lambda fault: fault.at_version)
        self._resumes = 0
        self._hang: Hang | None = None
        self._problems: list[str] = []

    def run(
        self,
        *,
        baseline: Mapping[str, Any] | None = None,
        replay: bool = True,
        allow_imports: Sequence[str] = (),
    ) -> ChaosReport:
        """Return the report when the job has ended, or hangs; with ``replay`` a job that is done is executed again.

        What goes wrong once the job is accepted is in the report.

        Raises:
            LayerwiseError: the job is refused.
        """
        began = time.monotonic()
        with self._cluster.client() as client:
            submitted = client.submit(self._spec.to_json())
        directory, job = Path(str(submitted["directory"])), str(submitted["job"])
        tail = LogTail(directory)
        watch = RecoveryWatch(began)
        try:
            document, waiting = self._follow(job, tail, watch)
        finally:
            tail.close()
        outcomes = watch.outcomes(tail.layers)
        seconds = time.monotonic() - began
        problems = self._problems
        return ChaosReport(
            plan=self._plan,
            directory=str(directory),
            document=document,
            baseline=baseline,
            faults=(*outcomes, *self._fired_outcomes(began, tail.layers)),
            unfired=(*waiting, *self._unfired()),
            log_facts=_log_facts(directory, problems),
            audit=_audit(directory, document, problems),
            replay=_replay(directory, allow_imports, problems) if replay and document.get("state") == "done" else None,
            resumes=self._resumes,
            seconds=seconds,
            hang=self._hang,
            problems=tuple(problems),
        )

    def _follow(self, job: str, tail: LogTail, watch: RecoveryWatch) -> tuple[dict[str, Any], list[str]]:
        """Inject, and watch, until the job has ended; gives its last document, and the faults that are left."""
        while True:
            with StatusWatch(self._cluster.coordinator_address, job) as status:
                faults = self._process_faults[len(watch.injected) :]
                injector = Injector(faults, self._cluster, tail, watch, lambda: status.document)
                try:
                    self._inject(status, injector, tail, watch)
                finally:
                    injector.end()
                document = dict(status.document)
                waiting = [str(fault) for fault in injector.waiting]
            injected = self._process_faults[: len(watch.injected)]
            if self._hang is not None or not may_resume(document, injected, self._resumes):
                return document, waiting
            self._resumes += 1
            try:
                self._cluster.wait_for_nodes()
                with self._cluster.client() as client:
                    client.resume(job=job)
            except LayerwiseError as error:
                self._problems.append(f"the job can't be resumed: {error}")
                return document, waiting

    def _inject(self, status: StatusWatch, injector: Injector, tail: LogTail, watch: RecoveryWatch) -> None:
        waiting = waiting_seconds(self._spec.timeouts)
        watchdog = Watchdog(self._watchdog_seconds, time.monotonic(), waiting=waiting)
        while not status.wait(POLL_SECONDS):
            now = time.monotonic()
            tail.poll(now)
            watch.observe(tail.layers, tail.lowest_version, now)
            acted = injector.step(now)
            phase = str(status.document.get("message") or "no answer yet")
            if watchdog.observe(Stand(num_updates=tail.num_updates, phase=phase), now, acted=acted):
                self._note_hang(phase, watchdog.silence(now))
                self._cancel(status.job)
                return
        now = time.monotonic()
        tail.poll(now)
        watch.observe(tail.layers, tail.lowest_version, now)
        if status.error is not None:
            self._problems.append(f"the job can't be watched any more: {status.error}")
        elif str(message := status.document.get("message")).startswith(GAVE_UP):
            self._note_hang(str(message), watchdog.silence(now))

    def _note_hang(self, phase: str, seconds: float) -> None:
        self._hang = Hang(seconds=seconds, phase=phase, stacks=dump_stacks(self._cluster))

    def _cancel(self, job: str) -> None:
        try:
            with self._cluster.client() as client:
                client.cancel(job)
        except LayerwiseError as error:
            self._problems.append(f"the job that hangs can't be cancelled: {error}")

    def _fired_outcomes(self, began: float, layers: Mapping[int, LayerProgress]) -> list[FaultOutcome]:
        """Faults of frames and disks, as the processes have noted them."""
        if self._fired is None:
            return []
        since_epoch = time.time() - time.monotonic()
        found = [(str(fault), str(fault.kind), fault.receiver, at) for fault, at in fired_faults(self._fired.frames)]
        first = dict(reversed(fired_disk_faults(self._fired.disk)))
        found += [(fault, "disk", "", at) for fault, at in first.items()]
        return [
            FaultOutcome(
                fault=fault,
                kind=kind,
                process=process,
                at=at - since_epoch - began,
                recovery_seconds=time_to_updates(layers, at - since_epoch),
            )
            for fault, kind, process, at in sorted(found, key=lambda one: one[3])
        ]

    def _unfired(self) -> list[str]:
        if self._fired is None:
            return [str(fault) for fault in (*self._plan.frame_faults, *self._plan.disk_faults)]
        frames = {fault for fault, _ in fired_faults(self._fired.frames)}
        disk = {text for text, _ in fired_disk_faults(self._fired.disk)}
        return [
            *(str(fault) for fault in self._plan.frame_faults if fault not in frames),
            *(fault for fault in self._plan.disk_faults if fault not in disk),
        ]


def may_resume(document: Mapping[str, Any], injected: Sequence[ProcessFault], resumes: int) -> bool:
    """Whether a job that has ended, after these faults, may be told to go on, which was done ``resumes`` times.

    Only one whose shards were lost when everybody was killed at once, the coordinator too: then somebody has to say so.
    """
    killed = sum(1 for fault in injected if fault.target == EVERYBODY)
    lost = _LOST_SHARDS.search(str(document.get("message"))) is not None
    return document.get("state") == "failed" and lost and resumes < killed


def _log_facts(directory: Path, problems: list[str]) -> LogFacts | None:
    try:
        return read_log_facts(directory)
    except CorruptError as error:
        problems.append(str(error))
        return None


def _audit(directory: Path, document: Mapping[str, Any], problems: list[str]) -> AuditReport | None:
    try:
        return audit_job(directory, document)
    except (CorruptError, NotFoundError) as error:
        problems.append(f"no audit: {error}")
        return None


def _replay(directory: Path, allow_imports: Sequence[str], problems: list[str]) -> ReplayOutcome | None:
    from layerwise.replay import Replay

    try:
        report = Replay(directory, allowed_imports=allow_imports).run()
    except (CorruptError, NotFoundError, ConfigError) as error:
        problems.append(f"no replay: {error}")
        return None
    detail = f"{report.updates} updates of {report.lives} lives from version {report.start} on"
    if report.divergence is not None:
        detail = str(report.divergence)
    return ReplayOutcome(exact=report.passed, detail=report.unfinished or detail)
