"""A job's whole life on disk, without arithmetic: two lives of two blocks, their logs, cuts, records and removals.

It tells on the way what it has been promised by then, so that whoever lets it crash knows what must be left. No torch and no
gRPC, so that a process that plays it may be forked.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

from layerwise.audit import audit_directory
from layerwise.cuts import check_cut, commit_manifest, durable_cuts, layer_files, newest_sound_cut, write_layer_file
from layerwise.errors import NotFoundError
from layerwise.event_log import EventLog, LogReader, events_folder
from layerwise.events import CutEvent, Event, UpdateEvent
from layerwise.fences import Fence, raise_fence
from layerwise.job import JobSpec
from layerwise.log_retention import remove_old_records
from layerwise.messages import LayerFile
from layerwise.overrides import read_job
from layerwise.run_directory import load_result, save_result, save_spec, spec_in
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.job_store import FILE, SqliteJobStore
from tests.unit.audited_job import CUT, NUM_LAYERS, PLAN, World, honest, rate
from tests.unit.audited_job import number as number_records

LIVES = {(0, 0): 1, (0, 2): 2, (1, 0): 3, (1, 2): 4}
"""The life of each block (by its start) in each of the world's two lives: those of a job are all different."""
SEGMENT = 2500


@dataclass(slots=True)
class Promises:
    """What the scenario has heard to be done: each survives what it is a promise against."""

    flushed: dict[int, int] = field(default_factory=dict)
    synced: dict[int, int] = field(default_factory=dict)
    durable: int = 0
    fenced: bool = False
    spec: bool = False
    result: str = ""
    stored: int = 0

    @property
    def written(self) -> dict[int, int]:
        """Records of each life that survive the end of the process."""
        lives = self.flushed.keys() | self.synced.keys()
        return {life: max(self.flushed.get(life, 0), self.synced.get(life, 0)) for life in lives}

    def take(self, line: str) -> None:
        """One line of `Teller`."""
        kind, *values = line.split()
        match kind:
            case "flushed" | "synced":
                (self.flushed if kind == "flushed" else self.synced)[int(values[0])] = int(values[1])
            case "durable":
                self.durable = int(values[0])
            case "fenced":
                self.fenced = True
            case "spec":
                self.spec = True
            case "result":
                self.result = values[0]
            case "stored":
                self.stored = int(values[0])


Teller = Callable[[str], None]


class Scenario:
    """Plays the job in ``directory``, and saves its cuts of ``versions``.

    ``store`` false leaves the job store out, whose files SQLite writes by itself.
    """

    def __init__(
        self, directory: Path, tell: Teller, *, store: bool = True, versions: Sequence[int] = range(1, 9)
    ) -> None:
        self.world = worlds()
        self.errors: list[str] = []
        self._directory = directory
        self._tell = tell
        self._versions = tuple(versions)
        self._store = SqliteJobStore(directory / "coordinator") if store else None
        self._stored = 0

    def play(self) -> None:
        """From the beginning to the end."""
        save_spec(self._directory, spec())
        self._tell("spec")
        save_result(self._directory, None)
        for number in range(2):
            self._live(number)
        save_result(self._directory, {"state": "done"})
        self._tell("result done")
        if self._store is not None:
            self._store.close()

    def _live(self, number: int) -> None:
        blocks = [block for block in self.world.blocks if block.header.life in (LIVES[number, 0], LIVES[number, 2])]
        for block in blocks:
            header = block.header
            version = CUT if number else 0
            raise_fence(self._directory, Fence(life=header.life, start=header.start, stop=header.stop, version=version))
        if number:
            self._tell("fenced")
        logs = [EventLog(self._directory, block.header, segment_bytes=SEGMENT, retry_seconds=1e6) for block in blocks]
        copied: dict[int, list[int]] = {}
        written = [0, 0]
        for events in zip_longest(*([event for _, event in block.records] for block in blocks)):
            for place, event in enumerate(events):
                if event is None:
                    continue
                logs[place].append(event)
                written[place] += 1
                if isinstance(event, CutEvent):
                    copied.setdefault(event.version, []).append(event.layer)
                    whole = len(copied[event.version]) == NUM_LAYERS
                    if whole and event.version in self._versions and (number or event.version <= CUT):
                        self._save(event.version, number, logs, written)
                elif written[place] % 9 == 0:
                    logs[place].flush()
                    self._tell(f"flushed {blocks[place].header.life} {written[place]}")
                    logs[place].tend()
        for log in logs:
            log.close()

    def _save(self, version: int, number: int, logs: list[EventLog], written: list[int]) -> None:
        """A cut, as the shards and the first of them make it: what fails is a warning, and the cut before stands."""
        lives = [LIVES[number, layer - layer % 2] for layer in range(NUM_LAYERS)]
        try:
            for log, count in zip(logs, written, strict=True):
                log.sync()
                self._tell(f"synced {log._header.life} {count}")
            files = tuple(
                write_layer_file(self._directory, version, layer, life, content(layer, life, version))
                for layer, life in enumerate(lives)
            )
            keep = [one for one in (0, *durable_cuts(self._directory)) if one < version][-1:]
            commit_manifest(self._directory, version, manifest(version, files), keep, life=lives[0])
        except OSError as error:
            self.errors.append(f"cut {version}: {error}")
            return
        self._tell(f"durable {version}")
        if self._store is not None:
            self._stored += 1
            self._store.put(replace(record(), next_life=self._stored))
            self._store.flush()
            self._tell(f"stored {self._stored}")
        try:
            oldest = min(durable_cuts(self._directory))
            remove_old_records(self._directory, oldest, kept_bytes=0, learning_rate=rate)
        except OSError as error:
            self.errors.append(f"removal: {error}")


