"""One standing cluster that survives everything: killed processes are started again, a warm spare takes their place.

What has to be planned before processes start, or needs processes that are free, runs on a cluster of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.chaos.chaos_cluster import cluster_for, shape_of
from layerwise.chaos.plan import ChaosPlan, JobShape
from layerwise.chaos.report import ChaosReport
from layerwise.chaos.run import ChaosRun
from layerwise.client import FINAL_STATES
from layerwise.cluster import LocalCluster
from layerwise.job import JobSpec, parse_job

UPDATES = 60
ACCURACY = 0.7
"""Far above guessing, below any run of the small job without faults."""
HEARTBEAT_SECONDS = 2.0

Run = Callable[..., ChaosReport]


SMALL_JOB: dict[str, Any] = {
    "name": "chaos",
    "model": {"name": "mlp", "hidden": [32, 32, 32]},
    "data": {"name": "digits", "batch": 32},
    "train": {"steps": UPDATES, "seed": 1, "optimizer": {"name": "adamw", "lr": 1e-2}},
    "cluster": {"shards": 2, "forward": 2, "backward": {"attached": False, "detached": 2}},
    "async": {"window": 4, "accumulation": 4},
    "checkpoint": {"every": 5},
    "timeouts": {"heartbeat": HEARTBEAT_SECONDS, "task": 3.0, "lease": 6.0, "start": 60.0},
}
"""Digits with a small network on two shards, two forward workers and two detached backward workers."""


def small_job(directory: Path, updates: int = UPDATES, **sections: Any) -> JobSpec:
    """`SMALL_JOB` with its cuts in ``directory``, so many ``updates``, and other ``sections``."""
    train = {**SMALL_JOB["train"], "steps": updates}
    checkpoint = {**SMALL_JOB["checkpoint"], "path": str(directory)}
    return parse_job({**SMALL_JOB, "train": train, "checkpoint": checkpoint, **sections})


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two processes of each role, and a spare; they end before the tests of other folders."""
    folder = tmp_path_factory.mktemp("standing")
    with LocalCluster(
        shards=2, forward=2, backward=2, directory=folder, threads=1, serve_metrics=False, restart=True, spare=True
    ) as running:
        running.wait_for_nodes()
        yield running


@pytest.fixture
def cluster(standing: LocalCluster) -> Iterator[LocalCluster]:
    """All processes are there before a run, and no job is left after it."""
    standing.wait_for_nodes()
    yield standing
    with standing.client() as client:
        for one in client.list_jobs():
            if one["state"] not in FINAL_STATES:
                client.cancel(one["job"])


@pytest.fixture
def under(cluster: LocalCluster, tmp_path: Path) -> Run:
    """Run the small job on the standing cluster under the faults of processes in ``plan`` (of the job's shape)."""

    def run(plan: Callable[[JobShape], ChaosPlan], **sections: Any) -> ChaosReport:
        job = small_job(tmp_path / "run", **sections)
        return ChaosRun(cluster, job, plan(shape_of(job))).run()

    return run


@pytest.fixture
def alone(tmp_path: Path) -> Run:
    """Run the small job on a cluster of its own, as large as ``plan`` (of the job's shape) wants it."""

    def run(plan: Callable[[JobShape], ChaosPlan], **sections: Any) -> ChaosReport:
        job = small_job(tmp_path / "run", **sections)
        drawn = plan(shape_of(job))
        running, fired = cluster_for(job, drawn, tmp_path, threads=1)
        with running:
            running.wait_for_nodes()
            running.wait_for_spare()
            report = ChaosRun(running, job, drawn, fired=fired).run()
            with running.client() as client:
                states = {node["name"]: node["state"] for node in client.list_nodes()}
        assert set(states.values()) <= {"free", "serving"}, "somebody still works for the job"
        assert states.keys() == set(running.names), "somebody has not come back"
        return report

    return run
