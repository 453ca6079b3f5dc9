"""A record that was changed is found by the replay, which names the update; what a crash has cost is not held against it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from layerwise.cuts import commit_manifest, cut_folder, layer_files, load_manifest
from layerwise.event_log import EventLog, LogHeader, LogReader, events_folder
from layerwise.events import (
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    Event,
    ForwardEvent,
    PassEvent,
    RestoreEvent,
    UpdateEvent,
)
from layerwise.layer_file import load_layer, save_layer
from layerwise.replay import Divergence, Replay, ReplayReport
from tests.unit.recorded_run import ALLOWED, RecordedRun, recorded_spec

Edit = Callable[[list[Event]], Sequence[Event]]
Kind = TypeVar("Kind", bound=Event)


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


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six updates, whose first block begins a new life at the cut of version 3."""
    directory = tmp_path_factory.mktemp("honest")
    torch.set_num_threads(1)
    spec = recorded_spec(train={"steps": 6, "seed": 5, "optimizer": "adamw"})
    run = RecordedRun(spec, directory, seed=2, interleaved=True)
    run.begin()
    run.train(5)
    run.commit(3)
    run.begin([0], 3)
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


def diverged(directory: Path) -> Divergence:
    report = replayed(directory)
    assert not report.passed
    assert report.divergence is not None
    assert any(line.startswith("DIVERGED") for line in report.lines())
    assert str(report.divergence) in report.lines()[-1]
    return report.divergence


def rewrite(
    directory: Path, start: int, life: int, edit: Edit, header: Callable[[LogHeader], LogHeader] = lambda one: one
) -> list[Event]:
    """Write a block's log anew with what ``edit`` makes of its events; gives those before."""
    stop = {0: 2, 2: 4}[start]
    folder = events_folder(directory, start, stop, life)
    reader = LogReader(folder)
    before = [record.event for record in reader.records]
    shutil.rmtree(folder)
    with EventLog(directory, header(reader.header)) as log:
        for event in edit(list(before)):
            log.append(event)
    return before


def find(events: Sequence[Event], kind: type[Kind], where: Callable[[Kind], bool] = lambda _: True) -> int:
    return next(place for place, event in enumerate(events) if isinstance(event, kind) and where(event))


def changed(events: list[Event], place: int, **values: object) -> list[Event]:
    events[place] = replace(events[place], **values)  # type: ignore[arg-type]
    return events


def test_the_honest_run_is_reached(honest: Path) -> None:
    report = replayed(honest)
    assert report.passed, report.lines()
    assert report.cuts == (3, 6)
    assert report.to_json()["passed"] is True
    assert len(report.to_json()["layers"]) == 4


