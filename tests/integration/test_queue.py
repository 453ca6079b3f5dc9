"""Jobs side by side, jobs that wait, jobs that never can run, and the figures that a running cluster serves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from layerwise.api import Connection, Job
from layerwise.cluster import LocalCluster
from tests.integration.jobs import Gate, check_done, job, wait, wait_for_cut
from tests.unit.markdown import table

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
MLP = {"name": "mlp", "hidden": [12, 12, 12], "outputs": 4}


def gated_job(directory: Path, gate: Gate, **sections: Any) -> dict[str, Any]:
    """A job of six updates that waits at the gate after the fourth."""
    return job(
        directory,
        gate.data(samples=96, free=66),
        MLP,
        checkpoint={"path": str(directory), "every": 1},
        **{"train": {"steps": 6}, "async": {"window": 3, "accumulation": 4}, **sections},
    )


def waiting_for(running: Job) -> str:
    """Why the job waits."""
    status = running.status()
    assert status.state == "queued", status.message
    assert status.message == f"waiting: {status.document['waiting_for']}"
    return str(status.document["waiting_for"])


def test_two_jobs_run_side_by_side_and_the_third_waits_its_turn(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    with Connection(cluster.coordinator_address) as connection:
        first = connection.submit(gated_job(tmp_path / "first", gate))
        second = connection.submit(gated_job(tmp_path / "second", gate))
        wait_for_cut(first, 3)
        wait_for_cut(second, 3)
        third = connection.submit(gated_job(tmp_path / "third", gate))
        reason = waiting_for(third)
        assert f"needs 2 shards; 0 of 4 are free (the others work for {first.id}, {second.id})" in reason
        assert third.status().document["queue_position"] == 1
        cancelled = connection.submit(gated_job(tmp_path / "fourth", gate))
        assert cancelled.cancel().state == "cancelled"
        assert wait(cancelled).state == "cancelled"
        used = [set(one.status().document["forward_workers"]) for one in (first, second)]
        assert used[0].isdisjoint(used[1])

        gate.open()
        for one in (first, second, third):
            check_done(wait(one))
        assert not (tmp_path / "fourth").exists()


def test_a_job_that_needs_more_than_there_is_says_so(cluster: LocalCluster, tmp_path: Path, gate: Gate) -> None:
    with Connection(cluster.coordinator_address) as connection:
        large = connection.submit(gated_job(tmp_path / "large", gate, cluster={"shards": 9, "forward": 3}))
        reason = waiting_for(large)
        assert "needs 9 shards; 4 of 4 are free" in reason
        assert "needs 3 forward workers; 2 of 2 are free" in reason
        assert large.cancel().state == "cancelled"


def test_code_that_no_process_may_run_is_not_run(cluster: LocalCluster, tmp_path: Path, gate: Gate) -> None:
    values = {**gated_job(tmp_path / "foreign", gate), "model": {"import": "os.path:join"}}
    with Connection(cluster.coordinator_address) as connection:
        foreign = connection.submit(values)
        assert "--allow-import os.path" in waiting_for(foreign)
        assert foreign.cancel().state == "cancelled"


def scrape(address: str) -> dict[str, list[Any]]:
    """All samples by name."""
    with urlopen(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    samples: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def labels_served(samples: dict[str, list[Any]]) -> dict[str, set[str]]:
    """The labels of each metric of ours."""
    return {name: set(found[0].labels) for name, found in samples.items() if name.startswith("layerwise_")}


def labels_documented(role: str) -> dict[str, set[str]]:
    """What the documents say that a process of ``role`` serves about itself."""
    rows = table(OPERATIONS, "about itself:")
    return {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows if row[1] in (role, "all")}


def test_the_figures_of_a_running_job_are_served_by_its_processes(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    """The coordinator's staleness histogram is that of the job's document."""
    with Connection(cluster.coordinator_address) as connection:
        nodes = {node["name"]: node for node in connection.nodes()}
        coordinator_metrics = nodes["coordinator"]["metrics_address"]
        running = connection.submit(gated_job(tmp_path / "run", gate))
        wait_for_cut(running, 4)
        while True:  # ends once the job stands at the gate and its last reports are in
            before = running.status()
            served = scrape(coordinator_metrics)
            after = running.status()
            num_layers = before.document["blocks"][-1]["stop"]
            reported = [layer["gradients"] for layer in before.staleness["layers"]] == [16] * num_layers
            if reported and before.samples == 64 and before.staleness == after.staleness:
                break
        shard = before.document["blocks"][0]["shard"]
        own = scrape(nodes[shard]["metrics_address"])
        worker = scrape(nodes[before.document["forward_workers"][0]]["metrics_address"])
        gate.open()
        check_done(wait(running))

    def of_job(name: str, **labels: str) -> list[float]:
        wanted = {"job": running.id, **labels}
        return [one.value for one in served[name] if wanted.items() <= one.labels.items()]

    for layer in before.staleness["layers"]:
        number = str(layer["layer"])
        gradients, total = (of_job(f"layerwise_staleness_updates_{part}", layer=number)[0] for part in ("count", "sum"))
        assert gradients == layer["gradients"]
        assert total / gradients == pytest.approx(layer["mean"])
        assert of_job("layerwise_staleness_updates_bucket", layer=number, le=str(float(layer["max"]))) == [gradients]
        assert of_job("layerwise_layer_version_updates", layer=number) == [4]
    assert of_job("layerwise_samples_total", outcome="applied") == [64]
    assert of_job("layerwise_window_microbatches") == [3]
    assert of_job("layerwise_updates_total") == [4]
    assert math.isfinite(of_job("layerwise_train_loss")[0])
    assert of_job("layerwise_samples_per_second")[0] > 0
    for name in ("layerwise_queue_depth_tasks", "layerwise_activation_store_bytes", "layerwise_layer_life"):
        assert of_job(name), name
    assert {one.labels["role"]: one.value for one in served["layerwise_processes"] if one.labels["state"] == "working"}
    assert {"layerwise_heartbeat_age_seconds", "layerwise_wire_bytes_total"} <= served.keys()
    assert labels_documented("shard") == labels_served(own)
    assert labels_documented("forward") == labels_served(worker)
    for name in ("layerwise_queue_depth_tasks", "layerwise_activation_store_bytes"):
        assert all(one.labels in [known.labels for known in served[name]] for one in own[name])
