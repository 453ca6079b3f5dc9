"""``layerwise train`` and ``resume DIRECTORY``: a cluster that lives as long as the job."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from layerwise.cli.main import run
from layerwise.cuts import newest_cut
from layerwise.run_directory import spec_in
from tests.integration.command import Command, write_job

ENDLESS = {"steps": 1_000_000, "optimizer": "adamw"}


@pytest.mark.timeout(240)
def test_ctrl_c_stops_with_a_cut_and_resume_goes_on_from_it(tmp_path: Path) -> None:
    """Once on another number of shards, and then on that number."""
    with Command("train", write_job(tmp_path, train=ENDLESS), "-o", "json", folder=tmp_path) as command:
        command.wait_for("step ")
        command.interrupt()
        assert command.finish() == 130, command.errors
        before = command.document
    assert before["state"] == "cancelled"
    assert len(before["blocks"]) == 2
    assert before["steps"] == newest_cut(tmp_path / "runs" / "tiny")
    assert "go on with it: layerwise resume runs/tiny" in command.errors

    for count, options in enumerate((["--shards", "1"], []), start=1):
        with Command("resume", "runs/tiny", *options, "-o", "json", folder=tmp_path) as command:
            command.wait_for(f"training begins at version {before['steps']}")
            command.wait_for("step ")
            command.interrupt()
            assert command.finish() == 130, command.errors
            document = command.document
        assert document["steps"] > before["steps"]
        assert document["resume_count"] == count
        assert len(document["blocks"]) == 1
        assert document["ledger"]["samples_leased"] == document["ledger"]["samples_applied"]
        before = document
    assert spec_in(tmp_path / "runs" / "tiny").cluster.shards == 1
    assert run(["audit", str(tmp_path / "runs" / "tiny")]) == 0


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    # A job that waits for what never comes has no update to stop at; so the first Ctrl-C does not end it, whatever the machine's speed.
    with Command("train", write_job(tmp_path, train=ENDLESS), "-o", "json", folder=tmp_path) as command:
        command.wait_for("training begins")
        shard = command.child("shard-1")
        children = psutil.Process(command.process.pid).children()
        shard.suspend()
        command.interrupt()
        command.wait_for("interrupt again to end at once")
        command.interrupt()
        assert command.finish() == 130, command.errors
        assert psutil.wait_procs(children, timeout=30)[1] == []
        assert command.document["job"] == "tiny-1"
    assert "layerwise resume runs/tiny" in command.errors


def test_a_cluster_does_not_outlive_a_command_that_is_killed(tmp_path: Path) -> None:
    with Command("train", write_job(tmp_path, train=ENDLESS), folder=tmp_path) as command:
        command.wait_for("training begins")
        children = psutil.Process(command.process.pid).children()
        command.process.kill()
        assert len(children) == 4
        assert psutil.wait_procs(children, timeout=30)[1] == []


def test_a_killed_worker_or_shard_is_started_again_and_training_goes_on(tmp_path: Path) -> None:
    job = write_job(tmp_path, train=ENDLESS, checkpoint={"every": 5})
    with Command("train", job, "-o", "json", folder=tmp_path) as command:
        command.wait_for("is durable")
        command.child("forward-0").send_signal(signal.SIGKILL)
        command.wait_for("takes a free place")
        command.wait_for("is durable")
        command.child("shard-0").send_signal(signal.SIGKILL)
        command.wait_for("shard shard-0 (block 0) was lost")
        command.wait_for("block 0 goes back")
        command.wait_for("training goes on at version ")
        command.wait_for("is durable")
        command.interrupt()
        assert command.finish() == 130, command.errors
        document = command.document
    assert "Traceback" not in command.errors
    assert document["state"] == "cancelled"
    assert [(one["block"], one["shard"]) for one in document["recoveries"]] == [(0, "shard-0")]
    assert document["ledger"]["samples_leased"] == document["ledger"]["samples_applied"]
    assert document["ledger"]["samples_dropped"] == 0
    assert run(["audit", str(tmp_path / "runs" / "tiny")]) == 0


def test_a_shard_killed_while_the_job_stops_does_not_keep_it_from_stopping_with_a_cut(tmp_path: Path) -> None:
    job = write_job(tmp_path, train=ENDLESS, checkpoint={"every": 5})
    with Command("train", job, "-o", "json", folder=tmp_path) as command:
        command.wait_for("is durable")
        shard = command.child("shard-1")
        command.interrupt()
        shard.send_signal(signal.SIGKILL)
        assert command.finish() == 130, command.errors
        document = command.document
    assert "Traceback" not in command.errors
    assert document["state"] == "cancelled"
    assert document["cuts"][-1]["version"] == document["steps"]
    assert run(["audit", str(tmp_path / "runs" / "tiny")]) == 0


def test_a_job_that_can_not_begin_says_why_once_and_does_not_speak_of_resuming(tmp_path: Path) -> None:
    job = write_job(tmp_path, data={"name": "arrays", "path": "missing.safetensors", "batch": 4})
    with Command("train", job, "--quiet", "-o", "json", folder=tmp_path) as command:
        assert command.finish() == 1, command.errors
    reason, end = command.errors.splitlines()
    assert reason.startswith("error: data.path: no file at ")
    assert end == "layerwise: job tiny-1 failed; nothing was trained; the logs of its processes are in runs/tiny/logs"

    # The earlier attempt's failure is not told again.
    with Command("resume", "runs/tiny", folder=tmp_path) as command:
        assert command.finish() == 1, command.errors
    assert command.errors.count("missing.safetensors") == 1


def test_code_of_ones_own_is_not_run_unless_it_is_allowed(tmp_path: Path) -> None:
    """That it is when it is allowed is tested with the README's example."""
    job = write_job(tmp_path, model={"import": "own_model:build"})
    with Command("train", job, folder=tmp_path) as command:
        assert command.finish() == 5
    assert command.errors.startswith("layerwise: ")
    assert "--allow-import own_model" in command.errors
    assert not (tmp_path / "runs").exists()


