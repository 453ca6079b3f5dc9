from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.cuts import commit_manifest, cut_folder
from layerwise.errors import NotFoundError
from layerwise.messages import Assignment, CommitCut, Role
from layerwise.server.adopted_job import read_job, unused_directory
from layerwise.server.job_record import JobState
from tests.unit.played_cluster import PlayedCluster, spec


def write_cuts(played: PlayedCluster, directory: Path) -> None:
    """Put on disk what the first shard would have."""
    for _, message in played.sent:
        if isinstance(message, CommitCut):
            folder = cut_folder(directory, message.version)
            folder.mkdir(parents=True)
            for file in message.files:
                (folder / file.name).write_bytes(bytes(file.num_bytes))
            commit_manifest(directory, message.version, message.manifest_json, message.keep)


def stopped_job(directory: Path) -> dict[str, Any]:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    played.hold = lambda worker, lease: len(played.leases) >= 20
    job = played.submit()
    played.kill("shard-1")
    write_cuts(played, directory)
    return played.role.job(job)


def test_another_coordinator_goes_on_from_the_directory_alone_and_gives_lives_above_all_that_ever_were(
    tmp_path: Path,
) -> None:
    before = stopped_job(tmp_path)
    (tmp_path / "events" / "block-0-2" / "life-7").mkdir(parents=True)
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    played._saved = {before["job"]: {}}
    record = read_job(tmp_path)
    document, effects = played.role.adopt(record, played.now)
    assignments = [effect.message for effect in effects if isinstance(getattr(effect, "message", None), Assignment)]
    assert (document["job"], document["resume_count"], document["directory"]) == ("toy-1", 1, str(tmp_path))
    assert assignments[0].cut == 4
    assert [place.life for place in assignments[0].route] == [8, 9]
    assert [cut["version"] for cut in document["cuts"]] == [4]


def test_a_name_that_is_taken_here_gets_another_number(tmp_path: Path) -> None:
    stopped_job(tmp_path)
    played = PlayedCluster()
    played.submit(spec(checkpoint={"path": "elsewhere"}))
    document, _ = played.role.adopt(read_job(tmp_path), played.now)
    assert document["job"] == "toy-2"


def test_a_directory_without_a_cut_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no durable cut in"):
        read_job(tmp_path)


def test_no_run_writes_into_what_an_earlier_one_left(tmp_path: Path) -> None:
    wanted = tmp_path / "run"
    assert unused_directory(wanted) == str(wanted)
    (wanted / "cuts").mkdir(parents=True)
    (tmp_path / "run-2" / "events").mkdir(parents=True)
    assert unused_directory(wanted) == str(tmp_path / "run-3")


def test_the_cuts_in_the_directory_stand_against_those_that_a_killed_coordinator_noted(tmp_path: Path) -> None:
    before = stopped_job(tmp_path)
    found = read_job(tmp_path)
    played = PlayedCluster()
    played.role._put(replace(found, job=before["job"], state=JobState.FAILED, cuts=(), next_life=1))
    document, _ = played.role.adopt(found, played.now)
    assert [cut["version"] for cut in document["cuts"]] == [4]
    assert played.role.record(before["job"]).next_life == found.next_life
