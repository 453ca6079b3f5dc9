"""A run on a cluster of its own: when it starts a spare, and what is left where it does not begin. Nothing is started here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from layerwise.embedded import SPARE_AFTER_SECONDS, EmbeddedRun
from layerwise.errors import ConfigError, JobFailedError, LayerwiseError, NotAllowedError
from layerwise.job import parse_job
from layerwise.job_result import JobResult
from layerwise.progress import ProgressLines
from layerwise.run_directory import DirectoryLock, directory_for, load_result, save_result, save_spec, spec_in
from tests.unit.played_client import PlayedClient

SPEC = parse_job({"name": "tiny", "model": "mlp", "data": "digits"})


class Clock:
    """Stands for the time module."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class FakeCluster:
    """Counts what it is asked for."""

    spares = 0

    def keep_spare(self) -> None:
        self.spares += 1


def run_with(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *, spare: bool
) -> tuple[EmbeddedRun, Clock, FakeCluster]:
    clock, cluster = Clock(), FakeCluster()
    monkeypatch.setattr("layerwise.embedded.time", clock)
    run = EmbeddedRun(SPEC, directory, ProgressLines(io.StringIO(), quiet=True), spare=spare)
    monkeypatch.setattr(run, "_cluster", cluster)
    return run, clock, cluster


def test_the_spare_starts_some_time_after_the_first_update_and_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, clock, cluster = run_with(monkeypatch, tmp_path, spare=True)
    for document, seconds, expected in (
        ({}, 0.0, 0),
        ({"steps": 0}, 1000.0, 0),
        ({"steps": 1}, 1.0, 0),
        ({"steps": 2}, SPARE_AFTER_SECONDS / 2, 0),
        ({"steps": 3}, SPARE_AFTER_SECONDS / 2, 1),
        ({"steps": 4}, SPARE_AFTER_SECONDS, 1),
    ):
        clock.now += seconds
        run._on_document(document)
        assert cluster.spares == expected, document


def test_a_run_without_a_spare_starts_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, clock, cluster = run_with(monkeypatch, tmp_path, spare=False)
    for steps in range(5):
        clock.now += 2 * SPARE_AFTER_SECONDS
        run._on_document({"steps": steps})
    assert cluster.spares == 0


class PlayedCluster:
    """Runs, and has a coordinator whose answers are written down."""

    stop_seconds = 0.0

    def __init__(self, client: PlayedClient) -> None:
        self.client = lambda: client

    def __enter__(self) -> PlayedCluster:
        return self

    def __exit__(self, *how: object) -> None:
        pass

    def wait_for_nodes(self, seconds: float) -> None:
        pass


def test_an_interrupt_while_the_coordinator_is_away_stops_the_job_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It ended the command, as if there were no coordinator."""
    client = PlayedClient({"job": "tiny-1", "state": "running"}, {"job": "tiny-1", "state": "cancelled"}).play(
        monkeypatch
    )
    client.deaf = 2
    run = EmbeddedRun(SPEC, tmp_path / "run", ProgressLines(io.StringIO(), quiet=True))
    monkeypatch.setattr(run, "_cluster", PlayedCluster(client))
    run._job = "tiny-1"
    run._stop()
    run._on_document({"state": "running"})
    assert client.cancelled == []
    run._on_document({"state": "running"})
    assert client.cancelled == ["tiny-1"]
    run._on_document({"state": "stopping"})
    assert client.cancelled == ["tiny-1"]


class NoCluster:
    """Can't be started."""

    def __enter__(self) -> NoCluster:
        raise ConfigError("shard-0 ended with exit status 2")

    def __exit__(self, *how: object) -> None:
        pass


def run_without_cluster(monkeypatch: pytest.MonkeyPatch, directory: Path, **arguments: Any) -> EmbeddedRun:
    run = EmbeddedRun(SPEC, directory, ProgressLines(io.StringIO(), quiet=True), **arguments)
    monkeypatch.setattr(run, "_cluster", NoCluster())
    return run


def test_a_run_that_could_not_be_started_does_not_keep_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = run_without_cluster(monkeypatch, tmp_path / "run")
    with pytest.raises(ConfigError, match="exit status 2"):
        run.run()
    assert run.document == load_result(tmp_path / "run")
    assert JobResult.from_document(run.document or {}).message == "shard-0 ended with exit status 2"
    assert not run.resumable
    assert directory_for(tmp_path / "run") == tmp_path / "run"


def test_a_run_that_could_not_be_resumed_keeps_its_path_and_its_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_spec(tmp_path / "run", SPEC)
    save_result(tmp_path / "run", {"state": "cancelled"})
    with pytest.raises(ConfigError, match="exit status 2"):
        run_without_cluster(monkeypatch, tmp_path / "run", resume=True).run()
    assert load_result(tmp_path / "run") == {"state": "cancelled"}


def test_a_run_whose_directory_another_one_took_meanwhile_leaves_its_result_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock = DirectoryLock(tmp_path / "run")
    with pytest.raises(ConfigError, match="exit status 2"):
        run_without_cluster(monkeypatch, tmp_path / "run").run()
    lock.close()
    assert load_result(tmp_path / "run") is None


