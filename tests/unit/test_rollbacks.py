"""What was rolled back is in the job's directory before training goes on, and whoever resumes it from there goes on so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.cuts import load_manifest
from layerwise.errors import CorruptError, NotFoundError
from layerwise.messages import Assignment, Role
from layerwise.rollbacks import rollbacks_in, write_rollbacks
from layerwise.server.adopted_job import read_job, with_cuts_on_disk
from layerwise.server.job_record import JobRecord
from tests.unit.played_cluster import PlayedCluster
from tests.unit.test_adopted_job import write_cut, write_cuts
from tests.unit.test_run_rollback import diverge, trained


def rollback(version: int, number: int = 1) -> dict[str, Any]:
    return {
        "time": 1.0,
        "version": version,
        "reached": version + 3,
        "why": "it diverged",
        "rate_factor": 0.5**number,
        "synchronous_until": 10,
    }


def cluster() -> PlayedCluster:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    return played


def stopped(directory: Path) -> JobRecord:
    """A job with a cut at version 4, as the coordinator that ran it knows it; its directory has one at 2 as well."""
    played = cluster()
    job = trained(played, 24)
    write_cuts(played, directory)
    write_cut(directory, 2, json.dumps(load_manifest(directory, 4)))
    return played.role.record(job)


def resumed(played: PlayedCluster, directory: Path) -> list[tuple[int, int, float, int]]:
    """What the shards are assigned by a coordinator that has only the directory: cut, and the course."""
    _, effects = played.role.adopt(read_job(directory), played.now)
    found = [one.message for one in effects if isinstance(getattr(one, "message", None), Assignment)]  # type: ignore[union-attr]
    return [
        (one.cut, one.course.version, one.course.rate_factor, one.course.synchronous_until)  # type: ignore[union-attr]
        for one in found
        if one.block >= 0  # type: ignore[union-attr]
    ]


def test_shards_are_told_what_the_directory_has_to_remember() -> None:
    played = cluster()
    job = trained(played, 24)
    diverge(played, job)
    told = [one for _, one in played.sent if isinstance(one, Assignment)]
    assert told[0].rollbacks_json == ""
    assert json.loads(told[-1].rollbacks_json) == played.role.job(job)["rollbacks"]


@pytest.mark.parametrize(("version", "cut"), [(4, 4), (2, 2), (3, 2)])
def test_a_rollback_that_no_cut_knows_of_yet_is_not_forgotten(tmp_path: Path, version: int, cut: int) -> None:
    stopped(tmp_path)
    write_rollbacks(tmp_path, [rollback(version)])
    assert resumed(cluster(), tmp_path) == [(cut, version, 0.5, 10)] * 2


def test_the_second_rollback_to_the_same_cut_is_not_forgotten_either(tmp_path: Path) -> None:
    stopped(tmp_path)
    write_rollbacks(tmp_path, [rollback(4)])
    write_rollbacks(tmp_path, [rollback(4), rollback(2, 2)])
    assert resumed(cluster(), tmp_path) == [(2, 2, 0.25, 10)] * 2


def test_a_cut_that_knows_of_the_rollback_counts(tmp_path: Path) -> None:
    stopped(tmp_path)
    write_cut(tmp_path, 6, json.dumps({**load_manifest(tmp_path, 4), "rollbacks": [rollback(2)]}))
    write_rollbacks(tmp_path, [rollback(2)])
    assert resumed(cluster(), tmp_path) == [(6, 2, 0.5, 10)] * 2


def test_where_nothing_is_left_that_was_not_rolled_back_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    stopped(tmp_path)
    write_rollbacks(tmp_path, [rollback(0)])
    with pytest.raises(NotFoundError):
        read_job(tmp_path)


def test_a_coordinator_that_knows_the_job_learns_what_another_one_has_rolled_back(tmp_path: Path) -> None:
    record = stopped(tmp_path)
    assert with_cuts_on_disk(record).rollbacks == ()
    write_rollbacks(tmp_path, [rollback(2)])
    found = with_cuts_on_disk(replace(record, directory=str(tmp_path)))
    assert (found.rollbacks, [cut.version for cut in found.cuts]) == ((rollback(2),), [2])


def test_what_is_written_once_stays(tmp_path: Path) -> None:
    write_rollbacks(tmp_path, [])
    assert rollbacks_in(tmp_path) == ()
    write_rollbacks(tmp_path, [rollback(4)])
    write_rollbacks(tmp_path, [rollback(9), rollback(2, 2)])
    assert rollbacks_in(tmp_path) == (rollback(4), rollback(2, 2))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({**rollback(1), "version": "1"})])
def test_a_file_that_is_no_rollback_is_named(tmp_path: Path, text: str) -> None:
    write_rollbacks(tmp_path, [rollback(4)])
    (tmp_path / "cuts" / "rollbacks" / "rollback-1.json").write_text(text)
    with pytest.raises(CorruptError, match=r"rollback-1\.json"):
        rollbacks_in(tmp_path)


def test_a_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    write_rollbacks(tmp_path, [rollback(4), rollback(2, 2)])
    (tmp_path / "cuts" / "rollbacks" / "rollback-1.json").unlink()
    with pytest.raises(CorruptError, match="put the missing ones back"):
        rollbacks_in(tmp_path)