@lru_cache
def worlds() -> World:
    """An honest job whose layers are copied at every update, with lives as a job numbers them."""
    world = honest(2)
    for place, block in enumerate(world.blocks):
        events: list[Event] = []
        for _, event in block.records:
            if not isinstance(event, CutEvent):
                events.append(event)
            if isinstance(event, UpdateEvent):
                events.append(CutEvent(layer=event.layer, version=event.version, digest=event.digest))
        life = LIVES[block.header.life, block.header.start]
        header = replace(block.header, life=life)
        world.blocks[place] = replace(block, header=header, records=number_records(events))
    return world


def content(layer: int, life: int, version: int) -> bytes:
    """A layer's file; several times what a torn write leaves."""
    return f"layer {layer} of life {life} at version {version};".encode() * 40


def manifest(version: int, files: tuple[LayerFile, ...]) -> str:
    """What the coordinator sends."""
    return json.dumps(
        {
            "version": version,
            "files": [
                {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
                for one in files
            ],
        }
    )


def spec() -> JobSpec:
    """Any job."""
    return read_job({"name": "tiny", "model": "mlp", "data": "digits"})


def record() -> JobRecord:
    """Any job's record."""
    return JobRecord(
        job="tiny-1", number=1, name="tiny", state=JobState.RUNNING, spec_json="{}", directory="runs/tiny", created=1.0
    )


CUTS, LOGS, STORE, FILES = "cuts", "logs", "store", "files"
PARTS = {"cut": CUTS, "manifest": CUTS, "fence": CUTS, "event-log": LOGS, "log-summary": LOGS, "job-store": STORE}
"""What has to be looked at after an operation; `FILES` where nothing is said."""


def check(
    directory: Path, promises: Promises, *, power: bool = False, parts: Collection[str] = (CUTS, LOGS, STORE, FILES)
) -> None:
    """Nothing that was promised is missing, nothing is half there. ``power``: only what was synced is promised."""
    if CUTS in parts:
        check_cuts(directory, promises)
    if LOGS in parts:
        check_logs(directory, promises.synced if power else promises.written)
    if FILES in parts:
        assert not promises.spec or spec_in(directory) == spec()
        found = load_result(directory)
        assert found in (None, {"state": "done"})
        assert found is not None or not promises.result
    if STORE in parts and (directory / "coordinator" / FILE).exists():
        with closing(sqlite3.connect(directory / "coordinator" / FILE)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            rows = connection.execute("SELECT next_life FROM jobs").fetchall()
        assert (rows[0][0] if rows else 0) >= promises.stored


def check_cuts(directory: Path, promises: Promises) -> None:
    """The newest cut is whole, and as new as was promised."""
    newest, damaged = newest_sound_cut(directory)
    assert damaged == ()
    assert (newest or 0) >= promises.durable
    for version in durable_cuts(directory):
        for file in layer_files(check_cut(directory, version)):
            path = directory / "cuts" / f"{version:08d}" / file.name
            assert path.read_bytes() == content(file.layer, file.life, version)
            if promises.fenced and version > CUT:
                assert file.life > 2, "a cut of the life that was replaced"


def check_logs(directory: Path, promised: dict[int, int]) -> None:
    """Every log says what was written, from what its summary stands for to what was promised; an audit finds no fault."""
    begun = 0
    for block in worlds().blocks:
        header = block.header
        records = list(block.records)
        try:
            reader = LogReader(events_folder(directory, header.start, header.stop, header.life))
        except NotFoundError:
            assert header.life not in promised
            continue
        begun += 1
        first = 0 if reader.summary is None else reader.summary.sequence
        found = list(reader.records)
        assert found == records[first : first + len(found)]
        assert first + len(found) >= promised.get(header.life, 0)
    if begun == 0:
        return
    report = audit_directory(directory, plan=PLAN, learning_rate=rate)
    missing = [name for name in ("log",) if begun < 2]  # a crash may come before every layer has a log
    wrong = [one for one in report.checks if not one.passed and one.name not in missing]
    assert not wrong, wrong
