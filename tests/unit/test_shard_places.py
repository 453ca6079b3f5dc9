from __future__ import annotations

import pytest

from layerwise.messages import BlockPlace, Hello, Role
from layerwise.server.job_record import PlacementRecord
from layerwise.server.membership import Process
from layerwise.server.shard_places import ShardPlaces

BLOCKS = ((0, 2), (2, 3), (3, 7))


def process(name: str, device: str = "cpu") -> Process:
    hello = Hello(role=Role.SHARD, name=name, address=f"here:{name}", device=device, host="here", pid=1, version="1")
    return Process(hello, 1, joined=0.0, seen=0.0)


def places(*names: str, absent: tuple[str, ...] = ()) -> ShardPlaces:
    processes = {name: process(name) for name in names if name not in absent}
    return ShardPlaces(names, processes, 10.0)


def test_the_route_says_who_holds_which_layers_in_which_life() -> None:
    made = places("a", "b", "c")
    for block, life in enumerate((4, 7, 5)):
        made.give_life(block, life)
    assert made.route(BLOCKS) == (
        BlockPlace(start=0, stop=2, shard="a", address="here:a", life=4),
        BlockPlace(start=2, stop=3, shard="b", address="here:b", life=7),
        BlockPlace(start=3, stop=7, shard="c", address="here:c", life=5),
    )


def test_a_place_that_was_left_is_empty_and_remembers_whose_it_was() -> None:
    made = places("a", "b", "c")
    left = made.vacate("b", "its link broke", 12.5)
    assert (left.block, left.process, left.empty_since, left.why) == (1, "b", 12.5, "its link broke")
    assert made.empty == (left,)
    assert made.names == ("a", "c")
    assert "b" not in made
    with pytest.raises(KeyError):
        made.of("b")
    assert len(made) == 3


def test_who_takes_a_place_has_none_of_its_layers_yet() -> None:
    made = places("a", "b", "c")
    for block in range(3):
        made.give_life(block, block + 1)
        made[block].holds = True
    assert made.lacking == ()
    made.vacate("b", "gone", 1.0)
    made.fill(1, process("x", "cuda:1"))
    assert made.lacking == (1,)
    assert (made.of("x").block, made.of("x").device, made.of("x").life) == (1, "cuda:1", 2)
    assert made.empty == ()


def test_who_comes_back_with_its_layers_lacks_nothing() -> None:
    made = places("a", "b", absent=("a", "b"))
    assert [one.why for one in made.empty] == ["it has not come back yet"] * 2
    assert made.empty[0].empty_since == 10.0
    made.fill(0, process("a"), holds=True)
    assert made.lacking == (1,)
    assert made.names == ("a",)


def test_a_new_life_has_no_layers_until_they_are_restored() -> None:
    made = places("a")
    made[0].holds = True
    made.give_life(0, 9)
    assert made.lacking == (0,)
    assert made[0].life == 9


def test_the_lives_of_an_earlier_coordinator_are_remembered_by_block() -> None:
    made = places("a", "b", absent=("a", "b"))
    records = [
        PlacementRecord(process="b", role=Role.SHARD, block=1, start=2, stop=4, life=8),
        PlacementRecord(process="a", role=Role.SHARD, block=0, start=0, stop=2, life=3),
    ]
    made.remember(records)
    assert [made[block].life for block in range(2)] == [3, 8]
