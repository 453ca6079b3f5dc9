"""The audit: an honest job passes every check, in memory and on disk; a ledger that contradicts its logs does not."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from layerwise.applied import AppliedSet
from layerwise.audit import StoredEvents, audit, audit_directory
from layerwise.audit_report import CLAIMS
from layerwise.cuts import commit_manifest, write_layer_file
from layerwise.dropped import DroppedMicrobatch
from layerwise.errors import NotFoundError
from layerwise.event_log import EventLog, events_folder
from layerwise.events import RestoreEvent, UpdateEvent
from tests.unit.audited_job import CUT, NUM_LAYERS, PLAN, World, edit, failed, find, honest, rate


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_honest_job_passes_every_check(seed: int, window: int) -> None:
    world = honest(seed, window)
    report = audit(world.blocks, ledger=world.ledger, plan=PLAN, learning_rate=rate)
    assert failed(report) == [], report.lines()
    applicable = {check.name for check in report.checks if check.applicable}
    assert applicable == set(CLAIMS) - {"rollbacks"} - ({"position-order"} if window > 1 else set())
    assert all(check.examined for check in report.checks if check.applicable)
    assert {facts.version for facts in report.layers} == {PLAN.num_updates}
    assert [facts.dropped for facts in report.layers] == [1, 1, 0, 0]
    for facts in report.layers:
        assert len(facts.staleness) - 1 <= PLAN.max_staleness(window)


def test_report_agrees_with_the_ledgers_that_wrote_the_log() -> None:
    world = World(5)
    world.live(0, updates=PLAN.num_updates + 1)
    report = audit(world.blocks, ledger=world.ledger)
    assert [facts.staleness for facts in report.layers] == [one.staleness.staleness for one in world.ledgers.values()]
    assert sum(report.layers[0].staleness) == PLAN.num_microbatches


def test_running_job_is_audited_without_promising_its_end() -> None:
    world = World(3)
    world.live(0, updates=CUT + 1)
    report = audit(world.blocks)
    assert failed(report) == []
    assert not report.check("agreement").applicable
    assert not report.check("ledger").applicable


def test_life_may_begin_at_the_cut_that_the_life_before_began_at() -> None:
    world = World(3)
    world.live(0, updates=CUT + 2)
    world.live(1, updates=CUT + 1)
    world.live(2, updates=PLAN.num_updates + 1)
    assert failed(audit(world.blocks, ledger=world.ledger)) == []


def test_a_life_after_a_rollback_may_halve_its_learning_rates() -> None:
    world = World(3)
    world.live(0, updates=CUT + 2)
    world.live(1, updates=CUT + 1, rate_factor=0.5)
    world.live(2, updates=PLAN.num_updates + 1, rate_factor=0.25)
    report = audit(world.blocks, ledger=world.ledger, learning_rate=rate)
    assert failed(report) == []
    assert report.check("rollbacks").applicable


def many_dropped() -> World:
    world = World(3)
    world.live(0, updates=PLAN.num_updates + 1, drop=frozenset({3, 9, 20}))
    return world


@pytest.mark.parametrize("listed", range(4))
def test_a_ledger_may_list_only_the_first_of_what_was_dropped(listed: int) -> None:
    world = many_dropped()
    ledger = replace(world.ledger, dropped=world.ledger.dropped[:listed], num_dropped=3)
    assert failed(audit(world.blocks, ledger=ledger)) == []


@pytest.mark.parametrize(("first", "num_dropped"), [(1, 3), (0, 4), (1, -1)])
def test_what_a_ledger_lists_and_counts_as_dropped_must_be_what_the_logs_have_first(
    first: int, num_dropped: int
) -> None:
    world = many_dropped()
    ledger = replace(world.ledger, dropped=world.ledger.dropped[first : first + 2], num_dropped=num_dropped)
    assert failed(audit(world.blocks, ledger=ledger)) == ["ledger"]


@pytest.mark.parametrize(
    "change",
    [
        {"samples_leased": 999},
        {"samples_applied": 150, "samples_leased": 152},
        {"dropped": ()},
        {"dropped": (DroppedMicrobatch(microbatch=PLAN.microbatch(20), reason="loss", missing_from=1),)},
        {"dropped": (DroppedMicrobatch(microbatch=PLAN.microbatch(20), reason="loss"),)},
        {"dropped": (DroppedMicrobatch(microbatch=PLAN.microbatch(20), reason="", missing_from=0),)},
        {
            "dropped": (
                DroppedMicrobatch(microbatch=PLAN.microbatch(20), reason="loss", missing_from=0),
                DroppedMicrobatch(microbatch=PLAN.microbatch(3), reason="loss"),
            )
        },
    ],
    ids=lambda change: "-".join(change),
)
def test_ledger_that_contradicts_the_logs_fails(change: dict[str, object]) -> None:
    world = honest()
    ledger = replace(world.ledger, **change)  # type: ignore[arg-type]
    assert failed(audit(world.blocks, ledger=ledger)) == ["ledger"]


def test_what_the_logs_hold_as_dropped_is_listed_with_its_reason() -> None:
    world = honest()
    report = audit(world.blocks)
    assert report.dropped == world.ledger.dropped
    first = report.dropped[0].microbatch
    assert f"samples {first} are dropped: loss is not finite (layer 0 dropped it" in "\n".join(report.lines())
    [listed, *_] = report.to_json()["dropped"]  # type: ignore[misc]
    assert listed == {
        "epoch": first.epoch,
        "start": first.start,
        "stop": first.stop,
        "reason": "loss is not finite",
        "missing_from": 0,
    }


def test_logs_of_another_plan_are_found() -> None:
    world = honest()
    other = replace(world.blocks[0].header, job="another-1")
    assert failed(audit([replace(world.blocks[0], header=other), *world.blocks[1:]], ledger=world.ledger)) == ["log"]
    again = [replace(block, header=replace(block.header, job=f"{block.header.job}-2")) for block in world.blocks[:1]]
    assert failed(audit([*again, *world.blocks[1:]], ledger=world.ledger)) == [], "resumed under another number"
    assert failed(audit(world.blocks, plan=replace(PLAN, num_samples=23))) == ["log"]
    assert failed(audit(world.blocks, plan=replace(PLAN, num_updates=99))) == []  # a job may go on for longer


def test_layers_must_end_at_the_ledgers_version() -> None:
    world = honest()
    assert failed(audit(world.blocks, ledger=replace(world.ledger, version=7))) == ["agreement"]


def test_learning_rates_are_compared_with_the_schedule_where_it_is_given() -> None:
    world = honest()
    report = audit(world.blocks, learning_rate=lambda layer, samples, staleness: 0.5)
    assert failed(report) == ["learning-rates"]
    assert "it must be 0.5" in report.check("learning-rates").failures[0]


def test_life_that_restores_another_set_is_found() -> None:
    world = honest()
    event = find(world.blocks, RestoreEvent, 2)
    moved = AppliedSet(event.applied.watermark, set(event.applied.above), {0})
    report = audit(edit(world.blocks, event, replace(event, applied=moved)))
    assert failed(report) == ["lives"]
    assert "another set of microbatches" in report.check("lives").failures[0]


# --- on disk ------------------------------------------------------------------------------------------------------


def store(folder: Path, blocks: list[StoredEvents]) -> None:
    for block in blocks:
        with EventLog(folder, block.header) as log:
            for record in block.records:
                log.append(record.event)


def test_directory_is_audited_like_the_records_in_memory(tmp_path: Path) -> None:
    world = honest()
    store(tmp_path, world.blocks)
    assert audit_directory(tmp_path, ledger=world.ledger) == audit(world.blocks, ledger=world.ledger)


def test_torn_tail_of_a_life_that_ended_in_a_crash_passes(tmp_path: Path) -> None:
    world = honest()
    store(tmp_path, world.blocks)
    path = events_folder(tmp_path, 0, 2, 0) / "segment-000000.log"
    path.write_bytes(path.read_bytes()[:-20])
    report = audit_directory(tmp_path, ledger=world.ledger)
    assert failed(report) == [], report.lines()


def test_life_that_never_began_is_passed_over(tmp_path: Path) -> None:
    world = honest()
    store(tmp_path, world.blocks)
    folder = events_folder(tmp_path, 0, 2, 2)
    folder.mkdir()
    (folder / "segment-000000.log").write_bytes(b"")
    assert failed(audit_directory(tmp_path, ledger=world.ledger)) == []


@pytest.mark.parametrize("place", [10, -2000])
def test_log_that_can_not_be_read_fails_its_check(tmp_path: Path, place: int) -> None:
    world = honest()
    store(tmp_path, world.blocks)
    path = events_folder(tmp_path, 2, 4, 1) / "segment-000000.log"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    report = audit_directory(tmp_path)
    assert "log" in failed(report)
    assert "segment-000000.log, line" in report.check("log").failures[0]


def running() -> World:
    """A job that trains still: there is no ledger yet that its logs could be compared with."""
    world = World(3)
    world.live(0, updates=CUT + 2)
    return world


def commit_cut(folder: Path, life: int = 0) -> None:
    """The cut at ``CUT``, as `life` of every layer saved it."""
    written = [write_layer_file(folder, CUT, layer, life, b"state") for layer in range(NUM_LAYERS)]
    files = [
        {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
        for one in written
    ]
    commit_manifest(folder, CUT, json.dumps({"version": CUT, "files": files}), (), life=life)


def test_a_log_that_goes_beyond_every_durable_cut_passes(tmp_path: Path) -> None:
    store(tmp_path, running().blocks)
    commit_cut(tmp_path)
    assert failed(audit_directory(tmp_path)) == []
    # What no cut has need not have reached the disk when the power failed.
    path = events_folder(tmp_path, 0, 2, 0) / "segment-000000.log"
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"event":"cut"' in line)
    path.write_text("".join(lines[: last + 1]))
    assert failed(audit_directory(tmp_path)) == []


def test_a_log_that_ends_before_a_durable_cut_was_cut_short(tmp_path: Path) -> None:
    store(tmp_path, running().blocks)
    commit_cut(tmp_path)
    path = events_folder(tmp_path, 0, 2, 0) / "segment-000000.log"
    lines = path.read_text().splitlines(keepends=True)
    # At the end of a line, so that nothing looks torn.
    path.write_text("".join(takewhile(lambda line: '"event":"cut"' not in line, lines)))
    report = audit_directory(tmp_path)
    assert failed(report) == ["log"]
    [sentence] = report.check("log").failures
    assert sentence.startswith(
        f"life 0 of layers [0, 1] saved the cut at version {CUT}, and its log has nothing of that"
    )


def test_a_log_that_was_removed_is_missed_where_its_cut_is_there(tmp_path: Path) -> None:
    world = honest()
    store(tmp_path, world.blocks)
    commit_cut(tmp_path, life=7)
    assert failed(audit_directory(tmp_path, ledger=world.ledger)) == ["log"]


def test_directory_without_logs_is_not_a_job(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is this a job's directory"):
        audit_directory(tmp_path)


def test_report_is_plain_json_and_readable_lines() -> None:
    world = honest()
    event = find(world.blocks, UpdateEvent, 3)
    report = audit(edit(world.blocks, event, replace(event, open_tickets=9)), ledger=world.ledger)
    value = json.loads(json.dumps(report.to_json()))
    assert value["passed"] is False
    assert [check["name"] for check in value["checks"]] == list(CLAIMS)
    assert value["layers"][2]["name"] == "layer-2"
    lines = report.lines()
    assert lines[-1] == f"job honest: {len(CLAIMS) - 1} of {len(CLAIMS)} checks passed"
    assert any(line.startswith("FAIL  staleness-identity") for line in lines)
    assert any(line.startswith("-     position-order") for line in lines)


def test_only_the_first_contradictions_of_a_check_are_told() -> None:
    world = honest()
    blocks = [replace(block, header=replace(block.header, max_staleness=-1)) for block in world.blocks]
    check = audit(blocks).check("staleness-bound")
    assert len(check.failures) == 5
    assert check.num_failures > 50
