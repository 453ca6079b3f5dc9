"""The event log's files: what is written is read, a crash costs one line, and nothing wrong passes unseen."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.applied import AppliedSet
from layerwise.errors import CorruptError, NotAllowedError, NotFoundError, RetryableError
from layerwise.event_log import EventLog, LogHeader, LogReader, events_folder, find_logs
from layerwise.event_records import record_from_json
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    PassEvent,
    RestoreEvent,
    UpdateEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.fault_points import Operation, points
from layerwise.ids import Attempt, Microbatch
from layerwise.machine import Machine, processor_name
from layerwise.plan import TrainingPlan

HEADER = LogHeader(
    job="digits-1",
    num_layers=4,
    start=1,
    stop=3,
    life=2,
    hash_algorithm="xxh3-128",
    plan=TrainingPlan(num_samples=100, batch=8, accumulation=2, num_updates=50),
    window=2,
    max_staleness=1,
    position_order=False,
    backward_weights="latest",
    layer_names=("Linear", "ReLU"),
    machine=Machine(processor="A", instructions="AVX2", torch="2.13", threads=2, device="cpu", precision="float32"),
)

counts = st.integers(0, 2**40)
versions = st.lists(counts, max_size=3).map(tuple)
attempts = st.builds(
    lambda epoch, start, size, attempt: Attempt(Microbatch(epoch, start, start + size), attempt),
    counts,
    counts,
    st.integers(1, 4096),
    st.integers(1, 99),
)
sets = st.builds(
    lambda watermark, gaps, dropped: AppliedSet(
        watermark, {watermark + gap for gap in gaps}, {0} if dropped and watermark else set()
    ),
    counts,
    st.sets(st.integers(1, 50)),
    st.booleans(),
)
layers = st.integers(1, 2)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        RestoreEvent,
        layer=layers,
        version=counts,
        revision=counts,
        samples=counts,
        digest=st.text(),
        applied=sets,
        buffers=sets,
    ),
    st.builds(ForwardEvent, layer=layers, attempt=attempts, number=counts, read=counts, buffers=st.booleans()),
    st.builds(
        AccumulateEvent,
        layer=layers,
        attempt=attempts,
        number=counts,
        base=counts,
        read=counts,
        mode=st.sampled_from(WeightMode),
        update=counts,
        owners=versions,
    ),
    st.builds(PassEvent, layer=layers, attempt=attempts, number=counts, read=counts),
    st.builds(
        BackwardEvent,
        layer=layers,
        attempt=attempts,
        number=counts,
        read=counts,
        mode=st.sampled_from(WeightMode),
        owners=versions,
    ),
    st.builds(
        WalkEvent,
        layer=layers,
        attempt=attempts,
        number=counts,
        detached=st.booleans(),
        reads=st.lists(st.lists(counts, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple),
    ),
    st.builds(
        UpdateEvent,
        layer=layers,
        version=counts,
        revision=counts,
        gradients=counts,
        samples=counts,
        samples_before=counts,
        staleness=counts,
        open_tickets=counts,
        learning_rate=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        digest=st.text(),
    ),
    st.builds(
        DropEvent,
        layer=layers,
        attempt=attempts,
        number=st.none() | counts,
        base=st.none() | counts,
        update=counts,
        reason=st.text(),
    ),
    st.builds(AbortEvent, layer=layers, attempt=attempts, number=counts, base=counts, version=counts),
    st.builds(CutEvent, layer=layers, version=counts, digest=st.text()),
)


def cut(version: int) -> CutEvent:
    return CutEvent(layer=1, version=version, digest=f"{version:032x}")


def write(folder: Path, number: int = 6, **bounds: int) -> list[Path]:
    """A log with ``number`` records, one segment or several; gives its files."""
    with EventLog(folder, HEADER, **bounds) as log:
        for version in range(number):
            log.append(cut(version))
            if bounds:
                log.flush()
                log.tend()
    return sorted(events_folder(folder, 1, 3, 2).iterdir())


def read(folder: Path) -> list[Event]:
    return [record.event for record in LogReader(events_folder(folder, 1, 3, 2)).records]


@given(events, counts)
def test_record_comes_back_from_its_json(event: Event, sequence: int) -> None:
    text = event.to_json(sequence)
    assert record_from_json(json.loads(text)) == (sequence, event)
    assert "\n" not in text
    assert json.dumps(json.loads(text), separators=(",", ":")) == text


def test_flushed_records_are_read_back_in_order_and_with_the_header(tmp_path: Path) -> None:
    write(tmp_path)
    reader = LogReader(events_folder(tmp_path, 1, 3, 2))
    assert reader.header == HEADER
    assert [(record.sequence, record.event) for record in reader.records] == [
        (number, cut(number)) for number in range(6)
    ]
    assert reader.torn_bytes == 0


def test_first_line_says_who_writes_and_which_format(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    checksum, text = path.read_bytes().split(b"\n")[0].split(b" ", 1)
    assert int(checksum, 16) == crc32(text)
    header = json.loads(text)
    assert (header["format"], header["format_version"]) == ("layerwise-events", 2)
    assert (header["job"], header["block"], header["life"]) == ("digits-1", [1, 3], 2)
    assert (header["segment"], header["sequence"], header["versions"]) == (0, 0, [0, 0])


def test_appended_records_reach_the_file_at_the_flush(tmp_path: Path) -> None:
    log = EventLog(tmp_path, HEADER)
    log.append(cut(0))
    assert read(tmp_path) == []
    log.flush()
    assert read(tmp_path) == [cut(0)]
    log.append(cut(1))
    log.sync()
    assert read(tmp_path) == [cut(0), cut(1)]
    log.append(cut(2))
    log.close()
    log.close()
    assert read(tmp_path) == [cut(0), cut(1), cut(2)]


def test_memory_is_bounded_by_flushing(tmp_path: Path) -> None:
    log = EventLog(tmp_path, HEADER, buffer_bytes=150)
    log.append(cut(0))
    log.append(cut(1))
    assert read(tmp_path) == [cut(0), cut(1)]
    log.close()


def test_segments_rotate_and_say_where_they_begin(tmp_path: Path) -> None:
    with EventLog(tmp_path, HEADER, segment_bytes=600) as log:
        for version in range(1, 12):
            log.append(
                UpdateEvent(
                    layer=2,
                    version=version,
                    revision=version,
                    gradients=2,
                    samples=8,
                    samples_before=8 * version - 8,
                    staleness=0,
                    open_tickets=0,
                    learning_rate=0.1,
                    digest="",
                )
            )
            log.flush()
            log.tend()
        size = log.num_bytes
    paths = sorted(events_folder(tmp_path, 1, 3, 2).iterdir())
    assert len(paths) > 2
    assert sum(path.stat().st_size for path in paths) == size
    starts = [json.loads(path.read_bytes().split(b"\n")[0][9:]) for path in paths]
    assert [start["versions"] for start in starts] == [[0, start["sequence"]] for start in starts]
    assert [record.sequence for record in LogReader(paths[0].parent).records] == list(range(11))


def test_life_is_never_written_twice(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(NotAllowedError, match="life 2 of block 1-3 has a log already"):
        EventLog(tmp_path, HEADER)


def test_threads_share_one_gap_free_sequence(tmp_path: Path) -> None:
    log = EventLog(tmp_path, HEADER, buffer_bytes=2000)
    barrier = threading.Barrier(4)

    def run(layer: int) -> None:
        barrier.wait()
        for version in range(300):
            log.append(CutEvent(layer=1 + layer % 2, version=version, digest=str(layer)))
            if version % 50 == 0:
                log.flush()

    threads = [threading.Thread(target=run, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    written = [event for event in read(tmp_path) if isinstance(event, CutEvent)]
    for layer in range(4):
        assert [event.version for event in written if event.digest == str(layer)] == list(range(300))


def test_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last + 1, len(whole)):
        path.write_bytes(whole[:length])
        reader = LogReader(path.parent)
        assert [record.event for record in reader.records] == [cut(version) for version in range(5)]
        assert reader.torn_bytes == length - last


def test_zeros_after_a_power_cut_are_left_out(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(512))
    assert read(tmp_path) == [cut(version) for version in range(6)]


def test_crash_while_a_segment_begins_loses_nothing(tmp_path: Path) -> None:
    paths = write(tmp_path, segment_bytes=100)
    whole = paths[-1].read_bytes()
    for length in (0, 5, 100):
        paths[-1].write_bytes(whole[:length])
        assert read(tmp_path) == [cut(version) for version in range(6)]


def test_log_that_never_began_is_not_found(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(NotFoundError, match="no event log begins"):
        LogReader(path.parent)
    with pytest.raises(NotFoundError, match="no event log begins"):
        LogReader(tmp_path / "elsewhere")


def test_flipped_bit_is_found_with_its_file_line_and_byte(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    whole = path.read_bytes()
    third = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for place in (third, third + 3, third + 8, third + 9, third + 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptError, match=rf"segment-000000\.log, line 3 \(byte {third}\): its checksum"):
            read(tmp_path)


def test_missing_record_is_found(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(CorruptError, match=r"line 4 .*record 2 is expected, this is record 3"):
        read(tmp_path)


def test_missing_segment_is_found(tmp_path: Path) -> None:
    paths = write(tmp_path, segment_bytes=100)
    paths[2].unlink()
    with pytest.raises(CorruptError, match="segments are missing"):
        read(tmp_path)


def test_torn_line_before_the_last_segment_is_corruption(tmp_path: Path) -> None:
    paths = write(tmp_path, segment_bytes=100)
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    with pytest.raises(CorruptError, match=r"segment-000001\.log, line 2 .*incomplete"):
        read(tmp_path)


def test_segment_of_another_log_is_found(tmp_path: Path) -> None:
    paths = write(tmp_path, segment_bytes=100)
    write(tmp_path / "other", segment_bytes=100)
    other = EventLog(tmp_path / "third", replace(HEADER, job="another"), segment_bytes=100)
    other.append(cut(0))
    other.close()
    strange = sorted(events_folder(tmp_path / "third", 1, 3, 2).iterdir())[0]
    paths[1].write_bytes(strange.read_bytes())
    with pytest.raises(CorruptError, match="does not continue the log at segment 1"):
        read(tmp_path)


def _line(value: object) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %b\n" % (crc32(text), text)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"sequence": 0, "event": "explode", "layer": 1}, "no event is called"),
        ({"sequence": 0, "event": "cut", "layer": 1, "version": 1}, "missing or too many"),
        ({"sequence": 0, "event": "cut", "layer": 1, "version": 1, "digest": "", "more": 1}, "missing or too many"),
        (
            {"sequence": 0, "event": "cut", "layer": "1", "version": 1, "digest": ""},
            "layer of event 'cut' can't be '1'",
        ),
        ({"sequence": 0, "event": "cut", "layer": True, "version": 1, "digest": ""}, "can't be True"),
        ({"sequence": 0, "event": "cut", "layer": None, "version": 1, "digest": ""}, "can't be None"),
        (
            {
                "sequence": 0,
                "event": "forward",
                "layer": 1,
                "microbatch": [0, 8],
                "attempt": 1,
                "number": 0,
                "read": 0,
                "buffers": True,
            },
            "not a microbatch",
        ),
        (
            {
                "sequence": 0,
                "event": "forward",
                "layer": 1,
                "microbatch": [0, 8, 4],
                "attempt": 1,
                "number": 0,
                "read": 0,
                "buffers": True,
            },
            "no such sample range",
        ),
        ([], "not a record"),
    ],
)
def test_record_with_a_right_checksum_and_wrong_content_is_refused(tmp_path: Path, record: object, why: str) -> None:
    (path,) = write(tmp_path, number=0)
    path.write_bytes(path.read_bytes() + _line(record))
    with pytest.raises(CorruptError, match=why):
        read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 3},
        {"machine": {"threads": 1}},
        {"format": "else"},
        {"block": [3, 1]},
        {"batch": "8"},
        {"layer_names": ["one"]},
    ],
    ids=str,
)
def test_header_that_can_not_be_meant_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    (path,) = write(tmp_path, number=0)
    header = json.loads(path.read_bytes()[9:])
    path.write_bytes(_line({**header, **change}))
    with pytest.raises(CorruptError, match="not a header that can be read"):
        LogReader(path.parent)


def test_failed_write_is_reported_by_every_later_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path, HEADER)
    log.append(cut(0))

    def full(file: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("layerwise.event_log.os.write", full)
        with pytest.raises(OSError, match="No space left"):
            log.flush()
    for call in (log.flush, log.sync, log.close):
        with pytest.raises(OSError, match="No space left"):
            call()


def test_write_that_takes_only_a_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    whole = os.write
    log = EventLog(tmp_path, HEADER)
    log.append(cut(0))
    with monkeypatch.context() as patch:
        patch.setattr("layerwise.event_log.os.write", lambda file, data: whole(file, data[:7]))
        log.flush()
    log.close()
    assert read(tmp_path) == [cut(0)]


def test_logs_of_a_job_are_found_by_life_then_block(tmp_path: Path) -> None:
    for start, stop, life in ((2, 4, 0), (0, 2, 0), (0, 2, 1), (2, 4, 1), (0, 4, 10)):
        names = ("x",) * (stop - start)
        EventLog(tmp_path, replace(HEADER, start=start, stop=stop, life=life, layer_names=names)).close()
    (tmp_path / "events" / "notes.txt").write_text("not a log")
    (tmp_path / "events" / "block-0-2" / "life-x").mkdir()
    found = [(LogReader(path).header.life, LogReader(path).header.start) for path in find_logs(tmp_path)]
    assert found == [(0, 0), (0, 2), (1, 0), (1, 2), (10, 0)]
    assert find_logs(tmp_path / "nowhere") == []


class Refusals:
    """A watcher that refuses operations whose point is in ``points`` and says when each was asked for."""

    def __init__(self, *refused: str, number: int = errno.ENOSPC) -> None:
        self.refused = set(refused)
        self.number = number
        self.asked: Counter[str] = Counter()
        self.changed = threading.Condition()

    def before(self, operation: Operation) -> None:
        with self.changed:
            self.asked[operation.point] += 1
            refused = operation.point in self.refused
            self.changed.notify_all()
        if refused:
            raise OSError(self.number, os.strerror(self.number), operation.path)

    def after(self, operation: Operation) -> None:
        with self.changed:
            self.asked[f"{operation.point} done"] += 1
            self.changed.notify_all()


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> Refusals:
    watcher = Refusals()
    monkeypatch.setattr(points, "watcher", watcher)
    return watcher


def test_a_log_goes_on_in_its_segment_while_there_is_no_room_for_the_next(tmp_path: Path, refusals: Refusals) -> None:
    log = EventLog(tmp_path, HEADER, segment_bytes=10, retry_seconds=1e6)
    for number, point in enumerate(("create", "reserve", "rename")):
        refusals.refused = {f"event-log.{point}"}
        for version in (2 * number, 2 * number + 1):
            log.append(cut(version))
            log.flush()
            log.tend()
            assert "No space left on device" in log.shortage
        refusals.refused = set()
        log.tend()
        assert log.shortage == ""
    log.close()
    assert read(tmp_path) == [cut(version) for version in range(6)]
    names = [path.name for path in sorted(log.directory.iterdir())]
    assert len(names) > 3
    assert all(name.endswith(".log") for name in names)


def test_a_full_disk_stops_new_work_while_what_is_under_way_is_still_written(
    tmp_path: Path, refusals: Refusals
) -> None:
    log = EventLog(tmp_path, HEADER, room_bytes=0, retry_seconds=1e6)
    if log._room_until is None:
        pytest.fail("the tests need a file system that can set room aside")
    refusals.refused = {"event-log.reserve"}
    version = 0
    while not log.full:
        log.append(cut(version))
        log.flush()
        log.tend()
        version += 1
    assert "no more room for the event log in" in log.shortage
    left = log._room_until - log._segment_written
    assert left > HEADER.window * 2 * 8 * 400, "the records of all open attempts must find room"
    for number in range(HEADER.window * 2 * 8):
        log.append(cut(version + number))
    log.flush()
    assert log._segment_written < log._room_until
    refusals.refused = set()
    log.tend()
    assert (log.full, log.shortage) == (False, "")
    log.close()
    assert len(read(tmp_path)) == version + HEADER.window * 2 * 8


def test_the_keeper_finds_by_itself_that_there_is_room_again(tmp_path: Path, refusals: Refusals) -> None:
    with EventLog(tmp_path, HEADER, segment_bytes=10, retry_seconds=0.01) as log:
        refusals.refused = {"event-log.create"}
        log.append(cut(0))
        log.flush()
        with refusals.changed:
            assert refusals.changed.wait_for(lambda: refusals.asked["event-log.create"] >= 4, 60)
            refusals.refused = set()
            assert refusals.changed.wait_for(lambda: refusals.asked["event-log.rename done"] >= 1, 60)
    assert log.shortage == ""
    assert [path.name for path in sorted(log.directory.iterdir())] == ["segment-000000.log", "segment-000001.log"]


def test_a_log_that_finds_no_room_at_all_is_refused_in_one_sentence(tmp_path: Path, refusals: Refusals) -> None:
    for point in ("make-folder", "create", "reserve", "write", "sync-folder"):
        refusals.refused = {f"event-log.{point}"}
        with pytest.raises(
            RetryableError, match=r"no event log can be begun in .*: No space left on device; make room"
        ):
            EventLog(tmp_path / point, HEADER)


def test_nobody_who_appends_or_flushes_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk stands still in each of its syncs while records go on being written."""
    entered, released = threading.Semaphore(0), threading.Semaphore(0)

    class Slow:
        def before(self, operation: Operation) -> None:
            if operation.point in ("event-log.sync", "event-log.sync-folder", "event-log.reserve"):
                entered.release()
                released.acquire()

        def after(self, operation: Operation) -> None:
            pass

    log = EventLog(tmp_path, HEADER, segment_bytes=10, retry_seconds=1e6)
    monkeypatch.setattr(points, "watcher", Slow())
    log.append(cut(0))
    log.flush()  # wakes the keeper: it sets room aside, syncs the segment and its folder
    version = 1
    for _ in range(3):
        entered.acquire()
        for _ in range(3):
            log.append(cut(version))
            log.flush()
            version += 1
        assert len(read(tmp_path)) == version
        released.release()
    monkeypatch.setattr(points, "watcher", None)
    for _ in range(100):
        released.release()
    log.close()
    assert read(tmp_path) == [cut(number) for number in range(version)]


