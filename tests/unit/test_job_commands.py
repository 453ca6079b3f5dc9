"""Commands that follow or cancel a job: exit status and JSON at every end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli.main import run
from layerwise.errors import JobFailedError, LayerwiseError, UnreachableError
from layerwise.follow import JobFollower
from tests.unit.played_client import PlayedClient

JOB = "name: tiny\nmodel: mlp\ndata: digits\n"
AT = ["--coordinator", "unix:/played"]
RUNNING = {"job": "tiny-1", "state": "running", "steps": 3}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")


@pytest.mark.parametrize(("state", "status"), [("cancelled", 0), ("done", 0), ("failed", 1)])
def test_waiting_for_a_cancelled_job_tells_whether_it_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, status: int
) -> None:
    PlayedClient({"job": "tiny-1", "state": state}).play(monkeypatch)
    assert run(["cancel", "tiny-1", "--wait", *AT]) == status
    assert capsys.readouterr().out == f"tiny-1 {state}\n"
    assert run(["cancel", "tiny-1", *AT]) == 0


@pytest.mark.parametrize(
    "arguments", [["submit", "job.yaml", "-f"], ["resume", "tiny-1", "-f"], ["cancel", "tiny-1", "--wait"]]
)
def test_following_that_ends_before_the_job_prints_what_was_last_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    PlayedClient({**RUNNING, "num_events": 0}, endless=True).play(monkeypatch)
    assert run([*arguments, "--timeout", "0.01", "-o", "json", *AT]) == 124
    assert json.loads(capsys.readouterr().out)["steps"] == 3


def test_waiting_that_is_interrupted_prints_what_was_last_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(follower: JobFollower, *, timeout: float | None) -> dict[str, Any]:
        follower.document = RUNNING
        raise KeyboardInterrupt

    PlayedClient(RUNNING).play(monkeypatch)
    monkeypatch.setattr(JobFollower, "run", interrupt)
    assert run(["cancel", "tiny-1", "--wait", "-o", "json", *AT]) == 130
    assert json.loads(capsys.readouterr().out) == RUNNING


def test_a_job_that_was_never_seen_is_printed_as_it_was_submitted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PlayedClient(UnreachableError("away"), endless=True).play(monkeypatch)
    assert run(["submit", "job.yaml", "-f", "--timeout", "0.01", "-o", "json", *AT]) == 124
    assert json.loads(capsys.readouterr().out)["state"] == "queued"


class PlayedRun:
    """Stands for `EmbeddedRun`: ends as it is told to."""

    end: dict[str, Any] | BaseException = KeyboardInterrupt()
    interrupts = 0
    resumable = True
    how_to_resume = "layerwise resume runs/tiny"
    document = RUNNING

    def __init__(self, *, directory: Path, **arguments: Any) -> None:
        self.directory = directory

    def run(self) -> dict[str, Any]:
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def interrupt(self) -> None:
        pass


@pytest.mark.parametrize(
    ("state", "interrupts", "status"),
    [("done", 1, 0), ("cancelled", 1, 130), ("cancelled", 0, 6), ("failed", 1, 1), ("failed", 0, 1)],
)
def test_a_job_that_fails_while_it_stops_has_failed(
    monkeypatch: pytest.MonkeyPatch, state: str, interrupts: int, status: int
) -> None:
    monkeypatch.setattr("layerwise.embedded.EmbeddedRun", PlayedRun)
    monkeypatch.setattr(PlayedRun, "end", {"job": "tiny-1", "state": state})
    monkeypatch.setattr(PlayedRun, "interrupts", interrupts)
    assert run(["train", "job.yaml"]) == status


@pytest.mark.parametrize(
    ("end", "status"), [(JobFailedError("given up"), 1), (UnreachableError("away"), 3), (KeyboardInterrupt(), 130)]
)
def test_training_that_ends_without_the_job_prints_what_is_known_of_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: LayerwiseError | KeyboardInterrupt,
    status: int,
) -> None:
    monkeypatch.setattr("layerwise.embedded.EmbeddedRun", PlayedRun)
    monkeypatch.setattr(PlayedRun, "end", end)
    assert run(["train", "job.yaml", "-o", "json"]) == status
    assert json.loads(capsys.readouterr().out) == RUNNING
    assert run(["train", "job.yaml"]) == status
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("state", "named"), [("failed", True), ("cancelled", False), ("done", False)])
def test_only_a_run_that_failed_names_its_tracebacks_and_only_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, state: str, named: bool
) -> None:
    logs = tmp_path / "runs" / "tiny" / "logs"
    logs.mkdir(parents=True)
    (logs / "shard-0.log").write_text("Traceback (most recent call last)\n", encoding="utf-8")

    class Raises(PlayedRun):
        def run(self) -> dict[str, Any]:
            (logs / "shard-1.log").write_text("Traceback (most recent call last)\n", encoding="utf-8")
            return {"job": "tiny-1", "state": state, "steps": 3}

    monkeypatch.setattr("layerwise.embedded.EmbeddedRun", Raises)
    run(["train", "job.yaml", "--overwrite"])
    shown = capsys.readouterr().err
    assert ("for a traceback see runs/tiny/logs/shard-1.log" in shown) == named
    assert "shard-0.log" not in shown


@pytest.mark.parametrize(
    ("interrupts", "words"), [(1, "stopped at step 0 of ?; nothing was trained"), (0, "nothing was trained")]
)
def test_a_run_that_gave_way_to_the_earlier_one_is_not_to_be_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interrupts: int, words: str
) -> None:
    monkeypatch.setattr("layerwise.embedded.EmbeddedRun", PlayedRun)
    monkeypatch.setattr(PlayedRun, "end", {"job": "tiny-1", "state": "cancelled"})
    monkeypatch.setattr(PlayedRun, "interrupts", interrupts)
    monkeypatch.setattr(PlayedRun, "resumable", False)
    run(["train", "job.yaml"])
    assert capsys.readouterr().err.splitlines()[-1] == words
