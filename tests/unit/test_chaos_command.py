"""What the chaos command prints, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerwise.chaos.chaos_cluster import SHORT_TIMEOUTS, job_for_chaos, shape_of
from layerwise.chaos.faults import ProcessFault, ProcessFaultKind
from layerwise.chaos.plan import Scenario
from layerwise.chaos.recovery import FaultOutcome
from layerwise.cli.chaos import show_report
from layerwise.cli.main import run
from layerwise.job import parse_job
from tests.unit.test_chaos_report import report

JOB = {
    "name": "small",
    "model": {"name": "mlp", "hidden": [8, 8]},
    "data": {"name": "digits", "batch": 32},
    "train": {"steps": 20},
}


def test_time_outs_are_shortened_unless_the_job_gives_them() -> None:
    job = job_for_chaos(parse_job({**JOB, "timeouts": {"task": 33.0}}), Scenario.PAUSE, Path("/runs/x"))
    assert job.timeouts.heartbeat == SHORT_TIMEOUTS["heartbeat"]
    assert job.timeouts.task == 33.0
    assert job.checkpoint_path == "/runs/x"


def test_a_job_without_detached_workers_gets_some_where_they_are_to_be_killed() -> None:
    spec = parse_job(JOB)
    assert job_for_chaos(spec, Scenario.KILL_BACKWARD, Path("/x")).cluster.num_detached == 2
    assert job_for_chaos(spec, Scenario.KILL_FORWARD, Path("/x")).cluster.num_detached == 0


def test_the_shape_of_a_job_follows_from_its_data() -> None:
    shape = shape_of(parse_job({**JOB, "checkpoint": {"every": 7}}))
    assert (shape.num_updates, shape.num_cuts, shape.shards) == (20, 3, 2)
    assert shape.num_microbatches >= 20


def test_a_job_too_short_for_faults_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({**JOB, "train": {"steps": 5}}), encoding="utf-8")
    assert run(["chaos", "job.json"]) == 2
    assert "5 updates are too few" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_the_report_shows_what_each_fault_cost_and_why_the_run_failed() -> None:
    outcome = FaultOutcome(
        fault=str(ProcessFault(kind=ProcessFaultKind.KILL, target="shard:1", at_version=12)),
        kind="kill",
        process="shard-1",
        at=3.25,
        version=13,
        recovery_seconds=1.5,
        stall_seconds=1.6,
        replaced=True,
    )

    runner = CliRunner()
    with runner.isolation() as (output, errors, _):
        show_report(report(faults=(outcome,), unfired=("kill forward:0 at version 30",)))
        text, complaint = output.getvalue().decode(), errors.getvalue().decode()
    assert "kill shard:1 at version 12  shard-1" in text
    assert "1.50 s" in text
    assert "yes" in text
    assert "FAILED" in text
    assert "did not happen: kill forward:0" in complaint
