from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.errors import ConfigError, CorruptError, NotFoundError
from layerwise.overrides import read_job
from layerwise.run_directory import DirectoryLock, directory_for, load_result, save_result, save_spec, spec_in

SPEC = read_job({"name": "tiny", "model": "mlp", "data": "digits"})


def test_a_path_that_is_free_is_taken_as_it_is(tmp_path: Path) -> None:
    assert directory_for(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert directory_for(tmp_path / "run") == tmp_path / "run"


def test_a_second_run_gets_a_number_and_leaves_the_first_alone(tmp_path: Path) -> None:
    save_spec(tmp_path / "run", SPEC)
    save_spec(tmp_path / "run-2", SPEC)
    assert directory_for(tmp_path / "run") == tmp_path / "run-3"
    assert (tmp_path / "run" / "job.json").exists()


def test_a_run_that_failed_before_it_trained_anything_does_not_keep_its_path(tmp_path: Path) -> None:
    save_spec(tmp_path / "run", SPEC)
    save_result(tmp_path / "run", {"state": "failed"})
    assert directory_for(tmp_path / "run") == tmp_path / "run"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("state", "more"), [("failed", "cuts"), ("failed", "notes"), ("done", "logs"), ("cancelled", "logs"), ("", "logs")]
)
def test_what_has_trained_or_may_do_so_keeps_its_path(tmp_path: Path, state: str, more: str) -> None:
    save_spec(tmp_path / "run", SPEC)
    (tmp_path / "run" / more).mkdir()
    save_result(tmp_path / "run", {"state": state} if state else None)
    assert directory_for(tmp_path / "run") == tmp_path / "run-2"
    assert (tmp_path / "run" / more).exists()


def test_a_failed_run_that_goes_on_keeps_its_path(tmp_path: Path) -> None:
    save_spec(tmp_path / "run", SPEC)
    save_result(tmp_path / "run", {"state": "failed"})
    lock = DirectoryLock(tmp_path / "run")
    assert directory_for(tmp_path / "run") == tmp_path / "run-2"
    lock.close()


@pytest.mark.parametrize("path", ["/proc/nowhere", "file/run"])
def test_a_path_that_can_not_be_written_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"checkpoint\.path: .* can't be written into"):
        save_spec(directory_for(tmp_path / path), SPEC)


def test_with_overwrite_a_run_that_lies_there_is_not_evaded_and_not_touched_yet(tmp_path: Path) -> None:
    save_spec(tmp_path / "run", SPEC)
    assert directory_for(tmp_path / "run", overwrite=True) == tmp_path / "run"
    assert spec_in(tmp_path / "run") == SPEC


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        directory_for(tmp_path / "run")


def test_a_runs_job_is_found_again(tmp_path: Path) -> None:
    save_spec(tmp_path, SPEC)
    assert spec_in(tmp_path) == SPEC


def test_a_directory_without_a_run_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NotFoundError, match="no run in"):
            spec_in(path)


def test_a_lock_can_be_taken_again_after_its_close(tmp_path: Path) -> None:
    DirectoryLock(tmp_path).close()
    DirectoryLock(tmp_path).close()


def test_the_result_of_an_earlier_end_is_gone_once_the_run_goes_on(tmp_path: Path) -> None:
    save_result(tmp_path, {"state": "cancelled"})
    assert load_result(tmp_path) == {"state": "cancelled"}
    save_result(tmp_path, None)
    assert load_result(tmp_path) is None


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptError, match=r"result\.json"):
        load_result(tmp_path)
