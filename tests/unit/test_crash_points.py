"""Crash at every operation on the disk: what was promised is there, and nothing is half there.

The state that a killed process leaves is what lies on the disk at that operation, so it is copied there and looked at.
`tests/integration/test_killed_writers.py` kills real processes.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.fault_points import FaultPlan, Operation, parse_faults, points
from tests.unit.crash_scenario import CUTS, FILES, LOGS, PARTS, Promises, Scenario, check
from tests.unit.power import Disk

POINTS = {
    *(
        f"cut.{kind}"
        for kind in ("make-folder", "create", "write", "sync", "rename", "sync-folder", "delete", "delete-folder")
    ),
    *(f"manifest.{kind}" for kind in ("create", "write", "sync", "rename", "sync-folder", "delete")),
    *(f"fence.{kind}" for kind in ("make-folder", "create", "sync-folder")),
    *(
        f"event-log.{kind}"
        for kind in ("make-folder", "create", "reserve", "write", "sync", "rename", "sync-folder", "delete")
    ),
    *(f"log-summary.{kind}" for kind in ("create", "write", "sync", "rename", "sync-folder", "delete")),
    *(f"job-store.{kind}" for kind in ("make-folder", "sync-folder", "begin", "commit", "committed")),
    *(f"{what}.{kind}" for what in ("spec", "result") for kind in ("create", "write", "sync", "rename", "sync-folder")),
    "result.delete",
}
"""Every point that the scenario must reach: whoever adds an operation adds it here and to the scenario."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"layerwise.disk.os.{name}", lambda file: None)


class Snapshots:
    """A watcher that looks at the state before each operation, and at that of each write torn in the middle.

    It looks at what this operation and the one before are about: nothing else can have changed.
    """

    def __init__(self, directory: Path, copies: Path, promises: Promises) -> None:
        self.reached: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._directory, self._copies, self._promises = directory, copies, promises
        self._looking = threading.RLock()
        self._inside = False
        self._last = FILES

    def before(self, operation: Operation) -> None:
        with self._looking:
            if self._inside:
                return  # our own look at the job store
            self._inside = True
            part = PARTS.get(operation.what, FILES)
            try:
                self.reached[operation.point] += 1
                check(self._directory, self._promises, parts={part, self._last})
                if operation.kind == "write":
                    self._tear(operation, part)
            except BaseException as error:
                error.add_note(f"crash before {operation.point} {operation.path}")
                self.failure = self.failure or error
            finally:
                self._inside = False
                self._last = part

    def after(self, operation: Operation) -> None:
        pass

    def _tear(self, operation: Operation, part: str) -> None:
        copy = shutil.copytree(self._directory, self._copies / "copy")
        with (copy / Path(operation.path).relative_to(self._directory)).open("ab") as file:
            file.write(operation.data[: len(operation.data) // 2])
        check(copy, self._promises, parts={part})
        shutil.rmtree(copy)


def test_a_process_killed_at_any_operation_leaves_what_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promises = Promises()
    directory, copies = tmp_path / "job", tmp_path / "copies"
    directory.mkdir()
    copies.mkdir()
    watcher = Snapshots(directory, copies, promises)
    monkeypatch.setattr(points, "watcher", watcher)
    scenario = Scenario(directory, promises.take, versions=(3, 5, 6, 8))
    scenario.play()
    monkeypatch.setattr(points, "watcher", None)
    if watcher.failure is not None:
        raise watcher.failure
    assert scenario.errors == []
    assert set(watcher.reached) == POINTS
    assert promises.durable == 8
    check(directory, promises)


class Recorder:
    """A watcher that notes what has happened."""

    def __init__(self) -> None:
        self.history: list[Operation | str] = []

    def before(self, operation: Operation) -> None:
        pass

    def after(self, operation: Operation) -> None:
        self.history.append(replace(operation, data=bytes(operation.data)))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Operation | str]]:
    """A whole run: its operations, and between them what it promised."""
    directory = tmp_path_factory.mktemp("recorded")
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(f"layerwise.disk.os.{name}", lambda file: None)
        patch.setattr(points, "watcher", recorder)
        Scenario(directory, recorder.history.append, store=False, versions=(2, 3, 4, 6, 8)).play()
    return directory, recorder.history


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
def test_a_power_cut_at_any_operation_leaves_what_was_promised(
    tmp_path: Path, history: tuple[Path, list[Operation | str]], keep: float
) -> None:
    root, recorded = history
    disk, promises = Disk(root), Promises()
    chance = random.Random(f"power {keep}")
    looked = 0
    for number, one in enumerate(recorded):
        if isinstance(one, str):
            promises.take(one)
        else:
            disk.play(one)
        # What was just promised, and what was just begun, matter most.
        if not isinstance(one, str) and chance.random() > 0.2:
            continue
        left = tmp_path / str(number)
        disk.cut(left, chance, keep)
        try:
            check(left, promises, power=True, parts=(CUTS, LOGS, FILES))
        except BaseException as error:
            error.add_note(f"power cut after {number} of {len(recorded)}: {recorded[max(number - 3, 0) : number + 1]}")
            raise
        shutil.rmtree(left)
        looked += 1
    assert looked > 60
    assert promises.durable == 8


