"""The chaos command as people call it, to its end, with everything at once."""

from __future__ import annotations

import json
from pathlib import Path

from layerwise.chaos.chaos_cluster import shape_of
from layerwise.chaos.plan import Scenario, draw_plan
from layerwise.overrides import read_job
from tests.chaos.conftest import ACCURACY, SMALL_JOB, UPDATES
from tests.integration.command import Command, write_job


def test_under_everything_at_once_the_command_trains_without_losing_a_sample_and_reports(tmp_path: Path) -> None:
    # Twice as long as the other jobs here: the result is compared with one without faults, and has to be worth that.
    updates = 2 * UPDATES
    name = write_job(tmp_path, **{**SMALL_JOB, "train": {**SMALL_JOB["train"], "steps": updates}})
    arguments = ("--scenario", "mixed", "--seed", "4", "--output", "json", "--directory", "here")
    with Command("chaos", name, *arguments, folder=tmp_path) as command:
        assert command.finish() == 0, command.errors
        report = command.document
    plan = draw_plan(Scenario.MIXED, 4, shape_of(read_job(tmp_path / name)))
    assert report["passed"], report["failures"]
    assert report["plan"] == plan.to_json()
    assert f"{len(report['faults'])} faults are planned (mixed, seed 4):" in command.errors
    assert plan.process_faults
    assert plan.frame_faults
    assert report["final"]["steps"] == report["baseline"]["steps"] == updates
    assert report["final"]["validation"]["accuracy"] > ACCURACY
    assert report["comparison"]["metric"] == "accuracy"
    assert report["audit"]["passed"]
    assert report["replay"]["exact"]
    assert json.loads((tmp_path / "here" / "report.json").read_text(encoding="utf-8")) == report
