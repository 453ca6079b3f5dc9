"""Removes what no kept cut needs from the event logs, and leaves a summary of it.

::

    life 3   seg 0   seg 1 │ seg 2        │ seg 3      seg 4 ...
             removed       │ attempts that │ the oldest kept cut, and all after it
             summary-2     │ were open     │

A segment goes when every record in it is from before the oldest kept cut on every layer of its block, and from before
the attempts that were under way there. A life goes as a whole when later ones have taken its layers over at that cut or
before it. Nothing goes as long as all logs of a job together are small: they are worth more than their room.

What is removed is replayed by the audit first. Its state at the end is the summary, which is on the disk before the
first segment is deleted; where it finds anything wrong, nothing is removed. So an audit afterwards finds no less.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from layerwise import disk
from layerwise.audit_report import Findings
from layerwise.block_audit import AttemptNumbers, StoredEvents, replay_block
from layerwise.errors import AuditError, CorruptError, LayerwiseError, NotFoundError
from layerwise.events import Record
from layerwise.fences import Fence, fences_in
from layerwise.log_reader import LogReader, find_logs
from layerwise.log_summary import LogSummary, save_summary, summaries_in
from layerwise.rate_book import LearningRate, RateBook
from layerwise.threads import VitalThread

KEPT_BYTES = 2**30
"""Below this, logs of one job are left whole."""

log = logging.getLogger(__name__)


def remove_old_records(
    directory: str | Path, oldest: int, *, kept_bytes: int = KEPT_BYTES, learning_rate: LearningRate | None = None
) -> int:
    """Remove what the cut of version ``oldest`` and all later ones don't need, until ``kept_bytes`` are left.

    ``learning_rate`` as in `layerwise.audit.audit`. A log that can't be read stays as it is. Gives the bytes removed.

    Raises:
        OSError: the disk refused; what could not be summarised is still there.
    """
    fences = fences_in(directory)
    folders = find_logs(directory)
    too_much = sum(_size(folder) for folder in folders) - kept_bytes
    removed = 0
    for folder in folders:
        if removed >= too_much:
            break
        try:
            reader = LogReader(folder)
        except NotFoundError:
            continue  # a crash came before the first line
        except LayerwiseError as error:
            log.warning("nothing is removed from a log that can't be read: %s", error)
            continue
        try:
            removed += _remove(reader, oldest, fences, learning_rate, too_much - removed)
        except LayerwiseError as error:
            log.warning("nothing is removed from the log in %s: %s", folder, error)
    return removed


class LogKeeper:
    """Calls `remove_old_records` in a thread of its own, for the newest `release`. Any thread may call."""

    def __init__(self, directory: str | Path, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._directory = Path(directory)
        self._kept_bytes = kept_bytes
        self._changed = threading.Condition()
        self._oldest: int | None = None
        self._closed = False
        self._thread = VitalThread(target=self._run, name="log-keeper", daemon=True)
        self._thread.start()

    def release(self, oldest: int) -> None:
        """No cut older than version ``oldest`` is kept any more."""
        with self._changed:
            self._oldest = oldest
            self._changed.notify()

    def close(self) -> None:
        """End the thread after what was released."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._oldest is not None)
                oldest, self._oldest = self._oldest, None
            if oldest is None:
                return
            try:
                removed = remove_old_records(self._directory, oldest, kept_bytes=self._kept_bytes)
            except (OSError, LayerwiseError) as error:
                log.warning("old event logs in %s are not removed: %s", self._directory, error)
            else:
                if removed:
                    log.info("%d bytes of event logs from before cut %d were summarised", removed, oldest)


def _remove(
    reader: LogReader, oldest: int, fences: Sequence[Fence], learning_rate: LearningRate | None, enough: int
) -> int:
    """Summarise and delete what can go of one life, until it is ``enough`` bytes; gives the bytes."""
    header = reader.header
    over = all(
        any(one.life > header.life and one.start <= layer < one.stop and one.version <= oldest for one in fences)
        for layer in range(header.start, header.stop)
    )
    first = None if over else _first_needed(reader, oldest)
    going: list[int] = []
    size = 0
    for number in reader.segments:
        if size >= enough or (first is not None and number >= first):
            break
        going.append(number)
        size += reader.path(number).stat().st_size
    if not going:
        return 0
    begun = {one.version for one in fences}
    whole = over and len(going) == len(reader.segments)
    summary = summarise(reader, tuple(going), whole=whole, oldest=oldest, begun=begun, learning_rate=learning_rate)
    save_summary(reader.directory, summary)
    for number in going:
        disk.delete(reader.path(number), "event-log")
    for number, path in summaries_in(reader.directory).items():
        if number < summary.segment:
            disk.delete(path, "log-summary")
    disk.sync_folder(reader.directory, "event-log")
    return size


def _first_needed(reader: LogReader, oldest: int) -> int:
    """The first segment with a record that a replay from the cut of ``oldest`` on asks for."""
    starts = [start for number in reader.segments if (start := reader.segment_start(number)) is not None]
    if not starts:
        return 0
    before = [start for start in starts if all(version < oldest for version in start.versions)]
    needed = min((before[-1] if before else starts[0]).oldest, starts[-1].sequence)
    return max((start.number for start in starts if start.sequence <= needed), default=starts[0].number)


def summarise(
    reader: LogReader,
    segments: tuple[int, ...],
    *,
    whole: bool,
    oldest: int,
    begun: set[int],
    learning_rate: LearningRate | None = None,
) -> LogSummary:
    """Replay the first ``segments`` that are kept, and say where each layer is then.

    Lives have ``begun`` at these versions, and may begin at those from ``oldest`` on: the cuts there are remembered.

    Raises:
        CorruptError: the log can't be read.
        AuditError: it contradicts a promise.
    """
    findings = Findings()
    rates = RateBook(findings, learning_rate)
    records = _Counted(reader, segments)
    block = StoredEvents(header=reader.header, records=records, summary=reader.summary)
    layers = replay_block(block, findings, rates, AttemptNumbers(findings))
    rates.finish()
    if records.error is not None:
        raise records.error
    if any(findings.num_failures.values()):
        wrong = next(sentences[0] for sentences in findings.failures.values() if sentences)
        raise AuditError(f"it contradicts a promise, so it is kept for the audit: {wrong}")
    for layer in layers:
        layer.cuts = {version: cut for version, cut in layer.cuts.items() if version >= oldest or version in begun}
    return LogSummary(
        header=reader.header,
        segment=segments[-1] + 1,
        sequence=records.sequence,
        whole=whole,
        layers={layer.layer: layer.summary() for layer in layers},
        examined={name: count for name, count in findings.examined.items() if count},
    )


class _Counted:
    """The records of some segments; ``sequence`` is the number of the one that comes after those that were read."""

    def __init__(self, reader: LogReader, segments: tuple[int, ...]) -> None:
        self._reader = reader
        self._segments = segments
        self.sequence = 0 if reader.summary is None else reader.summary.sequence
        self.error: CorruptError | None = None

    def __iter__(self) -> Iterator[Record]:
        try:
            for record in self._reader.records_of(self._segments):
                self.sequence = record.sequence + 1
                yield record
        except CorruptError as error:
            self.error = error
            raise


def _size(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            continue  # sealed or trimmed meanwhile
    return size
