r"""The event log's files.

One folder for each block and life, segments of bounded size in it; a life is written by one process and never
reopened::

    <job directory>/events/block-0-4/life-1/segment-000000.log
    <8 hex digits: CRC-32 of the JSON> <header as compact JSON>\n    who wrote this, under which promises, from where
    <8 hex digits: CRC-32 of the JSON> <record as compact JSON>\n    see `layerwise.events`
    ...

Records gather in memory until `EventLog.flush`, which the shard calls before anything that follows from them leaves
the process. So a process crash loses only what nobody has seen, and a power cut at most what came after the last
`EventLog.sync`; both can leave one incomplete line at the very end, which readers leave out. Anything else that is
wrong is a `CorruptError`.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from layerwise.errors import CorruptError, NotAllowedError, NotFoundError
from layerwise.events import Event, Record, RestoreEvent, UpdateEvent, record_from_json
from layerwise.plan import TrainingPlan

FORMAT = "layerwise-events"
FORMAT_VERSION = 1
SEGMENT_BYTES = 64 * 2**20
BUFFER_BYTES = 2**20
_SEGMENT = re.compile(r"segment-(\d{6})\.log")
_LIFE = re.compile(r"life-(\d+)")
_BLOCK = re.compile(r"block-(\d+)-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """Who writes this log, and what it promises.

    Block ``[start, stop)`` of the ``num_layers`` layers of ``job`` in ``life``, trained under ``plan`` with
    ``window`` microbatches open. ``max_staleness`` is the promise in updates. ``position_order``: gradients are
    summed in position order. ``hash_algorithm`` names that of the updates' digests. ``layer_names`` belong to the
    block's layers. What a rollback has changed: learning rates are ``rate_factor`` times those of the schedule; up to
    version ``synchronous_until`` no gradient is stale; ``moments_forgotten``: the optimizers began anew at the restore.
    """

    job: str
    num_layers: int
    start: int
    stop: int
    life: int
    hash_algorithm: str
    plan: TrainingPlan
    window: int
    max_staleness: int
    position_order: bool
    backward_weights: str
    layer_names: tuple[str, ...]
    rate_factor: float = 1.0
    synchronous_until: int = 0
    moments_forgotten: bool = False

    def __post_init__(self) -> None:
        names_fit = len(self.layer_names) == self.stop - self.start
        if not 0 <= self.start < self.stop <= self.num_layers or not names_fit or self.life < 0:
            raise ValueError(
                f"not a block's log: layers [{self.start}, {self.stop}), life {self.life}, names {self.layer_names}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in the first line of a segment."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "job": self.job,
            "num_layers": self.num_layers,
            "block": [self.start, self.stop],
            "life": self.life,
            "hash_algorithm": self.hash_algorithm,
            "num_samples": self.plan.num_samples,
            "batch": self.plan.batch,
            "accumulation": self.plan.accumulation,
            "num_updates": self.plan.num_updates,
            "window": self.window,
            "max_staleness": self.max_staleness,
            "position_order": self.position_order,
            "backward_weights": self.backward_weights,
            "layer_names": list(self.layer_names),
            "rate_factor": self.rate_factor,
            "synchronous_until": self.synchronous_until,
            "moments_forgotten": self.moments_forgotten,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LogHeader:
        """The inverse of `to_json`.

        ``ValueError``, ``KeyError`` or ``TypeError`` when it is not such a header, or of another format version.
        """
        if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format {value.get('format')!r} version {value.get('format_version')!r}, "
                f"this reads {FORMAT!r} {FORMAT_VERSION}"
            )
        numbers = {name: value[name] for name in ("num_samples", "batch", "accumulation", "num_updates")}
        others = [*value["block"], *(value[name] for name in ("num_layers", "life", "window", "max_staleness"))]
        if any(type(one) is not int for one in (*numbers.values(), *others)):
            raise ValueError("a number of the header is none")
        start, stop = value["block"]
        return cls(
            job=str(value["job"]),
            num_layers=value["num_layers"],
            start=start,
            stop=stop,
            life=value["life"],
            hash_algorithm=str(value["hash_algorithm"]),
            plan=TrainingPlan(**numbers),
            window=value["window"],
            max_staleness=value["max_staleness"],
            position_order=bool(value["position_order"]),
            backward_weights=str(value["backward_weights"]),
            layer_names=tuple(str(name) for name in value["layer_names"]),
            # What logs of layerwise before rollbacks do not have.
            rate_factor=float(value.get("rate_factor", 1.0)),
            synchronous_until=int(value.get("synchronous_until", 0)),
            moments_forgotten=bool(value.get("moments_forgotten", False)),
        )


def events_folder(job_directory: str | Path, start: int, stop: int, life: int) -> Path:
    """Where the log of block ``[start, stop)`` in ``life`` lives."""
    return Path(job_directory) / "events" / f"block-{start}-{stop}" / f"life-{life}"


def _line(text: str) -> bytes:
    data = text.encode()
    return b"%08x %b\n" % (crc32(data), data)


class EventLog:
    """Writes one block's records of one life. An `EventSink`.

    `append` may be called from any thread, under a layer's lock: it only gathers (and flushes by itself once
    ``buffer_bytes`` wait). `flush`, `sync` and `close` may be called from any thread. After a failed write every call
    raises the same ``OSError``: what is on disk is then unknown, and the shard must not go on.
    """

    def __init__(
        self,
        job_directory: str | Path,
        header: LogHeader,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Begin the log. `NotAllowedError` when this life has one already: two owners must never write as one."""
        self.directory = events_folder(job_directory, header.start, header.stop, header.life)
        self._header = header
        self._segment_bytes = segment_bytes
        self._buffer_bytes = buffer_bytes
        self._gather = threading.Lock()  # guards _lines, _waiting_bytes, _sequence, _versions
        self._file_lock = threading.Lock()  # guards the file; taken before _gather, never after
        self._lines: list[bytes] = []
        self._waiting_bytes = 0
        self._sequence = 0
        self._versions = [0] * (header.stop - header.start)
        self._error: OSError | None = None
        self._written_bytes = 0
        self._closed = False
        self.directory.mkdir(parents=True, exist_ok=True)
        if any(self.directory.iterdir()):
            raise NotAllowedError(
                f"life {header.life} of block {header.start}-{header.stop} has a log already: {self.directory}"
            )
        self._segment = -1
        self._file = -1
        self._segment_written = 0
        self._open_segment(0, self._versions)

    @property
    def num_bytes(self) -> int:
        """Bytes written to all segments."""
        return self._written_bytes

    def append(self, event: Event) -> None:
        """Gather ``event`` as the next record; on disk after the next `flush`."""
        with self._gather:
            data = event.to_json(self._sequence).encode()
            self._sequence += 1
            self._lines.append(b"%08x %b\n" % (crc32(data), data))
            self._waiting_bytes += len(data) + 10
            if type(event) is UpdateEvent or type(event) is RestoreEvent:
                self._versions[event.layer - self._header.start] = event.version
            full = self._waiting_bytes >= self._buffer_bytes
        if full:
            self.flush()

    def flush(self) -> None:
        """Hand everything appended so far to the operating system: it survives the end of this process."""
        with self._file_lock:
            if not self._closed:
                self._flush()

    def sync(self) -> None:
        """`flush`, and wait until the disk has it: it survives a power cut. Who flushes meanwhile does not wait."""
        with self._file_lock:
            if self._closed:
                return
            self._flush()
            file = os.dup(self._file)
        try:
            os.fdatasync(file)
        finally:
            os.close(file)

    def close(self) -> None:
        """`sync` and close the file; calling it again does nothing."""
        with self._file_lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._flush()
                os.fdatasync(self._file)
            finally:
                if self._file >= 0:
                    os.close(self._file)
                    self._file = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if self._error is not None:
            raise self._error
        with self._gather:
            lines, self._lines, self._waiting_bytes = self._lines, [], 0
            sequence, versions = self._sequence, list(self._versions)
        if lines:
            self._write(b"".join(lines))
        if self._segment_written >= self._segment_bytes and not self._closed:
            try:
                os.fdatasync(self._file)
                done, self._file = self._file, -1  # its number may be another file's as soon as it is closed
                os.close(done)
                self._open_segment(sequence, versions)
            except OSError as error:
                self._error = error
                raise

    def _open_segment(self, sequence: int, versions: list[int]) -> None:
        self._segment += 1
        path = self.directory / f"segment-{self._segment:06d}.log"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._segment_written = 0
        folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        first = {**self._header.to_json(), "segment": self._segment, "sequence": sequence, "versions": versions}
        self._write(_line(json.dumps(first, separators=(",", ":"))))

    def _write(self, data: bytes) -> None:
        """Write all of ``data``; one system call unless the file system takes less."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            self._error = error
            raise
        self._segment_written += len(data)
        self._written_bytes += len(data)


class LogReader:
    """Reads one block's log of one life; each use of `records` reads it anew.

    ``torn_bytes``: length of the incomplete last line that a crash left, known once `records` has come to the end.
    """

    def __init__(self, directory: str | Path) -> None:
        """`NotFoundError` when no log begins in ``directory``; `CorruptError` when its first line can't be read."""
        self.directory = Path(directory)
        self.torn_bytes = 0
        self._segments = self._find_segments()
        header = None
        if self._segments:
            for _, _, text in self._lines(self._segments[0], last=len(self._segments) == 1):
                header = self._parse_header(self._segments[0], text)[0]
                break
        if header is None:
            raise NotFoundError(
                f"no event log begins in {self.directory}: nothing was written, or a crash came before the first line"
            )
        self.header: LogHeader = header

    @property
    def records(self) -> Iterator[Record]:
        """Every record in order, read as it is asked for."""
        sequence = 0
        self.torn_bytes = 0
        for number, path in enumerate(self._segments):
            for line, offset, text in self._lines(path, last=number == len(self._segments) - 1):
                if line == 1:
                    header, segment, starts = self._parse_header(path, text)
                    if header != self.header or segment != number or starts != sequence:
                        raise _corrupt(
                            path,
                            line,
                            offset,
                            f"its header does not continue the log at segment {number}, record {sequence}",
                        )
                    continue
                try:
                    record = record_from_json(json.loads(text))
                except ValueError as error:
                    raise _corrupt(path, line, offset, str(error)) from error
                if record.sequence != sequence:
                    raise _corrupt(
                        path, line, offset, f"record {sequence} is expected, this is record {record.sequence}"
                    )
                sequence += 1
                yield record

    def _find_segments(self) -> list[Path]:
        found: dict[int, Path] = {}
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            match = _SEGMENT.fullmatch(path.name)
            if match:
                found[int(match[1])] = path
        if sorted(found) != list(range(len(found))):
            raise CorruptError(f"segments are missing in {self.directory}: there are {sorted(found)}")
        return [found[number] for number in range(len(found))]

    def _parse_header(self, path: Path, text: bytes) -> tuple[LogHeader, int, int]:
        try:
            value = json.loads(text)
            return LogHeader.from_json(value), int(value["segment"]), int(value["sequence"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(path, 1, 0, f"not a header that can be read: {error}") from error

    def _lines(self, path: Path, *, last: bool) -> Iterator[tuple[int, int, bytes]]:
        """Line number, byte offset and JSON of each whole line."""
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not last:
                        raise _corrupt(
                            path, number, offset, "the line is incomplete, and the log goes on in another segment"
                        )
                    self.torn_bytes = len(line)
                    return
                text = line[9:-1]
                if line[8:9] != b" " or line[:8] != b"%08x" % crc32(text):
                    raise _corrupt(path, number, offset, "its checksum does not fit")
                yield number, offset, text
                offset += len(line)


def _corrupt(path: Path, line: int, offset: int, what: str) -> CorruptError:
    return CorruptError(f"event log {path}, line {line} (byte {offset}): {what}")


def find_logs(job_directory: str | Path) -> list[Path]:
    """Every block's and life's log folder of a job, by life, then by block."""
    found: list[tuple[int, int, int, Path]] = []
    events = Path(job_directory) / "events"
    for block in events.iterdir() if events.is_dir() else ():
        place = _BLOCK.fullmatch(block.name)
        for folder in block.iterdir() if place and block.is_dir() else ():
            life = _LIFE.fullmatch(folder.name)
            if place and life and folder.is_dir():
                found.append((int(life[1]), int(place[1]), int(place[2]), folder))
    return [folder for *_, folder in sorted(found)]
