"""What real processes have trained is trained again in this one, to the last bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection
from layerwise.cli.main import run
from layerwise.cluster import LocalCluster
from layerwise.cuts import layer_files, load_manifest
from layerwise.event_log import EventLog, LogReader, find_logs
from layerwise.events import Event, UpdateEvent
from layerwise.job_result import JobResult
from layerwise.replay import Replay, ReplayReport, Until
from tests.integration.conftest import start
from tests.integration.jobs import (
    MODELS,
    OPTIMIZERS,
    OWN_CODE,
    Gate,
    check_done,
    finish,
    image_data,
    job,
    text_data,
    wait,
    wait_for_cut,
)

STEPS = 12
TRAIN: dict[str, Any] = {"steps": STEPS, "seed": 3, "optimizer": OPTIMIZERS["momentum"]}


def replayed(directory: str | Path, **arguments: Any) -> ReplayReport:
    return Replay(directory, start=0, allowed_imports=(OWN_CODE,), **arguments).run()


def check_replay(result: JobResult, lives: int) -> ReplayReport:
    """Every update's hash, and the saved cuts, through at least so many lives of blocks."""
    report = replayed(result.directory)
    assert report.passed, "\n".join(report.lines())
    assert report.lives >= lives
    assert report.notes == report.left_out == ()
    assert {one.version for one in report.layers} == {result.steps}
    assert result.steps in report.cuts
    return report


@pytest.mark.parametrize("weights", ["latest", "stashed", "recompute"])
def test_asynchronous_training_with_two_slots_is_replayed(
    cluster: LocalCluster, tmp_path: Path, images: Path, weights: str
) -> None:
    values = job(
        tmp_path,
        image_data(images),
        MODELS["cnn"],
        train=TRAIN,
        cluster={"shards": 3, "forward": 2, "slots": 2},
        **{"async": {"window": 3, "accumulation": 2, "backward_weights": weights}},
    )
    result = finish(cluster, values)
    report = check_replay(result, 3)
    assert report.updates == STEPS * len(report.layers)


@pytest.mark.parametrize("attached", [False, True], ids=["detached only", "mixed"])
def test_detached_workers_are_replayed(cluster: LocalCluster, tmp_path: Path, images: Path, attached: bool) -> None:
    values = job(
        tmp_path,
        image_data(images),
        MODELS["mlp"],
        train=TRAIN,
        cluster={"shards": 2, "forward": 2, "backward": {"attached": attached, "detached": 2}},
        **{"async": {"window": 4, "accumulation": 2}},
    )
    check_replay(finish(cluster, values), 2)


def test_a_language_model_is_replayed(cluster: LocalCluster, tmp_path: Path) -> None:
    values = job(
        tmp_path,
        text_data(),
        MODELS["transformer-lm"],
        train={**TRAIN, "optimizer": OPTIMIZERS["muon"], "schedule": "cosine", "clip": 1.0},
        **{"async": {"window": 3, "accumulation": 2, "delay_policy": "inverse"}},
    )
    check_replay(finish(cluster, values), 2)


def gated_job(directory: Path, gate: Gate, free: int, **sections: Any) -> dict[str, Any]:
    return job(
        directory,
        gate.data(samples=100, free=free),
        {"name": "mlp", "hidden": [16, 16], "dropout": 0.2, "batchnorm": True, "outputs": 4},
        checkpoint={"path": str(directory), "every": 2, "keep": 20},
        **{
            "train": {"steps": 14, "seed": 3, "optimizer": OPTIMIZERS["muon"]},
            "cluster": {"shards": 2, "forward": 2},
            "async": {"window": 3, "accumulation": 2},
            **sections,
        },
    )