def test_where_code_of_ones_own_raised_is_in_the_log_that_the_command_names(tmp_path: Path) -> None:
    """Nothing had it, with --debug neither."""
    (tmp_path / "own_model.py").write_text(
        "from torch import nn\n\n\nclass Breaks(nn.Module):\n    def forward(self, inputs):\n"
        "        if self.training:\n            raise KeyError('my own mistake')\n        return inputs\n\n\n"
        "def build():\n    return [nn.Flatten(), nn.Linear(64, 8), Breaks(), nn.Linear(8, 10)]\n",
        encoding="utf-8",
    )
    job = write_job(tmp_path, model={"import": "own_model:build"})
    with Command("train", job, "--allow-import", "own_model", "--quiet", folder=tmp_path) as command:
        assert command.finish() == 1
    assert "my own mistake" in command.errors
    log = "runs/tiny/logs/shard-0.log"
    assert command.errors.endswith(f"for a traceback see {log}")
    assert "raise KeyError('my own mistake')" in (tmp_path / log).read_text(encoding="utf-8")


def test_plan_shows_each_blocks_part(tmp_path: Path) -> None:
    with Command("plan", write_job(tmp_path), "-o", "json", folder=tmp_path) as command:
        assert command.finish() == 0, command.errors
        document = command.document
    blocks = document["blocks"]
    assert [block["start"] for block in blocks] == [0, blocks[0]["stop"]]
    assert sum(block["parameters"] for block in blocks) == 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    assert sum(block["cost_share"] for block in blocks) == pytest.approx(1.0)
    assert blocks[0]["expected_staleness"] > blocks[-1]["expected_staleness"] == 0.0
    assert document["settings"]["max_staleness"] >= document["settings"]["expected_staleness"]
    assert (document["settings"]["window"], document["settings_on_slow_links"]["window"]) == (2, 4)

    with Command("plan", write_job(tmp_path), "--set", "async.window=2", folder=tmp_path) as command:
        assert command.finish() == 0, command.errors
        assert "on slow links" not in command.output
