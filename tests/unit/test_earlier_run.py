"""What `--overwrite` does to the run that lies there: nothing before the new one begins, and nothing to what is not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwise.cuts import commit_manifest, write_layer_file
from layerwise.earlier_run import ASIDE, QUEUE_FILE, EarlierRun
from layerwise.errors import BusyError, ConfigError, NotAllowedError
from layerwise.overrides import read_job
from layerwise.run_directory import DirectoryLock, directory_for, save_result, save_spec
from layerwise.server import job_store

SPEC = read_job({"name": "tiny", "model": "mlp", "data": "digits"})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run that has trained."""
    save_spec(tmp_path / "run", SPEC)
    DirectoryLock(tmp_path / "run").close()
    for name in ("cuts/00000006/layer", "events/block-0", "logs/shard-0.log", "coordinator/jobs.sqlite3"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"earlier {name}\n", encoding="utf-8")
    return tmp_path / "run"


def content(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text(encoding="utf-8")
        for path in directory.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_a_new_run_finds_an_empty_place_and_the_earlier_one_goes_when_it_begins(directory: Path) -> None:
    earlier = EarlierRun(directory)
    earlier.set_aside()
    assert {path.name for path in directory.iterdir()} == {ASIDE, "lock"}
    save_spec(directory, SPEC)
    earlier.delete()
    assert set(content(directory)) == {"job.json"}


def test_where_the_new_run_does_not_begin_the_earlier_one_is_as_it_was_with_the_logs_of_the_attempt(
    directory: Path,
) -> None:
    before = content(directory)
    earlier = EarlierRun(directory)
    earlier.set_aside()
    for name in ("job.json", "coordinator/jobs.sqlite3", "logs/shard-0.log", "logs/shard-1.log"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"new {name}\n", encoding="utf-8")
    assert "stays as it was" in earlier.put_back()
    logs = {"logs/shard-0.log": "earlier logs/shard-0.log\nnew logs/shard-0.log\n"}
    assert content(directory) == {**before, **logs, "logs/shard-1.log": "new logs/shard-1.log\n"}
    assert not (directory / ASIDE).exists()


def test_where_nothing_lies_there_is_nothing_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        earlier = EarlierRun(path)
        assert not earlier.set_aside()
        assert earlier.put_back() == ""
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_that_is_overwritten_in_vain_is_the_next_runs_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert not EarlierRun(tmp_path / "run").set_aside()
    save_spec(tmp_path / "run", SPEC)
    DirectoryLock(tmp_path / "run").close()
    save_result(tmp_path / "run", {"state": "failed"})
    assert directory_for(tmp_path / "run") == tmp_path / "run"


def begin_and_crash(directory: Path) -> None:
    """What a run leaves that is killed before its first update."""
    EarlierRun(directory).set_aside()
    save_spec(directory, SPEC)
    for name in ("events/block-0", "logs/shard-0.log"):
        (directory / name).parent.mkdir()
        (directory / name).write_text(f"crashed {name}\n", encoding="utf-8")


def test_after_a_crash_of_the_new_run_the_earlier_one_is_still_the_one_to_be_put_back(directory: Path) -> None:
    before = content(directory)
    begin_and_crash(directory)
    earlier = EarlierRun(directory)
    assert earlier.set_aside()
    assert {path.name for path in directory.iterdir()} == {ASIDE, "lock"}
    save_spec(directory, SPEC)
    assert "stays as it was" in earlier.put_back()
    assert content(directory) == before


def test_a_crash_just_after_the_earlier_run_was_put_aside_leaves_a_folder_of_ours(directory: Path) -> None:
    before = content(directory)
    (directory / "notes.txt").write_text("seed 3 was best", encoding="utf-8")
    EarlierRun(directory).set_aside()
    earlier = EarlierRun(directory)
    assert earlier.set_aside()
    earlier.put_back()
    assert content(directory) == {**before, "notes.txt": "seed 3 was best"}


def save_cut(directory: Path) -> None:
    file = write_layer_file(directory, 4, 0, 1, b"weights")
    manifest = {
        "version": 4,
        "spec": SPEC.model_dump(mode="json", by_alias=True),
        "files": [{"layer": 0, "life": 1, "name": file.name, "bytes": file.num_bytes, "digest": file.digest}],
    }
    commit_manifest(directory, 4, json.dumps(manifest), life=1)


def test_where_the_new_run_came_as_far_as_a_cut_it_is_the_one_to_be_put_back(directory: Path) -> None:
    begin_and_crash(directory)
    save_cut(directory)
    before = content(directory)
    earlier = EarlierRun(directory)
    assert earlier.set_aside()
    earlier.put_back()
    assert content(directory) == {name: text for name, text in before.items() if not name.startswith(ASIDE)}


def test_a_run_of_a_cluster_is_known_by_its_cuts(tmp_path: Path) -> None:
    save_cut(tmp_path)
    (tmp_path / "notes.txt").write_text("seed 3 was best", encoding="utf-8")
    assert EarlierRun(tmp_path).set_aside()


@pytest.mark.parametrize("name", ["thesis.tex", "events/birthday.ics", "cuts/film.mp4", "logs/captain.log"])
def test_what_layerwise_has_not_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work", encoding="utf-8")
    with pytest.raises(NotAllowedError, match="was not made by layerwise"):
        EarlierRun(tmp_path)
    assert content(tmp_path) == {name: "years of work"}


def test_a_job_file_of_another_program_is_no_proof(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"job": "print"}', encoding="utf-8")
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(NotAllowedError, match="was not made by layerwise"):
        EarlierRun(tmp_path)


def test_a_folder_with_a_job_file_of_ones_own_is_no_run(tmp_path: Path) -> None:
    save_spec(tmp_path, SPEC)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "diary.log").write_text("years of work", encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(NotAllowedError, match="was not made by layerwise"):
        EarlierRun(tmp_path)
    assert content(tmp_path) == before
    assert not (tmp_path / "lock").exists()


def test_a_damaged_job_file_is_a_runs_only_beside_our_queue(directory: Path) -> None:
    (directory / "job.json").write_text("{", encoding="utf-8")
    (directory / QUEUE_FILE).unlink()
    with pytest.raises(NotAllowedError, match="was not made by layerwise"):
        EarlierRun(directory)
    assert QUEUE_FILE.name == job_store.FILE


def test_a_damaged_run_can_be_overwritten(directory: Path) -> None:
    (directory / "job.json").write_text("{", encoding="utf-8")
    earlier = EarlierRun(directory)
    earlier.set_aside()
    earlier.delete()
    assert content(directory) == {}


def test_what_a_user_has_put_beside_a_run_stays(directory: Path) -> None:
    (directory / "notes.txt").write_text("seed 3 was best", encoding="utf-8")
    earlier = EarlierRun(directory)
    earlier.set_aside()
    earlier.delete()
    assert content(directory) == {"notes.txt": "seed 3 was best"}


def test_a_directory_is_not_pulled_from_under_a_running_job(directory: Path) -> None:
    before, earlier = content(directory), EarlierRun(directory)
    lock = DirectoryLock(directory)
    with pytest.raises(BusyError, match="in use by process"):
        EarlierRun(directory)
    with pytest.raises(BusyError, match="in use by process"):
        earlier.set_aside()
    lock.close()
    assert content(directory) == before


def test_a_run_that_can_not_be_moved_is_left_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, earlier, move = content(directory), EarlierRun(directory), Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "events" and target.parent.name == ASIDE:
            raise PermissionError(13, "Permission denied")
        return move(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ConfigError, match="can't be overwritten: Permission denied"):
        earlier.set_aside()
    assert content(directory) == before


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        EarlierRun(tmp_path / "run")
