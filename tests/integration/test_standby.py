"""Shards that are killed between cuts, in a job with standby copies: their blocks go on from the memory of another shard."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection, Job
from layerwise.cluster import LocalCluster
from layerwise.cuts import durable_cuts
from layerwise.job_result import JobResult
from layerwise.replay import Replay
from tests.integration.conftest import start
from tests.integration.jobs import OPTIMIZERS, OWN_CODE, Gate, ask_until, check_done, job, wait

STEPS = 36
EVERY = 3
"""Updates between standby copies."""
GATE = 20
"""Updates until the gate."""


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster whose shards are killed."""
    with start(shards=3, forward=1, directory=tmp_path_factory.mktemp("standby")) as running:
        running.wait_for_nodes()
        yield running


@pytest.fixture
def connection(fragile: LocalCluster) -> Iterator[Connection]:
    with Connection(fragile.coordinator_address) as made:
        yield made


def standby_job(directory: Path, gate: Gate, **sections: Any) -> dict[str, Any]:
    """A job with a cut at its end only, that trains up to the gate and waits there."""
    return job(
        directory,
        gate.data(samples=160, free=GATE * 16 + 8),
        {"name": "mlp", "hidden": [16, 16, 16], "batchnorm": True, "dropout": 0.1, "outputs": 4},
        checkpoint={"path": str(directory), "every": None, "standby": True, "standby_every": EVERY},
        **{
            "train": {"steps": STEPS, "seed": 3, "optimizer": OPTIMIZERS["muon"]},
            "cluster": {"shards": 3, "forward": 1},
            "async": {"window": 6, "accumulation": 4},
            **sections,
        },
    )


def wait_at_the_gate(running: Job) -> list[dict[str, Any]]:
    """The blocks, when nothing moves any more: each has its newest copy in another shard's memory."""
    blocks: list[dict[str, Any]] = []

    def rest() -> bool:
        blocks[:] = running.status().document["blocks"]
        versions = [block["version"] or 0 for block in blocks]
        copies = [block["standby_version"] for block in blocks]
        return versions == [GATE] * 3 and copies == [GATE - GATE % EVERY] * 3

    ask_until(rest)
    return blocks


def check_replay(result: JobResult, lives: int) -> None:
    report = Replay(result.directory, start=0, allowed_imports=(OWN_CODE,)).run()
    assert report.passed, "\n".join(report.lines())
    assert report.lives == lives
    assert report.left_out == ()


@pytest.mark.parametrize("name", ["shard-0", "shard-1", "shard-2"])
def test_a_killed_shard_costs_no_more_updates_than_there_are_between_standby_copies(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate, name: str
) -> None:
    running = connection.submit(standby_job(tmp_path / "run", gate))
    before = wait_at_the_gate(running)
    lost = next(block for block in before if block["shard"] == name)
    fragile.kill(name)
    fragile.start(name)
    gate.open()
    result = wait(running)
    check_done(result)
    (made,) = result.document["recoveries"]
    assert (made["block"], made["shard"]) == (lost["block"], name)
    assert made["cut"] == lost["standby_version"]
    assert made["rewind"] <= EVERY
    line = f"assigning block {lost['block']} at version {made['cut']}, from its copy in the memory of "
    assert any(event.message.startswith(line) for event in running.logs())
    assert durable_cuts(result.directory) == (STEPS,)
    check_replay(result, 4)


def test_with_the_shard_that_keeps_its_copies_a_block_goes_back_to_the_durable_cut(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    """Copies are kept by the next shard on the route, if all are on one machine; there is no cut yet but the initial weights."""
    running = connection.submit(standby_job(tmp_path / "run", gate))
    first, second, third = wait_at_the_gate(running)
    for block in (first, second):
        fragile.kill(block["shard"])
        fragile.start(block["shard"])
    gate.open()
    result = wait(running)
    check_done(result)
    made = {one["block"]: one["cut"] for one in result.document["recoveries"]}
    assert made == {0: 0, 1: second["standby_version"]}
    assert third["shard"] == result.document["blocks"][2]["shard"]
    check_replay(result, 5)


def test_a_stopped_job_goes_on_from_its_cut_and_forgets_its_copies(
    fragile: LocalCluster, connection: Connection, tmp_path: Path, gate: Gate
) -> None:
    running = connection.submit(standby_job(tmp_path / "run", gate))
    wait_at_the_gate(running)
    running.cancel()
    gate.open()
    stopped = wait(running)
    assert stopped.state == "cancelled", stopped.message
    assert durable_cuts(stopped.directory) == (stopped.steps,)
    for name in ("shard-0", "shard-1", "shard-2"):
        assert standby_bytes(fragile, name) == 0
    resumed = wait(connection.resume(stopped.job))
    check_done(resumed)
    check_replay(resumed, 6)


def standby_bytes(cluster: LocalCluster, name: str) -> int:
    """What the metrics of a shard say."""
    with cluster.client() as client:
        address = next(node["metrics_address"] for node in client.list_nodes() if node["name"] == name)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("layerwise_standby_bytes{"))
