"""A job that was stopped goes on: at window 1 as if nothing had happened, asynchronously with every sample accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection
from layerwise.cluster import LocalCluster
from layerwise.cuts import durable_cuts
from layerwise.errors import NotAllowedError, NotFoundError
from layerwise.verify import cut_state, first_difference
from tests.integration.conftest import start
from tests.integration.jobs import (
    OPTIMIZERS,
    Gate,
    check_audit,
    check_done,
    check_equal_to_plain_loop,
    check_ledger,
    job,
    wait,
    wait_for_cut,
)


def gated_job(directory: Path, gate: Gate, free: int, **sections: Any) -> dict[str, Any]:
    """Ten updates over two epochs and a bit of 70 samples: batch normalisation, dropout, accumulation 4, a cut an update."""
    return job(
        directory,
        gate.data(samples=70, free=free),
        {"name": "mlp", "hidden": [16, 16], "dropout": 0.2, "batchnorm": True, "outputs": 4},
        checkpoint={"path": str(directory), "every": 1},
        **{
            "train": {"steps": 12, "seed": 3, "optimizer": OPTIMIZERS["muon"], "schedule": "cosine"},
            "async": {"window": 1, "accumulation": 4},
            **sections,
        },
    )


def test_stopped_jobs_are_resumed_after_the_end_of_their_cluster(
    cluster: LocalCluster, tmp_path: Path, gate: Gate, second_gate: Gate
) -> None:
    """One at window 1, bit-equal to the uninterrupted run; one asynchronous, with two forward workers and a complete ledger."""
    asynchronous = {
        "cluster": {"shards": 2, "forward": 2},
        "async": {"window": 6, "accumulation": 2, "backward_weights": "stashed"},
    }
    with (
        start(shards=2, forward=2, directory=tmp_path / "first") as first,
        Connection(first.coordinator_address) as connection,
    ):
        exact = connection.submit(gated_job(tmp_path / "exact", gate, 36))
        wait_for_cut(exact, 2)
        exact.cancel()
        gate.open()
        stopped = wait(exact)
        assert stopped.state == "cancelled", stopped.message
        assert 2 <= stopped.steps < 12
        assert stopped.steps % 5 != 0, "it should stop in mid-epoch"
        assert f"layerwise resume {stopped.job}" in stopped.message
        check_ledger(stopped)
        check_audit(stopped)

        loose = connection.submit(gated_job(tmp_path / "loose", second_gate, 40, **asynchronous))
        wait_for_cut(loose, 2)
        loose.cancel()
        second_gate.open()
        stopped_loose = wait(loose)
        assert stopped_loose.state == "cancelled", stopped_loose.message
        assert 2 <= stopped_loose.steps < 12
        check_ledger(stopped_loose)
        check_audit(stopped_loose)

    with Connection(cluster.coordinator_address) as connection:
        resumed = wait(connection.resume(directory=stopped.directory))
        check_done(resumed)
        assert resumed.document["resume_count"] == 1
        check_equal_to_plain_loop(resumed)
        whole = wait(connection.submit(gated_job(tmp_path / "whole", gate, 0)))
        check_done(whole)
        assert first_difference(cut_state(resumed.directory, 12), cut_state(whole.directory, 12)) is None
        assert durable_cuts(resumed.directory)[-1] == 12

        resumed_loose = wait(connection.resume(directory=stopped_loose.directory))
        check_done(resumed_loose)

        with pytest.raises(NotAllowedError, match="done"):
            connection.resume(resumed.job)
        with pytest.raises(NotFoundError):
            connection.resume(directory=tmp_path / "nothing")


def test_a_synchronous_job_is_stopped_and_resumed_by_one_coordinator(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    """The final cut is bit-equal to the plain loop's; the second life goes on from a saved version of the first."""
    values = gated_job(
        tmp_path / "run",
        gate,
        36,
        mode="synchronous",
        cluster={"shards": 3, "forward": 2},
        **{"async": {"accumulation": 4}},
    )
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(values)
        wait_for_cut(running, 2)
        running.cancel()
        gate.open()
        stopped = wait(running)
        assert stopped.state == "cancelled", stopped.message
        lives = {block["life"] for block in stopped.document["blocks"]}
        resumed = wait(connection.resume(stopped.job))
    check_done(resumed)
    assert lives.isdisjoint(block["life"] for block in resumed.document["blocks"])
    check_equal_to_plain_loop(resumed)