def test_a_cancelled_and_resumed_job_is_replayed_through_both_lives(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    """And from where it was resumed, and with another number of shards than before."""
    values = gated_job(tmp_path / "run", gate, 48)
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(values)
        wait_for_cut(running, 4)
        running.cancel()
        gate.open()
        stopped = wait(running)
        assert stopped.state == "cancelled", stopped.message
        resumed = wait(connection.resume(stopped.job))
    check_done(resumed)
    report = check_replay(resumed, 4)
    assert stopped.steps in report.cuts
    later = Replay(resumed.directory, start=stopped.steps, allowed_imports=(OWN_CODE,)).run()
    assert later.passed, "\n".join(later.lines())
    assert (later.start, later.lives) == (stopped.steps, 2)


def test_blocks_whose_shards_were_killed_one_after_the_other_are_replayed(
    fragile: LocalCluster, tmp_path: Path, gate: Gate, second_gate: Gate
) -> None:
    """The other block stays in its life; what it hands on for microbatches that it has is computed again as well."""
    with Connection(fragile.coordinator_address) as connection:
        train = {"steps": 30, "seed": 3, "optimizer": OPTIMIZERS["muon"]}
        data = gate.data(second_gate, samples=100, free=96)  # all in all too few for the last update
        running = connection.submit(gated_job(tmp_path / "run", gate, 0, train=train) | {"data": data})
        # On a slow disk the job stands at the gate long before its first cut: what is done again then lies behind it.
        for version, name, behind in ((2, "shard-1", gate), (4, "shard-0", second_gate)):
            wait_for_cut(running, version)
            fragile.kill(name)
            fragile.start(name)
            behind.open()
        result = wait(running)
    check_done(result)
    check_replay(result, 4)


def test_a_job_whose_processes_were_killed_is_replayed_through_its_resume(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    """The logs end in the middle of passes; the lives after begin at the last durable cut, on another cluster."""
    with (
        start(shards=2, forward=2, directory=tmp_path / "first") as first,
        Connection(first.coordinator_address) as connection,
    ):
        first.wait_for_nodes()
        running = connection.submit(gated_job(tmp_path / "killed", gate, 96))
        wait_for_cut(running, 4)
        directory = running.status().directory
        for name in ("shard-0", "shard-1"):
            first.kill(name)
    gate.open()
    with Connection(cluster.coordinator_address) as connection:
        # The id is taken there, so the job goes on under another one.
        wait(connection.submit(gated_job(tmp_path / "another" / "killed", gate, 0)))
        resumed = wait(connection.resume(directory=directory))
    assert (resumed.state, resumed.job) == ("done", "killed-2"), resumed.message
    check_done(resumed)
    check_replay(resumed, 4)


def rewrite(directory: str, layer: int, change: Any) -> None:
    """Write the log of ``layer``'s block anew, with correct checksums."""
    for folder in find_logs(directory):
        reader = LogReader(folder)
        if not reader.header.start <= layer < reader.header.stop:
            continue
        events: list[Event] = [record.event for record in reader.records]
        shutil.rmtree(folder)
        with EventLog(directory, reader.header) as log:
            for event in change(events):
                log.append(event)


def test_the_command_stops_at_an_update_saves_it_and_names_what_was_changed(
    cluster: LocalCluster, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = job(
        tmp_path / "run",
        image_data(images),
        MODELS["mlp"],
        train=TRAIN,
        checkpoint={"path": str(tmp_path / "run"), "every": 5, "keep": 9},
        **{"async": {"window": 3, "accumulation": 2}},
    )
    directory = finish(cluster, values).directory
    saved = tmp_path / "saved"
    command = [sys.executable, "-m", "layerwise", "replay", directory, "--from", "0", "--until", "5"]
    command += ["--save", str(saved), "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["passed"] is True
    assert document["stopped_at"] == "update 5"
    assert document["saved"] == str(saved / "cuts" / "00000005")
    assert layer_files(load_manifest(saved, 5)) == layer_files(load_manifest(directory, 5)), "the same bytes"
    assert run(["evaluate", str(saved)]) == 0

    def change(events: list[Event]) -> list[Event]:
        place = next(i for i, e in enumerate(events) if isinstance(e, UpdateEvent) and (e.layer, e.version) == (1, 3))
        before, event = events[place], events[place]
        assert isinstance(event, UpdateEvent)
        assert before is event
        events[place] = UpdateEvent(**{name: getattr(event, name) for name in event.__slots__} | {"digest": "0" * 32})
        return events

    rewrite(directory, 1, change)
    capsys.readouterr()
    assert run(["replay", str(directory), "--from", "0"]) == 1
    told = capsys.readouterr().out
    assert "layer 1 in life" in told
    assert "differs at its update to version 3: another hash of the layer's state" in told
    report = replayed(directory, until=Until(update=2))
    assert report.passed, "what comes before it is reached"