def test_the_modelled_disk_keeps_only_what_was_synced(tmp_path: Path) -> None:
    """The model itself can fail the tests above: unsynced data, entries and renames go."""
    disk = Disk(Path("/job"))

    def play(kind: str, path: str, **more: object) -> None:
        disk.play(replace(Operation(what="cut", kind=kind, path=f"/job/{path}"), **more))  # type: ignore[arg-type]

    def left(keep: float = 0.0) -> dict[str, bytes]:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        deepcopy(disk).cut(target, random.Random(1), keep)
        return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}

    play("create", "a")
    play("write", "a", data=b"one")
    assert left() == {}
    assert left(1.0) == {"a": b"one"}
    play("sync", "a")
    assert left() == {}
    play("sync-folder", "")
    assert left() == {"a": b"one"}
    play("write", "a", data=b"two")
    play("rename", "a", target="/job/b")
    assert left() == {"a": b"one"}
    assert left(1.0) == {"b": b"onetwo"}
    play("make-folder", "c")
    play("create", "c/d")
    play("sync-folder", "c")
    assert left() == {"a": b"one"}
    play("sync-folder", "")
    assert left() == {"b": b"one", "c/d": b""}


@pytest.mark.parametrize(
    ("point", "action"),
    [
        *((f"cut.{kind}", "enospc") for kind in ("make-folder", "create", "write", "sync", "rename", "sync-folder")),
        *(("cut.create", action) for action in ("erofs", "eacces")),
        *(("cut.write", action) for action in ("partial", "eio")),
        *(("manifest.*", action) for action in ("enospc", "erofs", "partial")),
    ],
)
def test_a_cut_that_the_disk_refuses_is_given_up_the_one_before_stands_and_later_ones_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    promises = Promises()
    refused: list[int] = []

    def tell(line: str) -> None:
        promises.take(line)
        if line.startswith("durable"):
            check(tmp_path, promises, parts={CUTS})

    # The third to sixth reach: in the middle of the first cuts, in the second life there is room again.
    monkeypatch.setattr(points, "watcher", FaultPlan(parse_faults(f"{point}:3-6:{action}")))
    scenario = Scenario(tmp_path, tell, store=False)
    scenario.play()
    refused = [int(error.split()[1].rstrip(":")) for error in scenario.errors if error.startswith("cut")]
    assert refused
    number = {"partial": errno.ENOSPC}.get(action) or getattr(errno, action.upper())
    assert all(os.strerror(number) in error for error in scenario.errors)
    assert promises.durable == 8
    check(tmp_path, promises)
