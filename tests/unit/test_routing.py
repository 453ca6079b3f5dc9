from __future__ import annotations

import json
from dataclasses import replace

import pytest

from layerwise.applied import AppliedSet
from layerwise.messages import Assignment, BlockReport, CutSaved, CutTaken, Hello, Ready, Reroute, Role, Stopping
from layerwise.server.job_record import CutRecord, JobRecord, JobState
from layerwise.server.membership import Process
from layerwise.server.routing import Routing
from layerwise.server.shard_places import ShardPlaces

RECORD = JobRecord(
    job="toy-1",
    number=1,
    name="toy",
    state=JobState.RUNNING,
    spec_json="{}",
    directory="runs/toy",
    created=0.0,
    blocks=((0, 1), (1, 3)),
    next_life=5,
)


def process(name: str) -> Process:
    hello = Hello(role=Role.SHARD, name=name, address=f"at {name}", device="cpu", host="here", pid=1, version="1")
    return Process(hello, 1, joined=0.0, seen=0.0)


def routing() -> tuple[Routing, ShardPlaces]:
    places = ShardPlaces(("a", "b"), {name: process(name) for name in "ab"}, 0.0)
    return Routing(places), places


def begun(record: JobRecord = RECORD) -> tuple[Routing, ShardPlaces]:
    """Both blocks restored in a first generation, and held since."""
    made, places = routing()
    assert made.begin(record, (0, 1)) == record.next_life + 2
    made.inform_shards(record)
    for block in range(2):
        places[block].holds = True
    return made, places


def ready(block: int, generation: int, *sets: AppliedSet, version: int = 0) -> Ready:
    applied = tuple(json.dumps(one.to_json()) for one in sets)
    return Ready(job="toy-1", block=block, generation=generation, applied_json=applied, version=version)


def test_a_generation_is_numbered_like_the_first_of_its_lives() -> None:
    made, _ = begun()
    assert made.generation == 5
    assert [place.life for place in made.route] == [5, 6]


def test_a_generation_without_new_lives_has_a_number_of_its_own() -> None:
    made, _ = begun()
    assert made.begin(replace(RECORD, next_life=7), ()) == 8
    assert made.generation == 7
    assert [place.life for place in made.route] == [5, 6]


def test_who_knows_the_job_is_told_of_the_route_and_who_has_to_be_restored_is_assigned() -> None:
    made, places = begun()
    record = replace(RECORD, next_life=7, cuts=(CutRecord(version=4, time=0.0, num_bytes=1),))
    places.vacate("b", "gone", 1.0)
    made.forget("b")
    places.fill(1, process("c"))
    made.begin(record, places.lacking)
    first, second = made.inform_shards(record)
    assert isinstance(first.message, Reroute)  # type: ignore[union-attr]
    assert (first.peer, first.message.durable, first.message.block) == ("a", 4, 0)  # type: ignore[union-attr]
    assert isinstance(second.message, Assignment)  # type: ignore[union-attr]
    assert (second.peer, second.message.cut, second.message.block) == ("c", 4, 1)  # type: ignore[union-attr]
    assert isinstance(made.inform("c", 1, record).message, Reroute)


def test_a_process_that_came_back_is_told_of_the_route_only() -> None:
    made, _ = begun()
    made.knows("forward-0")
    assert isinstance(made.inform("forward-0", -1, RECORD).message, Reroute)
    made.forget("forward-0")
    assert isinstance(made.inform("forward-0", -1, RECORD).message, Assignment)


def test_only_those_ready_for_this_generation_are_ready() -> None:
    made, _ = routing()
    assert not made.take_ready("a", ready(0, 0), stop=100)
    made.begin(RECORD, (0, 1))
    assert not made.take_ready("a", ready(0, 4, AppliedSet()), stop=100)
    assert made.take_ready("a", ready(0, 5, AppliedSet()), stop=100)
    assert made.missing(("a", "b")) == ["b"]
    made.begin(replace(RECORD, next_life=7), ())
    assert made.missing(("a", "b")) == ["a", "b"]


