"""Real jobs on a disk that refuses for a while, or that has lost something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection
from layerwise.cluster import LocalCluster
from layerwise.cuts import cut_folder, durable_cuts
from layerwise.fault_points import FIRED_VARIABLE, VARIABLE, fired_disk_faults
from tests.integration.conftest import REPOSITORY, start
from tests.integration.jobs import OPTIMIZERS, Gate, check_audit, check_done, check_ledger, job, wait, wait_for_cut


def small(directory: Path, gate: Gate, free: int = 10_000, **sections: Any) -> dict[str, Any]:
    """Twelve updates, a cut at each, of which three are kept."""
    return job(
        directory,
        gate.data(samples=70, free=free),
        {"name": "mlp", "hidden": [16], "outputs": 4},
        train={"steps": 12, "seed": 3, "optimizer": OPTIMIZERS["momentum"]},
        checkpoint={"path": str(directory), "every": 1, "keep": 3},
        **{"async": {"window": 1, "accumulation": 4}, **sections},
    )


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("cut.write:3-8:partial", "No space left on device"),
        ("cut.create:3-8:eacces", "Permission denied"),
        ("manifest.*:4-9:enospc", "No space left on device"),
    ],
)
def test_cuts_that_the_disk_refuses_cost_a_warning_each_and_nothing_else(
    tmp_path: Path, gate: Gate, faults: str, words: str
) -> None:
    fired = tmp_path / "fired"
    environment = {"PYTHONPATH": str(REPOSITORY), VARIABLE: faults, FIRED_VARIABLE: str(fired)}
    with (
        start(shards=1, forward=1, directory=tmp_path / "cluster", environment=environment) as cluster,
        Connection(cluster.coordinator_address) as connection,
    ):
        running = connection.submit(small(tmp_path / "run", gate, cluster={"shards": 1}))
        result = wait(running)
        warnings = [event.message for event in running.logs() if event.level == "warning"]
        assert cluster.problems == ()
    assert [text for text, _ in fired_disk_faults(fired)] == [faults]
    check_done(result)
    check_ledger(result)
    check_audit(result)
    given_up = [one for one in warnings if "is given up" in one]
    assert given_up
    assert all(words in one for one in given_up), given_up
    assert durable_cuts(result.directory)[-1] == 12


def test_a_damaged_cut_is_named_and_the_job_goes_on_from_the_one_before(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(small(tmp_path / "run", gate, free=40, cluster={"shards": 2}))
        wait_for_cut(running, 2)
        running.cancel()
        gate.open()
        stopped = wait(running)
        assert stopped.state == "cancelled", stopped.message
        before, newest = durable_cuts(stopped.directory)[-2:]
        damaged = sorted(cut_folder(stopped.directory, newest).glob("layer-*"))[1]
        data = damaged.read_bytes()
        damaged.write_bytes(data[:-7] + bytes([data[-7] ^ 16]) + data[-6:])
        result = wait(connection.resume(stopped.job))
        messages = [event.message for event in running.logs()]
        assert f"resumed from the cut at version {before}" in messages
        assert any(f"cut {newest} is damaged" in one and str(damaged) in one for one in messages), messages
    check_done(result)
    check_ledger(result)
    check_audit(result)


def test_a_cut_that_was_noted_and_is_gone_gives_way_to_the_one_that_is_there(
    cluster: LocalCluster, tmp_path: Path, gate: Gate
) -> None:
    """As after a crash of the coordinator between a commit and its note of it, with ``keep: 1``."""
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(small(tmp_path / "run", gate, free=40, cluster={"shards": 1}))
        wait_for_cut(running, 2)
        running.cancel()
        gate.open()
        stopped = wait(running)
        *others, newest = durable_cuts(stopped.directory)
        for path in cut_folder(stopped.directory, newest).iterdir():
            path.unlink()
        result = wait(connection.resume(stopped.job))
        assert f"resumed from the cut at version {others[-1]}" in [event.message for event in running.logs()]
    check_done(result)
    check_ledger(result)
    check_audit(result)