@pytest.mark.parametrize("model", ["mlp", {"import": "own_model:build"}])
def test_overwriting_destroys_nothing_where_the_new_run_is_refused_or_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: object
) -> None:
    earlier_run_in(tmp_path / "run")
    run = EmbeddedRun(
        parse_job({"name": "new", "model": model, "data": "digits"}),
        tmp_path / "run",
        ProgressLines(io.StringIO(), quiet=True),
        overwrite=True,
    )
    monkeypatch.setattr(run, "_cluster", NoCluster())
    with pytest.raises(LayerwiseError):
        run.run()
    assert spec_in(tmp_path / "run") == SPEC
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"job.json", "cuts", "lock"}


def earlier_run_in(directory: Path) -> None:
    """One that has trained."""
    save_spec(directory, SPEC)
    (directory / "cuts").mkdir()
    DirectoryLock(directory).close()


def overwriting(
    monkeypatch: pytest.MonkeyPatch, directory: Path, document: dict[str, Any], view: ProgressLines | None = None
) -> EmbeddedRun:
    """A run in the place of an earlier one, whose job is accepted and then as ``document`` says."""
    earlier_run_in(directory)
    client = PlayedClient({"job": "tiny-1", **document}, endless=document["state"] == "running").play(monkeypatch)
    new = parse_job({"name": "new", "model": "mlp", "data": "digits"})
    run = EmbeddedRun(new, directory, view or ProgressLines(io.StringIO()), overwrite=True)
    monkeypatch.setattr(run, "_cluster", PlayedCluster(client))
    return run


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_an_accepted_job_that_ends_before_its_first_update_leaves_the_earlier_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    said = io.StringIO()
    message = "no such attribute; go on with `layerwise resume tiny-1`"
    run = overwriting(monkeypatch, tmp_path, {"state": state, "steps": 0, "message": message}, ProgressLines(said))
    document = run.run()
    assert (document["state"], document["message"]) == (state, "no such attribute")
    assert not run.resumable
    assert spec_in(tmp_path) == SPEC
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "cuts", "lock"}
    assert f"the earlier run in {tmp_path} stays as it was" in said.getvalue()


@pytest.mark.parametrize(("state", "steps"), [("failed", 1), ("cancelled", 1), ("done", 8), ("done", 0)])
def test_a_job_that_has_trained_or_is_done_takes_the_earlier_runs_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, steps: int
) -> None:
    message = "ended; go on with `layerwise resume tiny-1`"
    run = overwriting(monkeypatch, tmp_path, {"state": state, "steps": steps, "message": message})
    document = run.run()
    assert run.resumable
    assert (run.how_to_resume in document["message"]) == bool(steps)
    assert spec_in(tmp_path).name == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "lock", "result.json"}


def test_a_process_given_up_before_the_first_update_leaves_the_earlier_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    view = GivesUp(io.StringIO())
    run = view.run = overwriting(monkeypatch, tmp_path, {"state": "running", "steps": 0}, view)
    with pytest.raises(JobFailedError) as caught:
        run.run()
    assert str(caught.value) == "shard-0 ended with exit status 1"
    assert not run.resumable
    assert spec_in(tmp_path) == SPEC


class GivesUp(ProgressLines):
    """A view that has a process of the run given up as soon as the job is seen."""

    run: EmbeddedRun

    def on_document(self, document: dict[str, Any]) -> None:
        self.run._on_problem("shard-0 ended with exit status 1", True)


@pytest.mark.parametrize("temporary", [False, True])
def test_what_was_known_of_a_job_is_there_after_a_process_was_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temporary: bool
) -> None:
    earlier_run_in(tmp_path / "run")
    client = PlayedClient({"job": "tiny-1", "state": "running", "steps": 3}, endless=True).play(monkeypatch)
    view = GivesUp(io.StringIO())
    run = view.run = EmbeddedRun(SPEC, tmp_path / "run", view, temporary=temporary, overwrite=True)
    monkeypatch.setattr(run, "_cluster", PlayedCluster(client))
    with pytest.raises(JobFailedError) as caught:
        run.run()
    advice = "" if temporary else f"; go on with `layerwise resume {tmp_path / 'run'}`"
    assert str(caught.value) == f"shard-0 ended with exit status 1{advice}"
    assert run.document == {"job": "tiny-1", "state": "failed", "steps": 3, "message": str(caught.value)}
    assert run.resumable
    # It has begun, so that the run which it overwrites is gone, and this one can be resumed.
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"job.json", "lock"}


def test_a_run_that_may_not_be_resumed_keeps_its_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**named: Any) -> dict[str, Any]:
        raise NotAllowedError("job tiny-1 is done")

    save_spec(tmp_path / "run", SPEC)
    save_result(tmp_path / "run", {"state": "done"})
    run = EmbeddedRun(SPEC, tmp_path / "run", ProgressLines(io.StringIO()), resume=True)
    client = PlayedClient({})
    monkeypatch.setattr(client, "resume", refuse)
    monkeypatch.setattr(run, "_cluster", PlayedCluster(client))
    with pytest.raises(NotAllowedError):
        run.run()
    assert load_result(tmp_path / "run") == {"state": "done"}