def test_a_set_that_can_not_be_read_is_an_error_of_whom_sent_it() -> None:
    made, _ = begun()
    with pytest.raises(ValueError, match="not an applied set"):
        made.take_ready("a", Ready(job="toy-1", block=0, generation=5, applied_json=("{}",)), stop=100)
    assert made.missing(("a",)) == ["a"]


def test_a_block_that_restored_another_version_is_a_mismatch_and_too_few_layers_are_an_error() -> None:
    record = replace(RECORD, cuts=(CutRecord(version=4, time=0.0, num_bytes=1),))
    made, places = routing()
    made.begin(record, (0, 1))
    made.take_ready("a", ready(0, 5, AppliedSet(), version=4), stop=100)
    made.take_ready("b", ready(1, 5, AppliedSet(), AppliedSet(), version=3), stop=100)
    assert made.mismatch() == "shard b restored version 3, and version 4 was asked for"
    made.take_ready("b", ready(1, 5, AppliedSet(), AppliedSet(), version=4), stop=100)
    assert made.mismatch() == ""
    with pytest.raises(ValueError, match="it brings the sets of 1 layers, b holds 2"):
        made.take_ready("b", ready(1, 5, AppliedSet(), version=4), stop=100)
    places[0].holds = True  # what it restored long ago does not matter
    made.take_ready("a", ready(0, 5, AppliedSet(), version=0), stop=100)
    made.take_ready("b", ready(1, 5, AppliedSet(), AppliedSet(), version=4), stop=100)
    assert made.mismatch() == ""


def test_the_sets_of_all_layers_are_in_order() -> None:
    made, _ = begun()
    made.take_ready("b", ready(1, 5, AppliedSet(2), AppliedSet(3)), stop=100)
    made.take_ready("a", ready(0, 5, AppliedSet(1)), stop=100)
    assert [one.watermark for one in made.applied_sets()] == [1, 2, 3]


def test_what_survivors_tell_of_cuts_is_kept_and_of_the_life_before_nothing() -> None:
    made, places = begun()
    record = replace(RECORD, next_life=7, cuts=(CutRecord(version=4, time=0.0, num_bytes=1),))
    places.give_life(1, 7)
    made.begin(record, (1,))
    kept = CutTaken(job="toy-1", block=0, version=8)
    made.keep("a", kept)
    made.keep("a", Stopping(job="toy-1", version=3))
    made.keep("b", CutSaved(job="toy-1", block=1, version=8))  # of the life before
    restored = CutTaken(job="toy-1", block=1, version=4)
    made.keep("b", restored)
    made.take_ready("b", ready(1, 7, AppliedSet(), AppliedSet(), version=4), stop=100)
    report = BlockReport(
        job="toy-1",
        block=1,
        layers=(),
        open_attempts=0,
        store_bytes=0,
        forward_queue=0,
        backward_queue=0,
        compute_seconds=0.0,
        log_bytes=0,
    )
    made.keep("b", report)
    assert made.take_early() == [("b", report), ("b", restored), ("a", kept)]  # the oldest cut first
    assert made.take_early() == []


def test_what_was_kept_of_a_shard_that_is_gone_is_forgotten() -> None:
    made, places = begun()
    made.keep("a", CutTaken(job="toy-1", block=0, version=8))
    places.vacate("a", "gone", 1.0)
    assert made.take_early() == []


def test_the_route_of_an_earlier_coordinator_is_known_before_anybody_is_there() -> None:
    places = ShardPlaces(("a", "b"), {}, 0.0)
    places.give_life(0, 3)
    places.give_life(1, 4)
    made = Routing(places)
    made.recall(RECORD)
    assert [(one.shard, one.start, one.stop, one.life) for one in made.route] == [("a", 0, 1, 3), ("b", 1, 3, 4)]
    assert made.generation == 0
