"""Blocks that move: to other processes while the job trains, and into another number of blocks when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection
from layerwise.cli.main import run
from layerwise.cluster import LocalCluster
from layerwise.errors import ConfigError, NotAllowedError
from layerwise.job_result import JobResult
from layerwise.replay import Replay
from tests.integration.jobs import (
    OPTIMIZERS,
    OWN_CODE,
    Gate,
    check_audit,
    check_done,
    check_equal_to_plain_loop,
    check_ledger,
    job,
    wait,
    wait_for_cut,
)

STEPS = 14
MODES: dict[str, dict[str, Any]] = {
    "window 1": {"cluster": {"shards": 2, "forward": 1}, "async": {"window": 1, "accumulation": 4}},
    "asynchronous": {
        "cluster": {"shards": 2, "forward": 1, "backward": {"attached": True, "detached": 1}},
        "async": {"window": 4, "accumulation": 2},
    },
}


def gated_job(directory: Path, gate: Gate, free: int, **sections: Any) -> dict[str, Any]:
    """Three epochs of 70 samples in layers with dropout and batch normalisation; every cut is kept."""
    return job(
        directory,
        gate.data(samples=70, free=free),
        {"name": "mlp", "hidden": [16, 16, 12], "dropout": 0.2, "batchnorm": True, "outputs": 4},
        checkpoint={"path": str(directory), "every": 2, "keep": 20},
        **{"train": {"steps": STEPS, "seed": 3, "optimizer": OPTIMIZERS["muon"], "schedule": "cosine"}, **sections},
    )


def shards(result: JobResult) -> list[str]:
    return [block["shard"] for block in result.document["blocks"]]


@pytest.mark.parametrize("mode", MODES)
def test_a_drained_process_hands_its_place_on_and_no_update_is_lost(
    cluster: LocalCluster, tmp_path: Path, gate: Gate, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shard of block 0 leaves, then the only forward worker, both while the job trains."""
    address = cluster.coordinator_address
    with Connection(address) as connection:
        running = connection.submit(gated_job(tmp_path / "run", gate, 48, **MODES[mode]))
        wait_for_cut(running, 2)
        before = running.status()
        first, worker = shards(before)[0], before.document["forward_workers"][0]
        try:
            assert connection.drain(first)["jobs"] == [running.id]
            connection.drain(worker)
            gate.open()
            for name in (first, worker):
                assert run(["drain", name, "--coordinator", address, "--output", "json", "--timeout", "60"]) == 0
                document = json.loads(capsys.readouterr().out)
                assert (document["jobs"], [one["state"] for one in document["processes"]]) == ([], ["drained"])
            result = wait(running)
            events = list(running.logs())
        finally:
            for name in (first, worker):
                assert run(["drain", name, "--undo", "--coordinator", address]) == 0
        assert run(["drain", first, "--undo", "--coordinator", address]) == 4
    check_done(result)
    assert result.document["recoveries"] == []
    assert first not in shards(result)
    assert worker not in result.document["forward_workers"]
    moved = next(event for event in events if "training goes on at version" in event.message)
    version = moved.fields["version"]
    assert 2 <= version < STEPS
    assert f"the cut at version {version} is durable" in [event.message for event in events]
    if mode == "window 1":
        check_equal_to_plain_loop(result)
    report = Replay(result.directory, start=0, allowed_imports=(OWN_CODE,)).run()
    assert report.passed, "\n".join(report.lines())


def test_a_drain_without_a_free_shard_is_refused_and_the_job_goes_on(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    values = gated_job(
        tmp_path / "run", gate, 48, cluster={"shards": 4, "forward": 1}, **{"async": {"window": 4, "accumulation": 2}}
    )
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(values)
        wait_for_cut(running, 2)
        name = shards(running.status())[1]
        with pytest.raises(NotAllowedError, match=f"{name} can't be drained: 1 shard of job {running.id} is there"):
            connection.drain(name)
        gate.open()
        result = wait(running)
    check_done(result)
    assert len({block["life"] for block in result.document["blocks"]}) == 4
    assert max(block["life"] for block in result.document["blocks"]) == 4


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_a_job_is_resumed_on_another_number_of_shards(
    cluster: LocalCluster, tmp_path: Path, gate: Gate, mode: str, before: int, after: int
) -> None:
    """At window 1 it equals the uninterrupted run bit for bit; audit and replay go through both partitions."""
    sections = {**MODES[mode], "cluster": {"shards": before, "forward": 2}}
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(gated_job(tmp_path / "run", gate, 48, **sections))
        wait_for_cut(running, 2)
        running.cancel()
        gate.open()
        stopped = wait(running)
        assert stopped.state == "cancelled", stopped.message
        assert 2 <= stopped.steps < STEPS
        check_ledger(stopped)
        check_audit(stopped)
        with pytest.raises(ConfigError, match=r"cluster\.shards is 99, but the model has only"):
            connection.resume(stopped.job, shards=99)
        resumed = wait(connection.resume(stopped.job, shards=after))
    check_done(resumed)
    assert (len(shards(stopped)), len(shards(resumed))) == (before, after)
    if mode == "window 1":
        check_equal_to_plain_loop(resumed)
    for start in (0, stopped.steps):
        report = Replay(resumed.directory, start=start, allowed_imports=(OWN_CODE,)).run()
        assert report.passed, "\n".join(report.lines())
