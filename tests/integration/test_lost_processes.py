"""Processes that are killed in mid-job: workers cost nothing, a lost shard's block goes back to the last cut, and training goes on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from layerwise.api import Connection, Job
from layerwise.cluster import LocalCluster
from layerwise.job_result import JobResult
from tests.integration.command import Command
from tests.integration.conftest import REPOSITORY
from tests.integration.jobs import (
    OPTIMIZERS,
    OWN_CODE,
    Gate,
    ask_until,
    check_audit,
    check_done,
    check_equal_to_plain_loop,
    check_ledger,
    job,
    wait,
    wait_for_cut,
)

STEPS = 36
FREE = 17 * 16
"""Samples that every forward worker gets before the gate: together they can't end a job of `STEPS` updates of 16."""


@pytest.fixture
def connection(fragile: LocalCluster) -> Iterator[Connection]:
    with Connection(fragile.coordinator_address) as made:
        yield made


def long_job(directory: Path, gate: Gate, free: int = FREE, **sections: Any) -> dict[str, Any]:
    """A job that trains up to the gate and then waits there."""
    return job(
        directory,
        gate.data(samples=100, free=free),
        {"name": "mlp", "hidden": [16, 16, 16], "batchnorm": True, "outputs": 4},
        checkpoint={"path": str(directory), "every": 5},
        **{
            "train": {"steps": STEPS, "seed": 3, "optimizer": OPTIMIZERS["muon"]},
            "cluster": {"shards": 2, "forward": 2},
            "async": {"window": 6, "accumulation": 4},
            **sections,
        },
    )


@pytest.mark.parametrize("free", [FREE, 100], ids=["in flight", "with leases that it can't load"])
def test_a_killed_forward_worker_costs_nothing(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate, free: int
) -> None:
    running = connection.submit(long_job(tmp_path / "run", gate, free))
    wait_for_cut(running, 5)
    fragile.kill("forward-1")
    gate.open()
    result = wait(running)
    fragile.start("forward-1")
    check_done(result)
    assert any("forward worker forward-1 was lost" in event.message for event in running.logs())