def test_what_a_power_cut_may_leave_of_two_segments_is_read_to_the_last_whole_line(tmp_path: Path) -> None:
    """Until the disk has all of a segment, the next one is called otherwise: so its end may be missing."""
    paths = write(tmp_path, number=3, segment_bytes=10)
    assert [path.suffix for path in paths] == [".log"] * 4
    for path in paths[3:]:
        path.unlink()
    last = paths[2].rename(paths[2].with_suffix(".next"))
    assert read(tmp_path) == [cut(0), cut(1), cut(2)]
    whole = paths[1].read_bytes()
    for torn in (whole[:-1], whole[:-30], whole[:-30] + bytes(30), b""):
        paths[1].write_bytes(torn)
        assert read(tmp_path) == [cut(0)] if torn else True
    paths[1].write_bytes(whole)
    last.write_bytes(b"")
    assert read(tmp_path) == [cut(0), cut(1)]


def test_zeros_where_data_never_reached_the_disk_end_the_log(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    place = sum(map(len, lines[:4])) + 7
    path.write_bytes(whole[:place] + bytes(60) + whole[place + 60 :])
    reader = LogReader(path.parent)
    assert [record.event for record in reader.records] == [cut(0), cut(1), cut(2)]
    assert reader.torn_bytes == len(whole) - sum(map(len, lines[:4]))


def test_a_closed_log_writes_nothing_more(tmp_path: Path) -> None:
    log = EventLog(tmp_path, HEADER)
    log.append(cut(0))
    log.close()
    log.append(cut(1))
    log.flush()
    log.sync()
    assert read(tmp_path) == [cut(0)]


def test_logs_of_format_version_1_are_still_read(tmp_path: Path) -> None:
    (path,) = write(tmp_path, number=0)
    header = json.loads(path.read_bytes()[9:])
    del header["machine"]
    path.write_bytes(_line({**header, "format_version": 1}))
    found = LogReader(events_folder(tmp_path, 1, 3, 2)).header
    assert found == replace(HEADER, machine=None)


def test_a_machine_says_in_what_another_differs() -> None:
    here = HEADER.machine
    assert here is not None
    assert here.differences(here) == ()
    (line,) = here.differences(replace(here, threads=8))
    assert line == "threads: 2 was recorded, here is 8"


def test_a_processor_is_called_by_its_own_name_where_the_system_tells_it(tmp_path: Path) -> None:
    described = tmp_path / "cpuinfo"
    described.write_text("processor\t: 0\nmodel name\t: Fast 9000\n")
    assert processor_name(described) == "Fast 9000"
    assert processor_name(tmp_path / "none")
