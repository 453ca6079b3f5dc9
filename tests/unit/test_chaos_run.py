"""When a chaos run is taken to hang, when it is told to go on, and that what goes wrong ends in its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import layerwise.chaos.run
import layerwise.chaos.status_watch
from layerwise.chaos.chaos_cluster import SHORT_TIMEOUTS
from layerwise.chaos.faults import ProcessFault, ProcessFaultKind
from layerwise.chaos.plan import ChaosPlan, Scenario
from layerwise.chaos.report import ChaosReport
from layerwise.chaos.run import ChaosRun, may_resume
from layerwise.chaos.status_watch import StatusWatch
from layerwise.chaos.watchdog import SILENT_SECONDS, Stand, Watchdog, silent_seconds, waiting_seconds
from layerwise.errors import NotFoundError
from layerwise.job import parse_job
from layerwise.sections import Timeouts

JOB = {"name": "small", "model": {"name": "mlp", "hidden": [8]}, "data": {"name": "digits", "batch": 32}}


def stand(num_updates: int, phase: str = "training") -> Stand:
    return Stand(num_updates=num_updates, phase=phase)


def test_a_run_hangs_when_neither_updates_nor_phase_move() -> None:
    dog = Watchdog(20.0, 100.0)
    assert not dog.observe(stand(3), 101.0)
    assert not dog.observe(stand(3), 121.0)
    assert dog.observe(stand(3), 121.1)
    assert dog.silence(121.5) == 20.5


@pytest.mark.parametrize("seen", [{"stand": stand(4)}, {"stand": stand(3, "evaluating")}, {"acted": True}])
def test_an_update_a_phase_and_a_fault_are_movement(seen: dict[str, Any]) -> None:
    dog = Watchdog(20.0, 100.0)
    dog.observe(stand(3), 101.0)
    now = {"stand": stand(3), **seen}
    assert not dog.observe(now.pop("stand"), 130.0, **now)
    assert dog.silence(131.0) == 1.0


def test_processes_that_start_have_their_time() -> None:
    dog = Watchdog(20.0, 100.0, waiting=waiting_seconds(Timeouts(start=100.0)))
    waits = stand(3, "waiting for a shard to take the place of shard-1")
    assert not dog.observe(waits, 101.0)
    assert not dog.observe(waits, 180.0)
    assert dog.observe(waits, 181.1)
    assert not dog.observe(stand(3), 182.0)
    assert dog.observe(stand(3), 202.1)


@pytest.mark.parametrize(("lease", "task"), [(6.0, 3.0), (10.0, 5.0), (60.0, 60.0), (0.5, 0.1), (1.0, 300.0)])
def test_the_watchdog_comes_before_the_job_gives_itself_up(lease: float, task: float) -> None:
    found = silent_seconds(Timeouts(lease=lease, task=task))
    assert found < lease + 4 * task
    assert found >= min(SILENT_SECONDS, 0.8 * (lease + 4 * task))


def test_with_the_usual_short_time_outs_it_waits_as_long_as_the_documentation_says() -> None:
    assert silent_seconds(Timeouts(**SHORT_TIMEOUTS)) == SILENT_SECONDS


def kill(target: str) -> ProcessFault:
    return ProcessFault(kind=ProcessFaultKind.KILL, target=target, at_version=3)


LOST = "shard shard-1 (block 1) was lost (it ended), and no other took its place within 5 s (at version 7)"


@pytest.mark.parametrize(
    ("state", "message", "injected", "resumes", "allowed"),
    [
        ("failed", LOST, [kill("all")], 0, True),
        ("failed", "block 0 lost its shard 6 times before training began", [kill("all")], 0, True),
        ("failed", LOST, [kill("all")], 1, False),
        ("failed", LOST, [], 0, False),
        ("failed", LOST, [kill("shard:1")], 0, False),
        ("failed", "nothing has moved for 30 s (training), so the run was given up", [kill("all")], 0, False),
        ("failed", "the loss of microbatch 3 is not finite", [kill("all")], 0, False),
        ("cancelled", LOST, [kill("all")], 0, False),
        ("done", "", [kill("all")], 0, False),
    ],
)
def test_only_a_job_whose_shards_were_lost_with_everybody_is_resumed(
    state: str, message: str, injected: list[ProcessFault], resumes: int, allowed: bool
) -> None:
    assert may_resume({"state": state, "message": message}, injected, resumes) is allowed


class Coordinator:
    """A client of a coordinator that accepts a job, and says ``document`` of it, or knows nothing of it."""

    def __init__(self, directory: Path, document: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.document = document

    def submit(self, spec_json: str) -> dict[str, Any]:
        return {"job": "small-1", "directory": str(self.directory), "spec": json.loads(spec_json)}

    def get_job(self, job: str) -> dict[str, Any]:
        if self.document is None:
            raise NotFoundError(f"there is no job {job}")
        return self.document

    def close(self) -> None:
        """Nothing is open."""


def run(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> ChaosReport:
    """One fault is planned, which never falls due."""

    @contextmanager
    def client() -> Iterator[Coordinator]:
        yield coordinator

    monkeypatch.setattr(layerwise.chaos.status_watch, "CoordinatorClient", lambda *_, **__: coordinator)
    cluster: Any = SimpleNamespace(client=client, coordinator_address="unix:/nowhere", pids={})
    plan = ChaosPlan(scenario=Scenario.MIXED, seed=0, process_faults=(kill("all"),))
    return ChaosRun(cluster, parse_job(JOB), plan).run()


def test_a_job_that_can_not_be_watched_any_more_ends_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(Coordinator(tmp_path), monkeypatch)
    assert not report.passed
    assert "the job can't be watched any more: there is no job small-1" in report.failures
    assert report.unfired == ("kill all at version 3",)


def test_a_job_that_fails_before_everybody_was_killed_stays_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(Coordinator(tmp_path, {"state": "failed", "message": LOST}), monkeypatch)
    assert report.resumes == 0
    assert f"the job is failed: {LOST}" in report.failures


def test_a_job_that_has_given_itself_up_hangs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "nothing has moved for 18 s (training), so the run was given up"
    asked: list[object] = []
    monkeypatch.setattr(layerwise.chaos.run, "dump_stacks", lambda cluster: asked.append(cluster) or {"shard-0": "..."})
    report = run(Coordinator(tmp_path, {"state": "failed", "message": message}), monkeypatch)
    assert len(asked) == 1
    assert report.hang is not None
    assert (report.hang.phase, report.hang.stacks) == (message, {"shard-0": "..."})


def test_the_watch_of_a_job_keeps_what_it_knew_when_asking_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise.chaos.status_watch, "CoordinatorClient", lambda *_, **__: Coordinator(Path()))
    with StatusWatch("unix:/nowhere", "small-1") as watch:
        assert watch.wait(30.0)
        assert watch.document == {}
        assert isinstance(watch.error, NotFoundError)
