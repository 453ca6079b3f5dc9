"""The chaos command as people call it, to its end."""

from __future__ import annotations

import json
from pathlib import Path

from layerwise.chaos.chaos_cluster import shape_of
from layerwise.chaos.plan import Scenario, draw_plan
from layerwise.overrides import read_job
from tests.integration.command import Command, write_job


def test_the_command_trains_under_faults_and_reports(tmp_path: Path) -> None:
    name = write_job(
        tmp_path,
        model={"name": "mlp", "hidden": [32, 32]},
        train={"steps": 60, "seed": 1, "optimizer": {"name": "adamw", "lr": 1e-2}},
        checkpoint={"every": 10},
    )
    arguments = ("--scenario", "kill-forward", "--seed", "3", "--output", "json", "--directory", "here")
    with Command("chaos", name, *arguments, folder=tmp_path) as command:
        assert command.finish() == 0, command.errors
        report = command.document
        assert "2 faults are planned (kill-forward, seed 3):" in command.errors
    assert report["passed"], report["failures"]
    assert report["plan"] == draw_plan(Scenario.KILL_FORWARD, 3, shape_of(read_job(tmp_path / name))).to_json()
    assert [fault["process"] for fault in report["faults"]] == ["forward-0", "forward-0"]
    assert report["final"]["steps"] == report["baseline"]["steps"] == 60
    assert report["comparison"]["metric"] == "accuracy"
    assert report["audit"]["passed"]
    assert report["replay"]["exact"]
    assert json.loads((tmp_path / "here" / "report.json").read_text(encoding="utf-8")) == report
