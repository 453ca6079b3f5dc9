r"""The event log's files, and their writer. `layerwise.log_reader` reads them.

One folder for each block and life, segments of bounded size in it; a life is written by one process and never
reopened::

    <job directory>/events/block-0-4/life-1/segment-000000.log
    <8 hex digits: CRC-32 of the JSON> <header as compact JSON>\n    who wrote this, under which promises, from where
    <8 hex digits: CRC-32 of the JSON> <record as compact JSON>\n    see `layerwise.events`
    ...

Records gather in memory until `EventLog.flush`, which the shard calls before anything that follows from them leaves
the process. So a process crash loses only what nobody has seen, and a power cut at most what came after the last
`EventLog.sync`. What that leaves behind is an incomplete line at the very end, or zeros where data never reached the
disk; readers take it for the end. A segment is called ``.next`` until the disk has all of the one before it, so that
``.log`` promises whole lines in all segments before. Anything else that is wrong is a `CorruptError`.

Segments that no kept cut needs are removed from the beginning on, and a summary stands for them: see
`layerwise.log_retention`.

The writer::

    append ─► lines in memory ─► flush: written ─► sync: on the disk
                                    │
          keeper's thread ──────────┴── sets room aside ahead of what is written; begins the next segment; seals the last

The log must go on when the disk is full, because nothing may leave the process that is not written down. So room is set
aside before it is needed. When there is no more to be had, what is left still takes the records of all work that is
under way: `EventLog.full` says that nothing new must begin, until there is room again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from zlib import crc32

from layerwise import disk
from layerwise.errors import NotAllowedError, RetryableError
from layerwise.events import Event, ForwardEvent, PassEvent, RestoreEvent, UpdateEvent
from layerwise.log_header import FORMAT, FORMAT_VERSION, LogHeader, checked_line
from layerwise.log_reader import LogReader, events_folder, find_logs, segment_path
from layerwise.threads import VitalThread

__all__ = ["FORMAT", "FORMAT_VERSION", "EventLog", "LogHeader", "LogReader", "events_folder", "find_logs"]

SEGMENT_BYTES = 16 * 2**20
BUFFER_BYTES = 2**20
ROOM_BYTES = 8 * 2**20
RETRY_SECONDS = 1.0
_RECORD_BYTES = 512
_MARGIN_RECORDS = 8
"""Records that one attempt may still cause on one layer after the log is found full: more than there are."""

_LEAST_MARGIN_BYTES = 2**20
"""What may be written before anybody looks at `EventLog.full` again."""

log = logging.getLogger(__name__)


class EventLog:
    """The records of one block in one life. An `EventSink`.

    `append` may be called from any thread, under a layer's lock: it only gathers (and writes by itself once
    ``buffer_bytes`` wait). `flush`, `sync` and `close` may be called from any thread. No lock that they need is held
    while anybody waits for the disk. After a failed write every call raises the same ``OSError``: what is on disk is
    then unknown, and the shard must not go on.
    """

    def __init__(
        self,
        job_directory: str | Path,
        header: LogHeader,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
        room_bytes: int = ROOM_BYTES,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """Begin the log.

        Raises:
            NotAllowedError: this life has one already; two owners must never write as one.
            RetryableError: the disk has no room for it, or refuses.
        """
        self.directory = events_folder(job_directory, header.start, header.stop, header.life)
        self._header = header
        self._segment_bytes = segment_bytes
        self._buffer_bytes = buffer_bytes
        records = header.window * (header.stop - header.start) * _MARGIN_RECORDS
        self._margin_bytes = max(records * _RECORD_BYTES, _LEAST_MARGIN_BYTES)
        self._room_bytes = max(room_bytes, 4 * self._margin_bytes)
        self._retry_seconds = retry_seconds
        self._gather = threading.Lock()  # guards _lines, _waiting_bytes, _sequence, _versions, _begun
        self._file_lock = threading.Lock()  # guards the file and what is counted of it; taken before _gather
        self._sealing = threading.Lock()  # one at a time syncs and renames; taken before _file_lock
        self._wake = threading.Event()
        self._ends = threading.Event()
        self._lines: list[bytes] = []
        self._waiting_bytes = 0
        self._sequence = 0
        self._versions = [0] * (header.stop - header.start)
        # Attempts are open within a span of ``window`` numbers, so those that began before twice as many are over.
        self._begun: deque[int] = deque(maxlen=2 * header.window)
        self._error: OSError | None = None
        self._written_bytes = 0
        self._closed = False
        self._shortage = ""
        self._segment = 0
        self._segment_written = 0
        self._head_bytes = 0
        self._room_until: int | None = 0  # ``None``: the file system can't set room aside
        self._unsealed: tuple[int, Path] | None = None  # the segment before, not on the disk yet
        self._path = segment_path(self.directory, 0)
        self._file = -1
        if self.directory.is_dir() and any(self.directory.iterdir()):
            raise NotAllowedError(
                f"life {header.life} of block {header.start}-{header.stop} has a log already: {self.directory}"
            )
        try:
            disk.make_folder(self.directory, "event-log")
            self._file = disk.create(self._path, "event-log")
            self._room_until = self._set_aside(self._file, 0, self._path)
            start = self._start(0, 0, self._versions, 0)
            self._write(start)
            self._head_bytes = len(start)
            disk.sync_folder(self.directory, "event-log")
        except OSError as error:
            if self._file >= 0:
                os.close(self._file)
            raise RetryableError(
                f"no event log can be begun in {self.directory}: {error.strerror or error}; make room there and resume "
                "the job"
            ) from error
        self._keeper = VitalThread(
            target=self._keep, name=f"event-log-{header.start}-{header.stop}-{header.life}", daemon=True
        )
        self._keeper.start()

    @property
    def num_bytes(self) -> int:
        """Bytes written to all segments."""
        return self._written_bytes

    @property
    def shortage(self) -> str:
        """Why no room can be set aside for what comes; empty when there is enough."""
        return self._shortage

    @property
    def full(self) -> bool:
        """There is room for the records of what is under way, and for nothing that begins now."""
        until = self._room_until
        return bool(self._shortage) and until is not None and until - self._segment_written < self._margin_bytes

    def append(self, event: Event) -> None:
        """Gather ``event`` as the next record; on disk after the next `flush`."""
        with self._gather:
            data = event.to_json(self._sequence).encode()
            if type(event) is UpdateEvent or type(event) is RestoreEvent:
                self._versions[event.layer - self._header.start] = event.version
            elif (type(event) is ForwardEvent or type(event) is PassEvent) and event.layer == self._header.start:
                self._begun.append(self._sequence)
            self._sequence += 1
            self._lines.append(b"%08x %b\n" % (crc32(data), data))
            self._waiting_bytes += len(data) + 10
            much = self._waiting_bytes >= self._buffer_bytes
        if much:
            self.flush()

    def flush(self) -> None:
        """Hand everything appended so far to the operating system: it survives the end of this process."""
        with self._file_lock:
            if not self._closed:
                self._flush()

    def sync(self) -> None:
        """`flush`, and wait until the disk has it: it survives a power cut. Who flushes meanwhile does not wait."""
        self.flush()
        with self._sealing:
            with self._file_lock:
                if self._closed:
                    return
            self._seal()
            self._sync_file(self._file, self._path)  # changed under the lock that is held

    def close(self) -> None:
        """`sync`, give back what room is left, and close the file; calling it again does nothing."""
        with self._file_lock:
            if self._closed:
                return
            self._closed = True
            flushed = self._try_flush()
        self._ends.set()
        self._wake.set()
        self._keeper.join()
        with self._sealing:
            try:
                if flushed is not None:
                    raise flushed
                self._seal()
                os.ftruncate(self._file, self._segment_written)
                self._sync_file(self._file, self._path)
            finally:
                os.close(self._file)
                if self._unsealed is not None:
                    os.close(self._unsealed[0])

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Writing: under _file_lock ---------------------------------------------------------------------------------------

    def _sync_file(self, file: int, path: Path) -> None:
        try:
            disk.sync_file(file, path, "event-log")
        except OSError as error:  # what the disk has not taken it may never take, whatever it says the next time
            self._error = error
            raise

    def _try_flush(self) -> OSError | None:
        try:
            self._flush()
        except OSError as error:
            return error
        return None

    def _flush(self) -> None:
        if self._error is not None:
            raise self._error
        with self._gather:
            lines, self._lines, self._waiting_bytes = self._lines, [], 0
        if lines:
            self._write(b"".join(lines))
            if self._needs_room() or self._ends_segment():
                self._wake.set()

    def _write(self, data: bytes) -> None:
        try:
            disk.write(self._file, data, self._path, "event-log")
        except OSError as error:
            self._error = error
            raise
        self._segment_written += len(data)
        self._written_bytes += len(data)

    def _ends_segment(self) -> bool:
        return self._segment_written > max(self._segment_bytes, self._head_bytes)

    def _needs_room(self) -> bool:
        until = self._room_until
        return until is not None and until - self._segment_written < self._room_bytes // 2

    def _start(self, segment: int, sequence: int, versions: list[int], oldest: int) -> bytes:
        first = {
            **self._header.to_json(),
            "segment": segment,
            "sequence": sequence,
            "versions": versions,
            "oldest": oldest,
        }
        return checked_line(json.dumps(first, separators=(",", ":")))

    # The keeper's thread ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._ends.is_set():
            if self._shortage:
                self._ends.wait(self._retry_seconds)
            else:
                self._wake.wait()
            self._wake.clear()
            if not self._ends.is_set():
                self.tend()

    def tend(self) -> None:
        """Set room aside, begin the next segment where it is time: what the keeper's thread does when it is woken.

        What the disk refuses is noted in `shortage`, and tried again after ``retry_seconds``. Any thread may call.
        """
        with self._sealing:
            if self._closed or self._error is not None:
                return
            problem = None
            try:
                self._seal()
                if self._ends_segment():
                    self._begin_segment()
                    self._seal()
            except OSError as error:
                problem = error
            try:
                if self._needs_room():
                    self._room_until = self._set_aside(self._file, self._segment_written, self._path)
            except OSError as error:
                problem = error
            self._note_shortage(problem)

    def _note_shortage(self, error: OSError | None) -> None:
        before = self._shortage
        self._shortage = (
            "" if error is None else f"no more room for the event log in {self.directory}: {error.strerror or error}"
        )
        if self._shortage != before:
            if error is None:
                log.info("there is room for the event log in %s again", self.directory)
            else:
                log.warning("%s; training goes on for as long as what was set aside lasts", self._shortage)

    def _set_aside(self, file: int, written: int, path: Path) -> int | None:
        """Where the room for the file ends from now on."""
        done = disk.reserve(file, written, self._room_bytes, path, "event-log")
        return written + self._room_bytes if done else None

    def _begin_segment(self) -> None:
        """Let the next records go to a new file, if there is room for one; the old one is not on the disk yet."""
        number = self._segment + 1
        path = segment_path(self.directory, number).with_suffix(".next")
        path.unlink(missing_ok=True)  # of an attempt for which there was no room
        file = disk.create(path, "event-log")
        try:
            room = self._set_aside(file, 0, path)
            with self._file_lock:
                if self._error is not None:
                    raise self._error
                with self._gather:
                    lines, self._lines, self._waiting_bytes = self._lines, [], 0
                    sequence, versions = self._sequence, list(self._versions)
                    oldest = self._begun[0] if len(self._begun) == self._begun.maxlen else 0
                if lines:
                    self._write(b"".join(lines))
                start = self._start(number, sequence, versions, oldest)
                disk.write(file, start, path, "event-log")
                self._unsealed = self._file, self._path
                self._file, self._path, self._segment = file, path, number
                self._segment_written, self._room_until = len(start), room
                self._head_bytes = len(start)
                self._written_bytes += len(start)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise

    def _seal(self) -> None:
        """Wait until the disk has the segment before, then let the current one promise that by its name."""
        if self._unsealed is None:
            return
        old, old_path = self._unsealed
        os.ftruncate(old, os.fstat(old).st_size)  # gives back the room that it did not need
        self._sync_file(old, old_path)
        path = segment_path(self.directory, self._segment)
        if self._path != path:
            disk.rename(self._path, path, "event-log")
            self._path = path
        disk.sync_folder(self.directory, "event-log")
        self._unsealed = None
        os.close(old)
