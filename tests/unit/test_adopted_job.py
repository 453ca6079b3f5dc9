from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.cuts import commit_manifest, cut_folder, durable_cuts, load_manifest, write_layer_file
from layerwise.errors import BusyError, CorruptError, NotFoundError
from layerwise.messages import Assignment, CommitCut, Role
from layerwise.server.adopted_job import read_job, unused_directory, with_cuts_on_disk
from layerwise.server.job_record import JobState
from tests.unit.played_cluster import PlayedCluster, spec


def write_cuts(played: PlayedCluster, directory: Path) -> None:
    """Put on disk what the first shard would have."""
    for _, message in played.sent:
        if isinstance(message, CommitCut):
            write_cut(directory, message.version, message.manifest_json, message.keep)


def write_cut(directory: Path, version: int, manifest_json: str, keep: tuple[int, ...] = ()) -> None:
    """Write files for the layers that the manifest names, and the manifest with their hashes."""
    manifest = json.loads(manifest_json)
    manifest["version"] = version
    for file in manifest["files"]:
        data = f"layer {file['layer']} at {version}".encode()
        written = write_layer_file(directory, version, file["layer"], file["life"], data)
        file.update(name=written.name, bytes=written.num_bytes, digest=written.digest)
    commit_manifest(directory, version, json.dumps(manifest), keep, life=1)


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
    played.role._book.put(replace(found, job=before["job"], state=JobState.FAILED, cuts=(), next_life=1))
    document, _ = played.role.adopt(found, played.now)
    assert [cut["version"] for cut in document["cuts"]] == [4]
    assert played.role.record(before["job"]).next_life == found.next_life


def damage(directory: Path, version: int) -> Path:
    """Flip a bit of the cut's first layer."""
    path = next(cut_folder(directory, version).glob("layer-000.*"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    return path


def job_with_two_cuts(directory: Path) -> None:
    """Cuts 4 and 6 of one job."""
    stopped_job(directory)
    write_cut(directory, 6, json.dumps(load_manifest(directory, 4)), keep=(4,))


def test_a_damaged_newest_cut_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    job_with_two_cuts(tmp_path)
    path = damage(tmp_path, 6)
    record = read_job(tmp_path)
    assert [cut.version for cut in record.cuts] == [4]
    assert record.warnings == (
        f"cut 6 is damaged, cut 4 is used instead: {path} does not have the hash that the manifest says; "
        "use an older cut",
    )
    assert [cut.version for cut in with_cuts_on_disk(replace(record, cuts=(), warnings=())).cuts] == [4]


def test_a_job_without_any_sound_cut_is_refused_with_the_file(tmp_path: Path) -> None:
    job_with_two_cuts(tmp_path)
    damage(tmp_path, 4)
    path = damage(tmp_path, 6)
    with pytest.raises(CorruptError, match=f"no cut in .* is sound: {path}"):
        read_job(tmp_path)


def test_a_recorded_cut_that_is_gone_gives_way_to_the_one_that_is_there(tmp_path: Path) -> None:
    """With ``keep: 1`` and a coordinator killed between the commit and its note: cut 4 is noted, cut 6 is there."""
    job_with_two_cuts(tmp_path)
    noted = replace(read_job(tmp_path), cuts=(read_job(tmp_path).cuts[0],), next_life=1)
    write_cut(tmp_path, 8, json.dumps(load_manifest(tmp_path, 6)))
    assert durable_cuts(tmp_path) == (8,)
    record = with_cuts_on_disk(noted)
    assert [cut.version for cut in record.cuts] == [8]
    assert record.next_life >= noted.next_life
    assert record.warnings == noted.warnings


def test_a_known_cut_keeps_what_was_recorded_of_it(tmp_path: Path) -> None:
    job_with_two_cuts(tmp_path)
    noted = read_job(tmp_path)
    noted = replace(noted, cuts=tuple(replace(cut, time=77.0) for cut in noted.cuts))
    assert with_cuts_on_disk(noted) == noted


def test_a_directory_that_is_not_seen_from_here_leaves_the_record_as_it_is(tmp_path: Path) -> None:
    job_with_two_cuts(tmp_path / "run")
    noted = replace(read_job(tmp_path / "run"), directory=str(tmp_path / "elsewhere"))
    assert with_cuts_on_disk(noted) == noted


def test_a_job_for_which_the_queue_has_no_room_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_job(tmp_path)
    played = PlayedCluster()
    monkeypatch.setattr("layerwise.server.job_queue.MAX_QUEUED", 0)
    with pytest.raises(BusyError, match="0 jobs wait already"):
        played.role.adopt(read_job(tmp_path), played.now)
    assert played.role.jobs() == []


def test_a_job_whose_recorded_cuts_are_all_gone_does_not_begin_again_unasked(tmp_path: Path) -> None:
    job_with_two_cuts(tmp_path)
    noted = read_job(tmp_path)
    for version in (4, 6):
        for path in cut_folder(tmp_path, version).iterdir():
            path.unlink()
    with pytest.raises(NotFoundError, match="none of the cuts 4, 6 of job toy-1 is in"):
        with_cuts_on_disk(noted)
