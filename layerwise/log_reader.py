"""Reads event logs: their files are described in `layerwise.event_log`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from layerwise.errors import CorruptError, NotFoundError, RetryableError
from layerwise.event_records import record_from_json
from layerwise.events import Record
from layerwise.log_header import LogHeader, text_of_line
from layerwise.log_summary import LogSummary, load_summary, summaries_in

_SEGMENT = re.compile(r"segment-(\d{6})\.(log|next)")
_LIFE = re.compile(r"life-(\d+)")
_BLOCK = re.compile(r"block-(\d+)-(\d+)")


def events_folder(job_directory: str | Path, start: int, stop: int, life: int) -> Path:
    """Where the log of block ``[start, stop)`` in ``life`` lives."""
    return Path(job_directory) / "events" / f"block-{start}-{stop}" / f"life-{life}"


def segment_path(folder: Path, number: int) -> Path:
    """The file of one segment."""
    return folder / f"segment-{number:06d}.log"


class SegmentStart:
    """What a segment's first line says: the log's header, and where the segment begins.

    ``sequence`` is the number of its first record, ``versions`` has every layer's version there. Records before number
    ``oldest`` are of attempts that were over by then.
    """

    __slots__ = ("header", "number", "oldest", "sequence", "versions")

    def __init__(self, text: bytes) -> None:
        """``ValueError``, ``KeyError``, ``TypeError`` or ``AttributeError`` when it is none."""
        value = json.loads(text)
        self.header = LogHeader.from_json(value)
        self.number = int(value["segment"])
        self.sequence = int(value["sequence"])
        self.versions = tuple(map(int, value["versions"]))
        self.oldest = int(value.get("oldest", 0))


class LogReader:
    """Reads one block's log of one life; each use of `records` reads it anew.

    ``summary`` stands for the records before the first one that is kept (``None``: all are kept). ``torn_bytes``: what
    a crash left behind the last whole line, known once `records` has come to the end.
    """

    def __init__(self, directory: str | Path) -> None:
        """`NotFoundError` when no log begins in ``directory``; `CorruptError` when its first line can't be read."""
        self.directory = Path(directory)
        self.torn_bytes = 0
        self.summary: LogSummary | None = None
        self._segments: dict[int, Path] = {}
        if not self._find_segments() and not self._find_segments():  # one may just have been renamed
            expected = 0 if self.summary is None else self.summary.segment
            raise CorruptError(
                f"segments are missing in {self.directory}: there are {list(self._segments)}, the first one must be "
                f"{expected}"
            )
        header = None if self.summary is None else self.summary.header
        if self._segments:
            first = self.segment_start(min(self._segments))
            header = first.header if first is not None else header
        if header is None:
            raise NotFoundError(
                f"no event log begins in {self.directory}: nothing was written, or a crash came before the first line"
            )
        self.header: LogHeader = header

    @property
    def segments(self) -> tuple[int, ...]:
        """The numbers of the segments that are there, in order."""
        return tuple(self._segments)

    @property
    def records(self) -> Iterator[Record]:
        """Every record that is kept, in order, read as it is asked for."""
        return self.records_of(self.segments)

    def path(self, segment: int) -> Path:
        """The file of a segment that is there."""
        return self._segments[segment]

    def records_of(self, segments: tuple[int, ...]) -> Iterator[Record]:
        """The records of these segments, which must follow each other."""
        self.torn_bytes = 0
        sequence = None
        if self.summary is not None and segments and segments[0] == self.summary.segment:
            sequence = self.summary.sequence
        elif segments and segments[0] == 0:
            sequence = 0
        for number in segments:
            path = self._segments[number]
            for line, offset, text in self._lines(number):
                if line == 1:
                    start = self._parse_start(path, text)
                    sequence = start.sequence if sequence is None else sequence
                    if (start.header, start.number, start.sequence) != (self.header, number, sequence):
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
            if self.torn_bytes:
                return  # nothing behind it was ever promised

    def segment_start(self, number: int) -> SegmentStart | None:
        """What the segment's first line says; ``None`` when a crash came before its end."""
        for _, _, text in self._lines(number):
            return self._parse_start(self._segments[number], text)
        return None

    def _find_segments(self) -> bool:
        """Note the segments, and the summary of those before them; whether they belong together."""
        found: dict[int, Path] = {}
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            match = _SEGMENT.fullmatch(path.name)
            if match:
                found[int(match[1])] = path
        summaries = summaries_in(self.directory)
        first = max(summaries, default=0)
        if summaries:
            self.summary = load_summary(summaries[first])
        self._segments = {number: found[number] for number in sorted(found) if number >= first}
        whole = self.summary is not None and self.summary.whole
        follow = list(self._segments) == list(range(first, first + len(self._segments)))
        return follow and (self.summary is None or bool(self._segments) or whole)

    def _parse_start(self, path: Path, text: bytes) -> SegmentStart:
        try:
            return SegmentStart(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(path, 1, 0, f"not a header that can be read: {error}") from error

    def _lines(self, segment: int) -> Iterator[tuple[int, int, bytes]]:
        """Line number, byte offset and JSON of each whole line."""
        path = self._segments[segment]
        following = self._segments.get(segment + 1)
        sealed = following is not None and following.suffix != ".next"
        offset = 0
        with self._open(segment) as file:
            for number, line in enumerate(file, start=1):
                text = text_of_line(line) if line.endswith(b"\n") else None
                if text is None and not sealed and (b"\0" in line or not line.endswith(b"\n")):
                    self.torn_bytes = os.fstat(file.fileno()).st_size - offset
                    return
                if text is None:
                    what = "the line is incomplete, and the log goes on in another segment"
                    raise _corrupt(path, number, offset, "its checksum does not fit" if line.endswith(b"\n") else what)
                yield number, offset, text
                offset += len(line)

    def _open(self, segment: int) -> IO[bytes]:
        """Open a segment of a log that may be written to, sealed and trimmed meanwhile."""
        path = self._segments[segment]
        for name in (path, path.with_suffix(".log")):
            try:
                return name.open("rb")
            except FileNotFoundError:
                continue
        raise RetryableError(f"{path} was removed while the event log was read; read it again")


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