def test_another_hash_is_named_with_its_layer_life_and_version(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        place = find(events, UpdateEvent, lambda one: one.layer == 1 and one.version == 4)
        return changed(events, place, digest="0" * 32)

    before = rewrite(directory, 0, 1, edit)
    found = diverged(directory)
    assert (found.layer, found.life, found.version) == (1, 1, 4)
    assert found.what == "another hash of the layer's state"
    assert found.recorded == "0" * 32
    assert found.replayed == next(
        one.digest for one in before if isinstance(one, UpdateEvent) and one.layer == 1 and one.version == 4
    )
    assert "processor, torch and threads of the shards are the recorded ones" in found.advice


def test_forward_passes_in_another_order_give_another_hash(directory: Path) -> None:
    """They write the running statistics of batch normalisation in another order."""
    version = 0

    def edit(events: list[Event]) -> list[Event]:
        nonlocal version
        places = [place for place, one in enumerate(events) if isinstance(one, ForwardEvent) and one.layer == 0]
        for one, other in pairwise(places):
            first, second = events[one], events[other]
            assert isinstance(first, ForwardEvent)
            assert isinstance(second, ForwardEvent)
            between = events[one + 1 : other]
            if first.read == second.read and not any(
                getattr(event, "attempt", None) == first.attempt for event in between
            ):
                events[one], events[other] = second, first
                version = first.read + 1
                return events
        raise AssertionError("the seed gives no two passes in a row")

    rewrite(directory, 0, 1, edit)
    found = diverged(directory)
    assert (found.layer, found.life, found.version) == (0, 1, version)
    assert found.what == "another hash of the layer's state"


def test_gradients_of_two_updates_that_were_exchanged_are_found(directory: Path) -> None:
    """The first update that they enter is named, though each record for itself may be true."""
    version = 0

    def edit(events: list[Event]) -> list[Event]:
        nonlocal version
        taken = [place for place, one in enumerate(events) if isinstance(one, AccumulateEvent) and one.layer == 2]
        for one, other in pairwise(taken):
            first, second = events[one], events[other]
            assert isinstance(first, AccumulateEvent)
            assert isinstance(second, AccumulateEvent)
            if first.update + 1 == second.update:
                events[one] = replace(second, update=first.update, read=first.read, base=min(second.base, first.read))
                events[other] = replace(first, update=second.update, read=second.read)
                version = first.update + 1
                return events
        raise AssertionError("there are updates")

    rewrite(directory, 2, 2, edit)
    found = diverged(directory)
    assert (found.layer, found.life, found.version) == (2, 2, version)


@pytest.mark.parametrize(
    ("kind", "values", "what"),
    [
        (UpdateEvent, {"learning_rate": 0.5}, "another learning_rate of event 'update'"),
        (UpdateEvent, {"open_tickets": 9}, "another open_tickets of event 'update'"),
        (ForwardEvent, {"read": 1}, "another read of event 'forward'"),
        (AccumulateEvent, {"read": 3}, "event 'accumulate' is refused"),
        (RestoreEvent, {"samples": 3}, "another samples of event 'restore'"),
    ],
)
def test_every_field_is_compared(directory: Path, kind: type[Event], values: dict[str, object], what: str) -> None:
    rewrite(directory, 0, 1, lambda events: changed(events, find(events, kind, lambda one: one.layer == 0), **values))
    found = diverged(directory)
    assert (found.layer, found.life, found.version) == (0, 1, 1)
    assert found.what == what


def test_a_pass_that_is_missing_is_missed(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        del events[find(events, PassEvent, lambda one: one.layer == 2)]
        return events

    rewrite(directory, 2, 2, edit)
    assert "is under way" in diverged(directory).replayed


def test_what_a_pass_without_a_ticket_read_counts(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        place = find(events, BackwardEvent)
        event = events[place]
        assert isinstance(event, BackwardEvent)
        return changed(events, place, read=event.read - 1)

    rewrite(directory, 2, 2, edit)
    found = diverged(directory)
    assert found.layer in (0, 1), "the layers below get another gradient"
    assert found.life == 3
    assert found.what == "another hash of the layer's state"


def test_a_saved_cut_with_other_bits_is_found(directory: Path) -> None:
    """Though its file fits its manifest."""
    manifest = load_manifest(directory, 6)
    file = layer_files(manifest)[3]
    copy = load_layer(directory, 6, file)
    name, tensor = next(iter(copy.parameters.items()))
    forged = replace(copy, parameters={**copy.parameters, name: tensor + 1e-6})
    (cut_folder(directory, 6) / file.name).unlink()
    new = save_layer(directory, "job", forged)
    for one in manifest["files"]:
        if one["layer"] == 3:
            one.update(bytes=new.num_bytes, digest=new.digest)
    commit_manifest(directory, 6, json.dumps(manifest), [0], life=max(one["life"] for one in manifest["files"]))
    found = diverged(directory)
    assert (found.layer, found.life) == (3, 2)
    assert f"parameter {name}" in found.replayed


def test_another_machine_is_named_beside_what_differs(directory: Path) -> None:
    def edit(events: list[Event]) -> list[Event]:
        return changed(events, find(events, UpdateEvent), digest="0" * 32)

    def header(one: LogHeader) -> LogHeader:
        assert one.machine is not None
        return replace(one, machine=replace(one.machine, processor="Another 7", torch="1.0"))

    rewrite(directory, 0, 1, edit, header)
    found = diverged(directory)
    assert found.advice.startswith("the machine is another: ")
    assert "processor: Another 7 was recorded" in found.advice
    assert "torch: 1.0 was recorded" in found.advice


# Crashes ------------------------------------------------------------------------------------------------------------


def test_records_that_a_power_cut_took_are_left_out_where_a_later_life_made_them_void(tmp_path: Path) -> None:
    """The last records of one block are gone; what another block did with them can't be executed any more."""
    run = RecordedRun(recorded_spec(train={"steps": 6, "seed": 5, "optimizer": "adamw"}), tmp_path, seed=2)
    run.begin()
    run.train(5)
    run.commit(3)
    run.begin(None, 3)
    run.train()
    run.commit(6)
    run.close()
    assert replayed(tmp_path).left_out == ()

    def edit(events: list[Event]) -> list[Event]:
        cuts = [place for place, one in enumerate(events) if isinstance(one, CutEvent) and one.version == 3]
        return events[: max(cuts) + 1]

    rewrite(tmp_path, 0, 1, edit)
    report = replayed(tmp_path)
    assert report.passed, report.lines()
    (left,) = report.left_out
    assert left.startswith("life 2 of block 2-4: its last ")
    assert "waits for the outputs of layer 1" in left
    assert report.cuts == (3, 6)


def test_a_log_that_can_not_be_executed_to_its_end_is_not_passed(directory: Path) -> None:
    rewrite(directory, 0, 1, lambda events: events[: len(events) * 3 // 4])
    report = replayed(directory)
    assert not report.passed
    assert report.divergence is None
    assert "can't be executed" in report.unfinished
    assert report.lines()[-1].startswith("UNFINISHED")