def test_the_only_forward_worker_is_replaced_by_a_free_one(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    running = connection.submit(long_job(tmp_path / "run", gate, cluster={"shards": 2, "forward": 1}))
    wait_for_cut(running, 5)
    name = running.status().document["forward_workers"][0]
    fragile.kill(name)
    gate.open()
    result = wait(running)
    fragile.start(name)
    check_done(result)
    assert name not in result.document["forward_workers"]


def test_a_killed_backward_worker_beside_attached_ones_costs_nothing(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    cluster = {"shards": 2, "forward": 1, "backward": {"attached": True, "detached": 2}}
    running = connection.submit(long_job(tmp_path / "run", gate, cluster=cluster))
    wait_for_cut(running, 5)
    fragile.kill("backward-0")
    gate.open()
    result = wait(running)
    fragile.start("backward-0")
    check_done(result)


def test_a_killed_backward_worker_is_replaced_where_all_are_detached(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    cluster = {"shards": 2, "forward": 1, "backward": {"attached": False, "detached": 2}}
    running = connection.submit(long_job(tmp_path / "run", gate, cluster=cluster))
    wait_for_cut(running, 5)
    fragile.kill("backward-1")
    fragile.start("backward-1")
    gate.open()
    check_done(wait(running))


def lives(result: JobResult) -> list[int]:
    return [block["life"] for block in result.document["blocks"]]


@pytest.mark.parametrize("name", ["shard-0", "shard-1"])
def test_a_killed_shard_that_is_started_again_costs_what_its_block_did_since_the_last_cut(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate, name: str
) -> None:
    running = connection.submit(long_job(tmp_path / "run", gate))
    wait_for_cut(running, 5)
    before = lives(running.status())
    fragile.kill(name)
    fragile.start(name)
    gate.open()
    result = wait(running)
    check_done(result)
    block = int(name[-1])
    assert lives(result)[block] > before[block]
    assert lives(result)[1 - block] == before[1 - block]
    (made,) = result.document["recoveries"]
    assert (made["block"], made["shard"]) == (block, name)
    assert made["cut"] >= 5
    assert result.document["resume_count"] == 0


def test_the_place_of_a_killed_shard_is_taken_by_a_free_one(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    running = connection.submit(long_job(tmp_path / "run", gate, cluster={"shards": 1, "forward": 2}))
    wait_for_cut(running, 5)
    (block,) = running.status().document["blocks"]
    name = block["shard"]
    fragile.kill(name)
    gate.open()
    result = wait(running)
    fragile.start(name)
    check_done(result)
    (block,) = result.document["blocks"]
    assert block["shard"] == {"shard-0": "shard-1", "shard-1": "shard-0"}[name]


def test_in_synchronous_mode_all_blocks_go_back_and_the_result_is_that_of_a_plain_loop(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    mode = {"mode": "synchronous", "async": {"accumulation": 4}}
    running = connection.submit(long_job(tmp_path / "run", gate, **mode))
    wait_for_cut(running, 5)
    before = lives(running.status())
    fragile.kill("shard-1")
    fragile.start("shard-1")
    gate.open()
    result = wait(running)
    check_done(result)
    assert set(before).isdisjoint(lives(result))
    check_equal_to_plain_loop(result)


def test_a_killed_coordinator_takes_its_processes_back_and_no_layer_goes_back(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    running = connection.submit(long_job(tmp_path / "run", gate))
    wait_for_cut(running, 5)
    before = lives(running.status())
    fragile.kill("coordinator")
    gate.open()
    fragile.start("coordinator")
    with fragile.client() as client:
        client.wait_until_ready(30)
    result = wait(running)
    check_done(result)
    assert lives(result) == before
    assert result.document["recoveries"] == []
    assert any("the coordinator was started again" in event.message for event in running.logs())


def test_a_coordinator_that_was_stopped_for_longer_than_others_may_be_silent_takes_nobody_for_lost(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    """Nor does anybody give up a coordinator that says nothing for so long."""
    before = {node["name"]: node["incarnation"] for node in connection.nodes()}
    running = connection.submit(long_job(tmp_path / "run", gate, timeouts={"heartbeat": 3.0}))
    wait_for_cut(running, 5)
    fragile.pause("coordinator")
    threading.Event().wait(5.0)
    fragile.unpause("coordinator")
    gate.open()
    result = wait(running)
    check_done(result)
    assert result.document["recoveries"] == []
    lines = [event.message for event in running.logs()]
    assert not [line for line in lines if "lost" in line or "started again" in line]
    assert {node["name"]: node["incarnation"] for node in connection.nodes()} == before


@pytest.mark.parametrize("name", ["shard-0", "shard-1"])
def test_a_killed_shard_that_nobody_replaces_ends_the_job_with_the_way_to_resume_it(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate, name: str
) -> None:
    running = connection.submit(long_job(tmp_path / "run", gate, timeouts={"start": 12.0}))
    wait_for_cut(running, 5)
    fragile.kill(name)
    failed = wait(running)
    gate.open()
    fragile.start(name)
    fragile.wait_for_nodes()  # the job would wait for it no longer than it did
    assert failed.state == "failed"
    assert failed.message.startswith(f"shard {name} (block {name[-1]}) was lost")
    assert "and no other took its place within 12 s" in failed.message
    assert f"layerwise resume {failed.job}" in failed.message
    assert "Traceback" not in failed.message
    assert "\n" not in failed.message
    check_audit(failed)

    resumed = wait(connection.resume(failed.job))
    check_done(resumed)
    assert resumed.document["resume_count"] == 1


def test_a_shard_that_runs_out_of_memory_is_replaced(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    once = tmp_path / "once"
    values = long_job(tmp_path / "run", gate, cluster={"shards": 1, "forward": 1})
    running = connection.submit(values | {"model": {"import": f"{OWN_CODE}:hungry", "once": str(once)}})
    wait_for_cut(running, 5)
    name = running.status().document["blocks"][0]["shard"]
    once.touch()
    gate.open()
    result = wait(running)
    fragile.start(name)
    check_done(result)
    assert result.document["blocks"][0]["shard"] != name
    lines = [event.message for event in running.logs()]
    assert any(
        f"shard {name} (block 0) was lost (" in line and "memory ran out (RuntimeError: " in line for line in lines
    )
    assert any("exit status 7" in problem and "another one takes over" in problem for problem in fragile.problems)


def check_guest_left(running: Job, role: str) -> None:
    """The cancelled job has lost nothing with the worker that had joined it."""
    result = wait(running)
    assert result.state == "cancelled", result.message
    check_ledger(result)
    check_audit(result)
    assert result.document["recoveries"] == []
    left = f"{role} worker guest, which had joined, left"
    assert any(left in event.message for event in running.logs())


def test_a_forward_worker_joins_a_running_job_and_is_killed(cluster: LocalCluster, tmp_path: Path, gate: Gate) -> None:
    """The job's own worker waits at the gate, so what goes on from there is the guest's work."""
    train = {"steps": 5000, "seed": 3, "optimizer": OPTIMIZERS["muon"]}
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(long_job(tmp_path / "run", gate, cluster={"shards": 2, "forward": 1}, train=train))
        wait_for_cut(running, 15)
        at = ("--coordinator", cluster.coordinator_address)
        options = ("--join", running.id, "--name", "guest", "--allow-import", OWN_CODE)
        with Command("forward", *options, *at, folder=REPOSITORY) as guest:
            wait_for_cut(running, 25)
            assert running.status().document["joined_workers"] == ["guest"]
            guest.process.kill()
            guest.process.wait()
        with Command("forward", "--join", "no-job", *at, folder=REPOSITORY) as stranger:
            assert stranger.finish() == 4
        running.cancel()
        gate.open()
        check_guest_left(running, "forward")
    assert "no job 'no-job' to join here" in stranger.errors


def test_a_detached_backward_worker_joins_a_running_job_and_is_killed(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    """It joins while the job stands at the gate, has done passes when it dies, and nothing is lost."""
    train = {"steps": 5000, "seed": 3, "optimizer": OPTIMIZERS["muon"]}
    shape = {"shards": 2, "forward": 1, "backward": {"attached": False, "detached": 2}}
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(long_job(tmp_path / "run", gate, cluster=shape, train=train))
        wait_for_cut(running, 15)
        at = ("--coordinator", cluster.coordinator_address, "--metrics", "127.0.0.1:0")
        options = ("--join", running.id, "--name", "guest", "--allow-import", OWN_CODE)
        with Command("backward", *options, *at, folder=REPOSITORY) as guest:
            ask_until(
                lambda: guest.process.poll() is not None or running.status().document["joined_workers"] == ["guest"]
            )
            assert guest.process.poll() is None
            gate.open()
            (address,) = (node["metrics_address"] for node in connection.nodes() if node["name"] == "guest")
            passes = 0.0
            while passes < 5:
                with urlopen(f"http://{address}/metrics", timeout=10) as page:
                    passes = float(re.findall(r"^layerwise_backward_passes_total (\S+)", page.read().decode(), re.M)[0])
            guest.process.kill()
            guest.process.wait()
        wait_for_cut(running, 5 * (running.status().steps // 5 + 2))
        running.cancel()
        check_guest_left(running, "backward")


def test_who_follows_a_training_job_hears_of_its_end_though_the_coordinator_is_started_again(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(long_job(tmp_path / "run", gate)), encoding="utf-8")
    arguments = ("submit", "--follow", "job.yaml", "--output", "json", "--coordinator", fragile.coordinator_address)
    with Command(*arguments, folder=tmp_path) as follower:
        job = follower.wait_for("submitted as").split()[-1]
        follower.wait_for("the cut at version 5 is durable")
        assert connection.job(job).status().state == "running"
        fragile.kill("coordinator")
        fragile.start("coordinator")
        fragile.wait_for_nodes()
        gate.open()
        assert follower.finish() == 0, follower.errors
        document = follower.document
    assert (document["job"], document["state"], document["steps"]) == (job, "done", STEPS)
    events = [event.message for event in connection.job(job).logs()]
    followed = [line for line in follower.lines if line.endswith("is durable")]
    assert len(followed) == sum(message.endswith("is durable") for message in events), "each event comes once"
    check_done(wait(connection.job(job)))
