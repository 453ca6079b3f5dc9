"""What goes of the event logs, what stays, and that an audit finds the same afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.audit import audit_directory
from layerwise.audit_report import AuditReport
from layerwise.errors import CorruptError
from layerwise.event_log import EventLog, LogReader, find_logs
from layerwise.events import AccumulateEvent, CutEvent, ForwardEvent, UpdateEvent
from layerwise.fault_points import Operation, points
from layerwise.fences import Fence, raise_fence
from layerwise.log_header import checked_line
from layerwise.log_retention import LogKeeper, remove_old_records
from layerwise.log_summary import load_summary, summaries_in
from tests.unit.audited_job import CUT, PLAN, World, failed, honest, rate

SEGMENT = 1500


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"layerwise.disk.os.{name}", lambda file: None)


def write(world: World, directory: Path, segment_bytes: int = SEGMENT) -> None:
    """Put the world's logs on disk, and the fences of its lives."""
    for block in world.blocks:
        header = block.header
        version = CUT if header.life else 0
        raise_fence(directory, Fence(life=header.life, start=header.start, stop=header.stop, version=version))
        with EventLog(directory, header, segment_bytes=segment_bytes, retry_seconds=1e6) as log:
            for _, event in block.records:
                log.append(event)
                log.flush()
                log.tend()


def one_life(seed: int = 4, window: int = 3) -> World:
    world = World(seed, window)
    world.live(0, updates=PLAN.num_updates + 1)
    return world


def audited(world: World, directory: Path) -> AuditReport:
    return audit_directory(directory, ledger=world.ledger, plan=PLAN, learning_rate=rate)


def remove(directory: Path, oldest: int = CUT, kept_bytes: int = 0) -> int:
    return remove_old_records(directory, oldest, kept_bytes=kept_bytes, learning_rate=rate)


def num_files(directory: Path) -> int:
    return sum(len(list(folder.glob("segment-*"))) for folder in find_logs(directory))


def same(before: AuditReport, after: AuditReport) -> None:
    """The same findings on the same layers; attempts are counted anew where their numbers begin."""
    assert after.layers == before.layers
    assert failed(after) == failed(before) == []
    for one, other in zip(before.checks, after.checks, strict=True):
        if one.name != "numbers":
            assert (one.name, one.examined) == (other.name, other.examined)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [1, 3, 7])
def test_an_audit_finds_the_same_after_the_removal(tmp_path: Path, seed: int, window: int) -> None:
    world = honest(seed, window)
    write(world, tmp_path)
    before, files = audited(world, tmp_path), num_files(tmp_path)
    assert remove(tmp_path) > 0
    assert num_files(tmp_path) < files
    same(before, audited(world, tmp_path))
    assert remove(tmp_path) == 0
    first, second = (LogReader(folder) for folder in find_logs(tmp_path) if "life-0" in folder.name)
    assert (first.segments, second.segments) == ((), ())
    assert first.summary is not None
    assert first.summary.whole


@pytest.mark.parametrize("seed", range(6))
def test_everything_from_the_oldest_kept_cut_on_stays_with_the_attempts_under_way_there(
    tmp_path: Path, seed: int
) -> None:
    world = one_life(seed)
    write(world, tmp_path, 400)
    before = audited(world, tmp_path)
    assert remove(tmp_path) > 0
    same(before, audited(world, tmp_path))
    for folder, block in zip(find_logs(tmp_path), world.blocks, strict=True):
        events = [event for _, event in block.records]
        kept = [record.event for record in LogReader(folder).records]
        assert kept == events[-len(kept) :]
        assert len(kept) < len(events)
        first = min(place for place, event in enumerate(events) if isinstance(event, CutEvent))
        assert events[first:] == kept[-len(events[first:]) :]
        for event in events[first:]:
            if isinstance(event, AccumulateEvent):
                assert any(
                    isinstance(one, ForwardEvent) and (one.attempt, one.layer) == (event.attempt, event.layer)
                    for one in kept
                )


def test_a_small_log_is_left_whole_and_a_large_one_only_made_small_enough(tmp_path: Path) -> None:
    world = one_life()
    write(world, tmp_path, 400)
    size = sum(path.stat().st_size for folder in find_logs(tmp_path) for path in folder.iterdir())
    files = num_files(tmp_path)
    assert remove(tmp_path, kept_bytes=size) == 0
    assert num_files(tmp_path) == files
    assert 1 <= remove(tmp_path, kept_bytes=size - 1) < 1000
    assert num_files(tmp_path) == files - 1
    same_again = audited(world, tmp_path)
    assert remove(tmp_path) > 0
    same(same_again, audited(world, tmp_path))


def test_nothing_goes_that_the_oldest_kept_cut_may_need(tmp_path: Path) -> None:
    world = honest()
    write(world, tmp_path)
    files = num_files(tmp_path)
    assert remove(tmp_path, oldest=0) == 0
    assert num_files(tmp_path) == files


