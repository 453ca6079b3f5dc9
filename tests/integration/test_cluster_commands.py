"""Commands that talk to a coordinator, and the Python interface, against a standing cluster."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import layerwise
from layerwise.cli.main import run
from layerwise.client import CoordinatorClient
from layerwise.cluster import LocalCluster
from layerwise.errors import ConfigError, DeadlineError, NotFoundError, UnreachableError
from layerwise.follow import JobFollower, Silent
from tests.integration.command import Command, write_job

ENDLESS = {"steps": 1_000_000, "optimizer": "adamw"}


@pytest.fixture
def at(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The option that names the standing cluster; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    return ["--coordinator", cluster.coordinator_address]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """Run one command with JSON output in this process; gives what it printed."""
    capsys.readouterr()
    found = run([*arguments, "--output", "json"])
    text = capsys.readouterr()
    assert found == status, text.err
    return json.loads(text.out.splitlines()[-1]) if text.out else None


def test_a_job_from_submission_to_export(at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = shown(capsys, "submit", write_job(tmp_path), "--follow", *at)
    job = document["job"]
    assert (document["state"], document["steps"]) == ("done", 6)
    assert Path(document["directory"]) == tmp_path / "runs" / "tiny"

    assert job in [one["job"] for one in shown(capsys, "jobs", *at)]
    assert shown(capsys, "status", job, *at) == document

    assert run(["logs", job, *at]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "submitted as" in lines[0]
    assert "done" in lines[-1]
    assert run(["logs", "-f", job, *at]) == 0
    assert capsys.readouterr().out.splitlines() == lines

    assert shown(capsys, "audit", job, *at)["passed"]
    found = shown(capsys, "evaluate", job, "--device", "cpu", *at)
    assert found["loss"] == pytest.approx(document["validation"]["loss"], rel=1e-4)
    assert Path(shown(capsys, "export", job, "model", *at)["path"]).is_file()
    shown(capsys, "evaluate", job, "--cut", "99999", *at, status=4)
    shown(capsys, "resume", job, *at, status=5)


def test_cancel_saves_a_cut_and_resume_goes_on_from_it(
    at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["submit", write_job(tmp_path, train=ENDLESS), *at]) == 0
    job = capsys.readouterr().out.strip()
    wait_for_step(at[1], job, 2)
    first = shown(capsys, "cancel", job, "--wait", *at)
    assert first["state"] == "cancelled"
    assert [cut["version"] for cut in first["cuts"]] == [first["steps"]]

    assert run(["resume", job, *at]) == 0
    wait_for_step(at[1], job, first["steps"] + 1)
    second = shown(capsys, "cancel", job, "--wait", *at)
    assert second["steps"] > first["steps"]
    assert shown(capsys, "audit", job, *at)["passed"]
    assert run(["submit", "--follow", "job.yaml", "--set", "train.steps=2", *at]) == 0


def wait_for_step(address: str, job: str, step: int) -> None:
    """Follow ``job`` until it has made ``step`` updates."""

    class Enough(Exception):
        pass

    class Watcher(Silent):
        def on_document(self, document: dict[str, Any]) -> None:
            if document["steps"] >= step:
                raise Enough

    with CoordinatorClient(address) as client, pytest.raises(Enough):
        JobFollower(client, job, Watcher(), refresh_seconds=0.05).run(timeout=60)


def test_following_ends_with_the_jobs_exit_status(
    at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"name": "arrays", "path": "missing.safetensors", "batch": 4}
    failed = shown(capsys, "submit", "-f", write_job(tmp_path, data=data), *at, status=1)
    assert failed["state"] == "failed"
    assert "missing.safetensors" in failed["message"]


def test_following_with_a_timeout_ends_with_status_124(
    at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["submit", "-f", "--timeout", "0.2", write_job(tmp_path, train=ENDLESS), *at]) == 124
    error = capsys.readouterr().err.splitlines()[-1]
    assert "it goes on" in error
    shown(capsys, "cancel", error.split()[2], "--wait", *at)


def test_ctrl_c_while_following_leaves_the_job_alone(cluster: LocalCluster, tmp_path: Path) -> None:
    arguments = ("submit", "-f", write_job(tmp_path, train=ENDLESS), "--coordinator", cluster.coordinator_address)
    with Command(*arguments, folder=tmp_path) as command:
        job = command.wait_for("submitted as").split()[-1]
        command.wait_for("step ")
        command.interrupt()
        assert command.finish() == 130
    assert f"layerwise logs -f {job}" in command.errors
    with layerwise.connect(cluster.coordinator_address) as connection:
        running = connection.job(job)
        assert running.status().state == "running"
        with pytest.raises(DeadlineError, match="goes on"):
            running.wait(0.01)
        running.cancel()
        assert running.wait(60).state == "cancelled"


def test_the_python_interface_has_the_same_facts(cluster: LocalCluster, tmp_path: Path) -> None:
    write_job(tmp_path)
    with layerwise.connect(cluster.coordinator_address) as connection:
        job = connection.submit(tmp_path / "job.yaml", overrides=[f"checkpoint.path={tmp_path / 'run'}"])
        result = job.wait(60)
        assert result == job.status() == connection.job(job.id).status()
        assert result.document == connection._client.get_job(job.id)
        assert result.directory == tmp_path / "run"
        assert [event.offset for event in job.logs()] == list(range(result.document["num_events"]))
        assert job.id in [one.job for one in connection.jobs()]
        assert {node["role"] for node in connection.nodes()} == {"coordinator", "shard", "forward", "backward"}
        with pytest.raises(NotFoundError):
            connection.job("no-such-job")


def test_nodes_and_status_count_the_clusters_processes(
    cluster: LocalCluster, at: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = shown(capsys, "nodes", *at)
    assert {node["name"]: node["pid"] for node in nodes} == cluster.pids
    status = shown(capsys, "status", *at)
    assert status["processes"]["shard"]["total"] == cluster.shards
    for command in ("nodes", "status", "jobs"):
        assert run([command, *at]) == 0
    assert "shard-0" in capsys.readouterr().out
    shown(capsys, "status", "no-such-job", *at, status=4)


def test_coordinator_and_shards_answer_health_checks(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    with cluster.client() as client:
        shard = next(node for node in client.list_nodes() if node["role"] == "shard")
    for address in (cluster.coordinator_address, shard["address"]):
        assert shown(capsys, "healthcheck", address)["status"] == "serving"


def test_following_survives_a_restart_of_the_coordinator(tmp_path: Path) -> None:
    """A coordinator alone, so that the job waits: each event comes once, whatever happens in between."""
    with LocalCluster(shards=0, forward=0, directory=tmp_path / "state") as cluster, cluster.client() as client:
        values = json.loads((tmp_path / write_job(tmp_path)).read_text(encoding="utf-8"))
        with layerwise.connect(cluster.coordinator_address) as connection:
            job = connection.submit({**values, "checkpoint": {"path": str(tmp_path / "run")}})
            offsets: list[int] = []
            first, ended = threading.Event(), threading.Event()

            def follow() -> None:
                for event in client.follow_events(job.id):
                    offsets.append(event.offset)
                    first.set()
                ended.set()

            thread = threading.Thread(target=follow)
            thread.start()
            assert first.wait(30)
            cluster.kill("coordinator")
            cluster.start("coordinator")
            with cluster.client() as other:
                other.wait_until_ready(30)
                other.cancel(job.id)
            assert ended.wait(60)
            thread.join()
            assert job.status().state == "cancelled"
    assert offsets == list(range(len(offsets)))
    assert len(offsets) >= 2


def test_following_gives_up_on_a_coordinator_that_stays_away(tmp_path: Path) -> None:
    with LocalCluster(shards=0, forward=0, directory=tmp_path / "state") as cluster, cluster.client() as client:
        values = json.loads((tmp_path / write_job(tmp_path)).read_text(encoding="utf-8"))
        job = client.submit(json.dumps({**values, "checkpoint": {"path": str(tmp_path / "run")}}))["job"]
        events = client.follow_events(job, reconnect_seconds=0.2)
        next(events)
        cluster.kill("coordinator")
        with pytest.raises(UnreachableError, match=f"layerwise logs -f {job}"):
            list(events)


def test_up_is_found_by_other_commands_until_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("LAYERWISE_COORDINATOR", raising=False)
    # Port 0 is one that everybody is told.
    with Command("up", "--shards", "1", "--listen", "127.0.0.1:0", folder=tmp_path) as command:
        command.wait_for("Ctrl-C ends them")
        nodes = shown(capsys, "nodes")
        assert [node["name"] for node in nodes] == ["coordinator", "forward-0", "shard-0"]
        command.interrupt()
        assert command.finish() == 0, command.errors
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*\n", command.output)
    shown(capsys, "nodes", status=3)


def test_a_taken_port_and_a_public_address_are_refused_in_one_sentence(cluster: LocalCluster, tmp_path: Path) -> None:
    for listen, status, text in (
        (cluster.coordinator_address, 2, "is taken"),
        ("0.0.0.0:0", 5, "--insecure"),
    ):
        with Command("coordinator", "--listen", listen, "--state", "state", folder=tmp_path) as command:
            assert command.finish() == status, command.errors
        assert text in command.lines[-1]
        assert "Traceback" not in command.errors


def test_a_service_that_can_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    problems: list[tuple[str, bool]] = []

    def on_problem(sentence: str, for_good: bool) -> None:
        problems.append((sentence, for_good))

    cluster = LocalCluster(
        shards=1, forward=0, directory=tmp_path, devices=("cuda:99",), restart=True, on_problem=on_problem
    )
    with pytest.raises(ConfigError, match=r"shard-0 .* ended with exit status 2: .*cuda:99"), cluster:
        cluster.wait_for_nodes()
    assert problems
    assert problems[-1][1]
    assert cluster.pids == {}
