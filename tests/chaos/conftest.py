"""One standing cluster that survives everything: killed processes are started again, a warm spare takes their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.chaos.faults import ProcessFault
from layerwise.chaos.plan import ChaosPlan, Scenario
from layerwise.chaos.report import ChaosReport
from layerwise.chaos.run import ChaosRun
from layerwise.client import FINAL_STATES
from layerwise.cluster import LocalCluster
from layerwise.job import JobSpec, parse_job

UPDATES = 60
HEARTBEAT_SECONDS = 2.0

Run = Callable[..., ChaosReport]


def small_job(directory: Path, updates: int = UPDATES, **sections: Any) -> JobSpec:
    """Digits with a small network on two shards, two forward workers and two detached backward workers."""
    return parse_job(
        {
            "name": "chaos",
            "model": {"name": "mlp", "hidden": [32, 32, 32]},
            "data": {"name": "digits", "batch": 32},
            "train": {"steps": updates, "seed": 1, "optimizer": {"name": "adamw", "lr": 1e-2}},
            "cluster": {"shards": 2, "forward": 2, "backward": {"attached": False, "detached": 2}},
            "async": {"window": 4, "accumulation": 4},
            "checkpoint": {"every": 5, "path": str(directory)},
            "timeouts": {"heartbeat": HEARTBEAT_SECONDS, "task": 3.0, "lease": 6.0},
            **sections,
        }
    )


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
    """Run the small job on the standing cluster under these faults of processes."""

    def run(*faults: ProcessFault, seed: int = 0, **sections: Any) -> ChaosReport:
        plan = ChaosPlan(scenario=Scenario.MIXED, seed=seed, process_faults=faults)
        return ChaosRun(cluster, small_job(tmp_path / "run", **sections), plan).run()

    return run
