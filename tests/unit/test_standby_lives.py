"""A life that begins with a standby copy, where no cut is: real blocks, real logs, the audit, the replay, and logs that were changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerwise.audit import audit_directory
from layerwise.cuts import durable_cuts
from layerwise.errors import CorruptError
from layerwise.event_log import EventLog, LogReader, events_folder
from layerwise.events import CutEvent, Event, RestoreEvent, UpdateEvent
from layerwise.fences import fences_in
from layerwise.layer_audit import LayerAudit
from layerwise.replay import Replay, ReplayReport
from layerwise.standby_bytes import LayerBytes
from tests.unit.recorded_run import ALLOWED, RecordedRun, recorded_spec

EVERY = 2
BEGIN = 4
"""Where the second life begins: no cut is kept there."""
Edit = Callable[[list[Event]], Sequence[Event]]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"layerwise.disk.os.{name}", lambda file: None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_in(directory: Path, seed: int = 2) -> RecordedRun:
    """Six updates, a cut at the end, standby copies at versions 2 and 4; it has been trained a little beyond those."""
    spec = recorded_spec(
        train={"steps": 6, "seed": 5, "optimizer": "adamw"},
        cluster={"shards": 2},
        checkpoint={"every": 6, "standby": True, "standby_every": EVERY},
    )
    run = RecordedRun(spec, directory, seed=seed, interleaved=True)
    assert run.settings.standby_every == EVERY
    run.begin()
    run.train(5)
    return run


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first block's second life begins with its copy at version 4; so does its third, once more."""
    directory = tmp_path_factory.mktemp("honest")
    torch.set_num_threads(1)
    run = run_in(directory)
    run.begin([0], BEGIN, standby=True)
    run.train()
    run.commit(6)
    run.close()
    return directory


@pytest.fixture
def directory(honest: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(honest, tmp_path / "job"))


def replayed(directory: Path) -> ReplayReport:
    return Replay(directory, start=0, allowed_imports=ALLOWED).run()


def failures(directory: Path) -> list[str]:
    """What the audit finds about lives."""
    return [line for check in audit_directory(directory).checks if check.name == "lives" for line in check.failures]


def rewrite(directory: Path, life: int, edit: Edit) -> None:
    """Write the first block's log of ``life`` anew, with correct checksums."""
    folder = events_folder(directory, 0, 2, life)
    reader = LogReader(folder)
    before = [record.event for record in reader.records]
    shutil.rmtree(folder)
    with EventLog(directory, reader.header) as log:
        for event in edit(before):
            log.append(event)


def test_a_life_from_a_copy_passes_the_audit_and_the_replay_reaches_every_hash(honest: Path) -> None:
    report = audit_directory(honest)
    assert report.passed, "\n".join(report.lines())
    assert durable_cuts(honest) == (6,), "no cut is where the life began"
    assert any((one.life, one.start, one.version) == (3, 0, BEGIN) for one in fences_in(honest))
    found = replayed(honest)
    assert found.passed, "\n".join(found.lines())
    assert found.lives == 3
    assert found.left_out == ()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_order_of_passes_was_the_same_holds(tmp_path: Path, seed: int) -> None:
    """And when the copy of the life that began with one is used."""
    run = run_in(tmp_path, seed)
    run.begin([seed % 2], BEGIN, standby=True)
    run.train(6)
    run.begin([seed % 2], 6, standby=True)
    run.train()
    run.close()
    report = audit_directory(tmp_path)
    assert report.passed, "\n".join(report.lines())


def test_the_audit_remembers_only_the_states_of_cuts_and_those_with_which_lives_begin(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be a thousand times as many copies as cuts."""
    remembered: set[int] = set()
    finish = LayerAudit.finish

    def finished(layer: LayerAudit) -> None:
        remembered.update(layer.cuts)
        finish(layer)

    monkeypatch.setattr(LayerAudit, "finish", finished)
    assert audit_directory(directory).passed
    assert remembered == {BEGIN, 6}


def test_a_copy_that_the_life_before_never_made_is_found(directory: Path) -> None:
    rewrite(
        directory, 1, lambda events: [one for one in events if not (isinstance(one, CutEvent) and one.version == BEGIN)]
    )
    found = failures(directory)
    assert len(found) == 2, "one for each layer of the block"
    assert all(f"begins at version {BEGIN}, which no earlier life saved" in line for line in found)


def test_a_life_before_that_never_came_so_far_is_found(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        first = next(at for at, one in enumerate(events) if isinstance(one, UpdateEvent) and one.version == BEGIN)
        return events[:first]

    rewrite(directory, 1, edit)
    assert any(f"begins at version {BEGIN}, which no earlier life saved" in line for line in failures(directory))


def test_a_life_that_began_with_other_contents_than_were_copied_is_found(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        return [replace(one, digest="0" * 32) if isinstance(one, RestoreEvent) else one for one in events]

    rewrite(directory, 3, edit)
    assert any(f"begins at version {BEGIN} with other contents" in line for line in failures(directory))
    assert not replayed(directory).passed


def test_a_copy_with_another_hash_than_its_update_is_found(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        return [
            replace(one, digest="0" * 32) if isinstance(one, CutEvent | RestoreEvent) and one.version == BEGIN else one
            for one in events
        ]

    for life in (1, 3):
        rewrite(directory, life, edit)
    assert any(f"the cut of version {BEGIN} has another hash than that version" in line for line in failures(directory))


def test_a_copy_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    files, layers = run.copied[0].wait(BEGIN)
    run.copied[0].written(BEGIN, files, {**layers, 0: LayerBytes(bytearray(b"no layer at all"))})
    with pytest.raises(CorruptError, match="not a layer's file that this version reads"):
        run.begin([0], BEGIN, standby=True)
    run.blocks[0] = None
    run.close()