def test_a_log_that_contradicts_a_promise_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="layerwise.log_retention")
    world = one_life()
    block = world.blocks[0]
    place, update = next((n, event) for n, event in block.records if isinstance(event, UpdateEvent))
    records = list(block.records)
    records[place] = records[place]._replace(event=replace(update, samples=update.samples + 1))
    world.blocks[0] = replace(block, records=records)
    write(world, tmp_path, 400)
    before = failed(audited(world, tmp_path))
    assert before
    remove(tmp_path)
    assert failed(audited(world, tmp_path)) == before
    first, second = (LogReader(folder) for folder in find_logs(tmp_path))
    assert (first.summary, second.summary is None) == (None, False)
    assert "it contradicts a promise, so it is kept" in caplog.text


def test_a_damaged_log_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="layerwise.log_retention")
    write(one_life(), tmp_path, 400)
    path = find_logs(tmp_path)[0] / "segment-000001.log"
    path.write_bytes(path.read_bytes().replace(b'"layer":1', b'"layer":0', 1))
    remove(tmp_path)
    assert path.exists()
    assert "its checksum does not fit" in caplog.text


class Crash(Exception):
    pass


class CrashAt:
    """A watcher that raises before operation ``number``."""

    def __init__(self, number: int) -> None:
        self.left = number

    def before(self, operation: Operation) -> None:
        if self.left == 0:
            raise Crash
        self.left -= 1

    def after(self, operation: Operation) -> None:
        pass


def test_a_crash_anywhere_in_a_removal_leaves_a_log_that_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = honest(2)
    write(world, tmp_path / "whole")
    before = audited(world, tmp_path / "whole")
    number = 0
    crashed = True
    while crashed:
        directory = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        monkeypatch.setattr(points, "watcher", CrashAt(number))
        try:
            remove(directory)
        except Crash:
            crashed = True
        else:
            crashed = False
        monkeypatch.setattr(points, "watcher", None)
        same(before, audited(world, directory))
        remove(directory)
        same(before, audited(world, directory))
        number += 1
    assert number > 12


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"version": 1}, "versions"),
        ({"revision": 999}, "versions"),
        ({"samples": 77}, "updates"),
        ({"applied": {"watermark": 1, "above": [], "dropped": []}}, "updates"),
        ({"applied": {"watermark": 40, "above": [], "dropped": []}}, "exactly-once"),
        ({"left_open": 77}, "staleness-identity"),
        ({"closed_age": 99}, "staleness-identity"),
        ({"open": []}, "tickets"),
    ],
    ids=str,
)
def test_a_changed_summary_is_found(tmp_path: Path, change: dict[str, object], check: str) -> None:
    world = one_life(1, 7)
    write(world, tmp_path, 400)
    remove(tmp_path)
    folder = find_logs(tmp_path)[0]
    ((_, path),) = summaries_in(folder).items()
    value = load_summary(path).to_json()
    value["layers"]["0"].update(change)
    path.write_bytes(checked_line(json.dumps(value)))
    assert check in failed(audited(world, tmp_path))


def test_a_removed_life_still_says_what_its_cut_held(tmp_path: Path) -> None:
    world = honest()
    write(world, tmp_path)
    remove(tmp_path)
    ((_, path),) = summaries_in(find_logs(tmp_path)[0]).items()
    value = load_summary(path).to_json()
    value["layers"]["1"]["cuts"][str(CUT)]["digest"] = "another"
    path.write_bytes(checked_line(json.dumps(value)))
    assert "lives" in failed(audited(world, tmp_path))


def test_a_summary_that_does_not_fit_its_checksum_is_named(tmp_path: Path) -> None:
    write(one_life(), tmp_path, 400)
    remove(tmp_path)
    folder = find_logs(tmp_path)[0]
    ((number, path),) = summaries_in(folder).items()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"sequence":', b'"sequence":1', 1))
    with pytest.raises(CorruptError, match=rf"{path}: its checksum does not fit"):
        LogReader(folder)
    path.write_bytes(whole)
    (folder / f"segment-{number:06d}.log").unlink()
    with pytest.raises(CorruptError, match=f"segments are missing .* the first one must be {number}"):
        LogReader(folder)


def test_the_keeper_removes_in_the_background_and_survives_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="layerwise.log_retention")
    world = honest()
    write(world, tmp_path)
    files = num_files(tmp_path)
    keeper = LogKeeper(tmp_path, kept_bytes=0)
    monkeypatch.setattr("layerwise.log_retention.save_summary", _refuse)
    keeper.release(CUT)
    keeper.close()
    assert num_files(tmp_path) == files
    assert "are not removed: [Errno 28] full" in caplog.text
    monkeypatch.undo()
    keeper = LogKeeper(tmp_path, kept_bytes=0)
    keeper.release(CUT)
    keeper.close()
    assert num_files(tmp_path) < files


def _refuse(*_: object) -> None:
    raise OSError(28, "full")
