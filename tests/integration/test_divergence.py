"""Training that collapses on real processes: it stops, or goes back and learns all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection
from layerwise.cluster import LocalCluster
from layerwise.cuts import durable_cuts, load_manifest
from layerwise.event_log import LogReader, find_logs
from layerwise.job_audit import audit_job
from layerwise.job_result import JobResult
from tests.integration.jobs import check_audit, check_ledger, job, wait

STEPS = 300


def reckless(directory: Path, seed: int, **train: Any) -> dict[str, Any]:
    """SGD at twice a rate that trains well synchronously, in a window of 8 with an update for every microbatch.

    The rate falls, so that the window, once it is open again, does not make training collapse just before its end.
    """
    return job(
        directory,
        {"name": "digits", "batch": 32},
        {"name": "mlp", "hidden": [64, 64, 64]},
        train={
            "steps": STEPS,
            "seed": seed,
            "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9},
            "schedule": {"name": "cosine", "warmup": 0.0},
            **train,
        },
        cluster={"shards": 4},
        checkpoint={"path": str(directory), "every": 20, "keep": 2},
        **{"async": {"window": 8, "accumulation": 1, "delay_policy": "constant"}},
    )


def run(cluster: LocalCluster, values: dict[str, Any]) -> JobResult:
    with Connection(cluster.coordinator_address) as connection:
        return wait(connection.submit(values))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_rollback_rescues_what_collapses(cluster: LocalCluster, tmp_path: Path, seed: int) -> None:
    result = run(cluster, reckless(tmp_path / "run", seed, on_divergence="rollback"))
    assert result.state == "done", result.message
    check_ledger(result)
    check_audit(result)
    assert audit_job(result.directory, result.document).check("rollbacks").applicable
    rollbacks = result.document["rollbacks"]
    assert 1 <= len(rollbacks) <= 2
    assert all(one["version"] < one["reached"] for one in rollbacks)
    assert result.validation is not None
    assert result.validation["accuracy"] > 0.85, rollbacks
    newest = load_manifest(result.directory, durable_cuts(result.directory)[-1])
    assert newest["rollbacks"] == rollbacks
    last: dict[int, float] = {}
    for folder in find_logs(result.directory):
        header = LogReader(folder).header
        last[header.start] = header.rate_factor
    assert set(last.values()) == {0.5 ** len(rollbacks)}


def test_by_default_the_job_stops_when_training_collapses(cluster: LocalCluster, tmp_path: Path) -> None:
    hopeless = {"name": "sgd", "lr": 20.0, "momentum": 0.9}
    result = run(cluster, reckless(tmp_path / "run", 0, schedule="constant", optimizer=hopeless))
    assert result.state == "failed", (result.train_loss, result.validation)
    assert "training diverges: the loss" in result.message or "is not finite" in result.message
    assert result.steps < STEPS
    assert result.document["rollbacks"] == []
