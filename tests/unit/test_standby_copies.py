"""Which copy a lost block goes on from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerwise.job import parse_job
from layerwise.messages import Hello, LayerFile, Role, StandbyHeld
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.membership import Process
from layerwise.server.preparation import prepare
from layerwise.server.shard_places import ShardPlaces
from layerwise.server.standby_copies import StandbyCopies, first_whole_cut, next_evaluation
from tests.unit.played_cluster import profile, spec

FILES = (LayerFile(layer=0, life=1, name="layer-0", num_bytes=1, digest="d"),)


def process(name: str) -> Process:
    hello = Hello(role=Role.SHARD, name=name, address=f"unix:/{name}", device="cpu", host="here", pid=1, version="0")
    return Process(hello=hello, incarnation=1, joined=0.0, seen=0.0)


def places() -> ShardPlaces:
    """Blocks 0, 1 and 2 on shards a, b and c, in lives 1, 2 and 3."""
    made = ShardPlaces(("a", "b", "c"), {name: process(name) for name in "abc"}, 0.0)
    for block in range(3):
        made.give_life(block, block + 1)
    return made


def held(block: int, version: int, *, life: int | None = None) -> StandbyHeld:
    return StandbyHeld(job="job", block=block, life=block + 1 if life is None else life, version=version, files=FILES)


def versions(copies: StandbyCopies, shards: ShardPlaces, block: int, **limits: int) -> int | None:
    found = copies.choose([block], shards, **{"above": 0, **limits})
    return found[block].version if found else None


def test_the_newest_copy_above_the_durable_cut_is_chosen() -> None:
    copies, shards = StandbyCopies(), places()
    for version in (3, 6, 9):
        assert copies.hold("b", held(0, version), shards)
    copies.hold("b", held(0, 9), shards)
    assert versions(copies, shards, 0) == 9
    assert versions(copies, shards, 0, above=8) == 9
    assert versions(copies, shards, 0, above=9) is None, "a durable cut is as good, and safer"
    assert versions(copies, shards, 0, until=8) == 6
    assert versions(copies, shards, 0, until=5) is None, "of a block, one process keeps two"
    assert versions(copies, shards, 1) is None
    assert (copies.newest(0), copies.newest(1)) == (9, 0)
    source = copies.choose([0], shards, above=0)[0].source(shards)
    assert (source.holder, source.address, source.life, source.files) == ("b", "unix:/b", 1, FILES)


def test_a_copy_is_gone_with_its_process() -> None:
    copies, shards = StandbyCopies(), places()
    copies.hold("b", held(0, 3), shards)
    copies.hold("c", held(0, 6), shards)
    shards.vacate("c", "killed", 1.0)
    assert versions(copies, shards, 0) == 3, "who has left its place may have forgotten it"
    copies.lose("b")
    assert versions(copies, shards, 0) is None


def test_a_copy_of_another_life_than_the_newest_does_not_count() -> None:
    copies, shards = StandbyCopies(), places()
    shards.give_life(0, 7)
    assert not copies.hold("b", held(0, 3, life=1), shards), "of a shard that was replaced"
    assert not copies.hold("b", held(5, 3), shards), "of no block"
    assert versions(copies, shards, 0) is None


def test_a_new_life_makes_older_copies_void_from_its_beginning_on() -> None:
    copies, shards = StandbyCopies(), places()
    copies.hold("b", held(0, 3), shards)
    copies.hold("b", held(0, 6), shards)
    copies.begin(0, 6)
    assert versions(copies, shards, 0) == 6, "it may be restored once more"
    copies.begin(0, 4)
    assert versions(copies, shards, 0) == 3
    copies.begin(0, 0)
    assert versions(copies, shards, 0) is None


def test_a_copy_that_could_not_be_had_is_not_chosen_again() -> None:
    copies, shards = StandbyCopies(), places()
    copies.hold("b", held(0, 3), shards)
    copies.hold("b", held(0, 6), shards)
    assert copies.refuse(0, 6)
    assert not copies.refuse(0, 6), "which is known"
    assert versions(copies, shards, 0) == 3


def test_cuts_that_a_block_has_passed_by_are_never_whole() -> None:
    assert first_whole_cut([0, 0, 0], 0) == 0
    assert first_whole_cut([4, 25, 0], 10) == 25
    assert first_whole_cut([4, 8], 10) == 10


@pytest.mark.parametrize(
    ("every", "evaluated", "found"),
    [(None, [], None), (3, [], 3), (3, [3, 6], 9), (3, [4], 6)],
    ids=["none", "the first", "the next", "after one between"],
)
def test_a_block_goes_on_no_further_than_the_next_evaluation(
    every: int | None, evaluated: list[int], found: int | None
) -> None:
    text = spec(train={"evaluate_every": every})
    prepared = prepare(parse_job(text), profile())
    record = JobRecord(
        job="toy-1", number=1, name="toy", state=JobState.RUNNING, spec_json=text, directory="runs/toy", created=0.0
    )
    record = replace(record, evaluations=tuple({"version": version} for version in evaluated))
    assert next_evaluation(record, prepared) == found
    unvalidated = replace(prepared, profile=replace(profile(), num_validation_samples=0))
    assert next_evaluation(record, unvalidated) is None
