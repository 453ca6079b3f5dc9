"""How copies of blocks get into the memory of other shards and back: played between roles, without network or layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from layerwise.cuts import file_digest
from layerwise.messages import (
    BlockPlace,
    LayerFile,
    Message,
    StandbyHeld,
    StandbyOffer,
    StandbyPart,
    StandbyRequest,
    StandbySource,
    Tensors,
)
from layerwise.roles import Connect, Effect, Send
from layerwise.server.standby_copy import StandbyCopy
from layerwise.server.standby_role import KEPT_COPIES, StandbyRole, holder_of
from layerwise.standby_bytes import PART_BYTES, ArrivingLayer, LayerBytes

LIMIT = 4 * PART_BYTES


def route(*addresses: str, lives: Mapping[int, int] | None = None) -> tuple[BlockPlace, ...]:
    """Two layers a block, on shards "0", "1", ..., in life 1 or what ``lives`` says."""
    return tuple(
        BlockPlace(
            start=2 * block, stop=2 * block + 2, shard=str(block), address=address, life=(lives or {}).get(block, 1)
        )
        for block, address in enumerate(addresses)
    )


HERE = route("unix:/a", "unix:/b", "unix:/c")


class Bench:
    """Roles of all shards of a route; what they send each other arrives in order, what is for others is noted."""

    def __init__(self, places: tuple[BlockPlace, ...] = HERE) -> None:
        self.route = places
        self.roles = {place.shard: self.role(block) for block, place in enumerate(places)}
        self.told: list[tuple[str, StandbyHeld]] = []
        self.sent: list[tuple[str, str, Message]] = []
        self.connected: list[tuple[str, str, str]] = []
        self.on_the_way: deque[tuple[str, str, Message]] = deque()
        self.cut_off: set[str] = set()

    def role(self, block: int) -> StandbyRole:
        return StandbyRole(
            job="job", block=block, route=self.route, sink=ArrivingLayer, limits=[LIMIT] * len(self.route)
        )

    def perform(self, sender: str, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(peer="coordinator", message=message):
                    assert isinstance(message, StandbyHeld)
                    self.told.append((sender, message))
                case Send(peer=peer, message=message):
                    self.sent.append((sender, peer, message))
                    self.on_the_way.append((sender, peer, message))
                case Connect(peer=peer, address=address):
                    self.connected.append((sender, peer, address))

    def deliver(self, most: int = 1_000) -> None:
        while self.on_the_way and most:
            most -= 1
            sender, peer, message = self.on_the_way.popleft()
            if peer not in self.cut_off and peer in self.roles:
                self.perform(peer, self.roles[peer].on_message(sender, message, 0.0))

    def offer(self, block: int, version: int, *, life: int = 1, sizes: tuple[int, ...] = (10, 20)) -> StandbyCopy:
        copy = made(block, version, life=life, sizes=sizes)
        self.perform(str(block), self.roles[str(block)].offer(copy))
        return copy

    def held(self, name: str) -> list[tuple[int, int]]:
        return [(copy.block, copy.version) for copy in self.roles[name].held]

    def requests(self) -> list[StandbyRequest]:
        return [message for _, _, message in self.sent if isinstance(message, StandbyRequest)]


def made(block: int, version: int, *, life: int = 1, sizes: tuple[int, ...] = (10, 20)) -> StandbyCopy:
    files, layers = [], {}
    for layer, size in enumerate(sizes, start=2 * block):
        data = bytearray((version + layer + place) % 251 for place in range(size))
        name = f"layer-{layer}"
        files.append(LayerFile(layer=layer, life=life, name=name, num_bytes=size, digest=file_digest(data)))
        layers[layer] = LayerBytes(data)
    return StandbyCopy(block=block, life=life, version=version, files=tuple(files), layers=layers)


# Who keeps whose ------------------------------------------------------------------------------------------------------


def holders(*addresses: str) -> list[str]:
    places = route(*addresses)
    found = [holder_of(places, block) for block in range(len(places))]
    assert all(one is not None for one in found)
    return [one.shard for one in found if one is not None]


def test_on_one_host_the_next_shard_keeps_a_blocks_copies() -> None:
    assert holders("unix:/a", "unix:/b") == ["1", "0"]
    assert holders("10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3") == ["1", "2", "0"]


def test_where_there_are_several_hosts_another_one_keeps_them_and_the_work_is_spread() -> None:
    assert holders("a:1", "a:2", "b:1", "b:2") == ["2", "3", "0", "1"]
    assert holders("a:1", "b:1", "a:2") == ["1", "0", "1"]
    assert holders("[::1]:5", "[::2]:5", "[::1]:6") == ["1", "0", "1"]


def test_a_shard_alone_has_nobody() -> None:
    assert holder_of(route("a:1"), 0) is None
    bench = Bench(route("a:1"))
    bench.offer(0, 3)
    assert bench.sent == []


# To the keeper --------------------------------------------------------------------------------------------------------


def test_a_copy_is_fetched_and_the_coordinator_and_its_owner_hear_of_it() -> None:
    bench = Bench()
    copy = bench.offer(0, 3)
    assert bench.connected == [("0", "1", "unix:/b")]
    assert bench.roles["0"].num_bytes == 30
    bench.deliver()
    assert bench.held("1") == [(0, 3)]
    ((name, told),) = bench.told
    assert (name, told.block, told.life, told.version, told.files) == ("1", 0, 1, 3, copy.files)
    assert bench.roles["0"].num_bytes == 0, "the owner needs it no more"
    assert bench.roles["1"].num_bytes == 30
    held = bench.roles["1"].held[0]
    assert {layer: one.data for layer, one in held.layers.items()} == {  # type: ignore[attr-defined]
        layer: one.data
        for layer, one in copy.layers.items()  # type: ignore[attr-defined]
    }


def test_a_large_layer_comes_in_parts_and_one_request_is_under_way_at_a_time() -> None:
    bench = Bench()
    bench.offer(0, 3, sizes=(PART_BYTES + 5, 7))
    under_way = 0
    while bench.on_the_way:
        bench.deliver(1)
        under_way = max(under_way, sum(isinstance(one, StandbyPart) for _, _, one in bench.on_the_way))
    assert [(one.layer, one.offset) for one in bench.requests()] == [(0, 0), (0, PART_BYTES), (1, 0)]
    assert under_way == 1
    assert bench.held("1") == [(0, 3)]


def test_the_newest_two_copies_of_a_block_are_kept() -> None:
    bench = Bench()
    for version in range(3, 12, 3):
        bench.offer(0, version)
        bench.deliver()
    assert KEPT_COPIES == 2
    assert bench.held("1") == [(0, 6), (0, 9)]
    assert bench.roles["1"].num_bytes == 60


def test_an_offer_while_a_copy_is_fetched_waits_and_a_newer_one_takes_its_place() -> None:
    bench = Bench()
    bench.offer(0, 3)
    bench.deliver(2)  # the offer and the first request
    bench.offer(0, 6)
    bench.offer(0, 9)
    assert bench.roles["0"].num_bytes == 60, "the one that is being fetched, and the newest"
    bench.deliver()
    assert bench.held("1") == [(0, 3), (0, 9)]


def test_an_owner_that_has_moved_on_says_so_and_the_next_copy_is_fetched() -> None:
    bench = Bench()
    bench.offer(0, 3)
    bench.offer(0, 6)  # nothing was asked for yet, so that it takes the place of the first
    bench.deliver()
    assert bench.held("1") == [(0, 6)]
    assert any(isinstance(one, StandbyPart) and not one.data.items for _, _, one in bench.sent)


@pytest.mark.parametrize(
    ("change", "sender"),
    [
        ({"life": 2}, "0"),
        ({"block": 1}, "0"),
        ({"block": 9}, "0"),
        ({}, "2"),
        ({"files": ()}, "0"),
        ({"files": made(0, 3).files[:1]}, "0"),
        ({"files": made(0, 3, sizes=(LIMIT, 1)).files}, "0"),
    ],
    ids=["another life", "own block", "no block", "another shard", "no layers", "a layer missing", "too large"],
)
def test_what_is_no_copy_of_its_block_is_not_fetched(change: dict[str, Any], sender: str) -> None:
    bench = Bench()
    offer = StandbyOffer(job="job", block=0, life=1, version=3, files=made(0, 3).files)
    assert bench.roles["1"].on_message(sender, replace(offer, **change), 0.0) == []
    assert bench.roles["1"].num_bytes == 0


def test_only_its_keeper_fetches_a_copy() -> None:
    bench = Bench()
    offer = StandbyOffer(job="job", block=0, life=1, version=3, files=made(0, 3).files)
    assert bench.roles["2"].on_message("0", offer, 0.0) == []


def part(data: Tensors, **changes: Any) -> StandbyPart:
    values = {"job": "job", "block": 0, "life": 1, "version": 3, "layer": 0, "offset": 0, "data": data}
    return StandbyPart(**{**values, **changes})


@pytest.mark.parametrize("size", [9, 11], ids=["short", "long"])
def test_bytes_that_are_not_what_was_offered_are_not_kept(size: int) -> None:
    bench = Bench()
    bench.offer(0, 3)
    bench.deliver(1)
    wrong = LayerBytes(bytearray(size)).part(0)
    bench.on_the_way.clear()
    bench.perform("1", bench.roles["1"].on_message("0", part(wrong), 0.0))
    rest = LayerBytes(bytearray(1)).part(0)
    bench.perform("1", bench.roles["1"].on_message("0", part(rest, offset=9), 0.0))
    bench.on_the_way.clear()
    assert bench.told == []
    assert bench.roles["1"].num_bytes == 0
    bench.offer(0, 6)
    bench.deliver()
    assert bench.held("1") == [(0, 6)], "the next one is"


def test_parts_that_nobody_asked_for_change_nothing() -> None:
    bench = Bench()
    data = made(0, 3).layers[0].part(0)
    assert bench.roles["1"].on_message("0", part(data), 0.0) == []
    bench.offer(0, 3)
    bench.deliver(1)
    for wrong in ({"version": 6}, {"layer": 1}, {"offset": 5}, {"life": 2}):
        assert bench.roles["1"].on_message("0", part(data, **wrong), 0.0) == []
    assert bench.roles["1"].on_message("2", part(data), 0.0) == []
    bench.deliver()
    assert bench.held("1") == [(0, 3)]


def test_a_lost_owner_ends_what_was_to_come_from_it_and_leaves_what_has() -> None:
    bench = Bench()
    bench.offer(0, 3)
    bench.deliver()
    bench.offer(0, 6)
    bench.deliver(2)
    assert bench.roles["1"].on_lost("0") == []
    bench.deliver()
    assert bench.held("1") == [(0, 3)]


def test_copies_for_others_outlive_the_own_blocks_life() -> None:
    bench = Bench()
    bench.offer(0, 3)
    bench.deliver()
    bench.offer(1, 3)
    later = route("unix:/a", "unix:/b", "unix:/c", lives={1: 5})
    bench.roles["1"].assign(1, later)
    assert bench.held("1") == [(0, 3)]
    assert bench.roles["1"].num_bytes == 30, "nothing of its own"
    assert bench.roles["1"].offer(made(1, 6)) == [], "which is over"
    assert [message.version for message in (one.message for one in bench.roles["1"].tell_held())] == [3]  # type: ignore[union-attr]


# Back -----------------------------------------------------------------------------------------------------------------


def lost_and_replaced() -> tuple[Bench, StandbyRole, StandbyCopy, list[Any]]:
    """Block 0 was copied at version 3; its shard is new, and fetches the copy from shard 1."""
    bench = Bench()
    copy = bench.offer(0, 3, sizes=(PART_BYTES + 5, 7))
    bench.deliver()
    bench.route = route("unix:/n", "unix:/b", "unix:/c", lives={0: 4})
    new = bench.roles["0"] = bench.role(0)
    bench.sent.clear()
    outcome: list[Any] = []

    def done(layers: Any) -> list[Effect]:
        outcome.append(layers)
        return []

    source = StandbySource(holder="1", address="unix:/b", life=1, files=copy.files)
    bench.perform("0", new.restore(source, 3, done, patience=4.0, now=10.0))
    return bench, new, copy, outcome


def test_a_shard_that_takes_a_block_over_gets_the_same_bytes() -> None:
    bench, new, copy, outcome = lost_and_replaced()
    assert bench.connected[-1] == ("0", "1", "unix:/b")
    bench.deliver()
    (layers,) = outcome
    assert {layer: one.data for layer, one in layers.items()} == {
        layer: one.data
        for layer, one in copy.layers.items()  # type: ignore[attr-defined]
    }
    assert new.num_bytes == 0
    assert bench.held("1") == [(0, 3)], "it may be needed again"


def test_a_copy_that_is_gone_is_said_to_be() -> None:
    bench, _, _, outcome = lost_and_replaced()
    bench.roles["1"] = bench.role(1)
    bench.deliver()
    assert outcome == ["1 does not have it any more"]


def test_a_keeper_that_is_lost_meanwhile_is_not_waited_for() -> None:
    bench, new, _, outcome = lost_and_replaced()
    bench.deliver(2)
    assert new.on_lost("2") == []
    assert new.on_lost("1") == []
    assert outcome == ["the link to 1 broke"]
    bench.deliver()
    assert new.on_lost("1") == []
    assert len(outcome) == 1


def test_a_keeper_that_does_not_answer_is_given_up_in_time() -> None:
    _, new, _, outcome = lost_and_replaced()
    new.on_tick(13.9)
    assert outcome == []
    new.on_tick(14.1)
    assert outcome == ["1 did not answer within 4 s"]


def test_bytes_with_another_hash_are_not_restored() -> None:
    bench, new, copy, outcome = lost_and_replaced()
    bench.on_the_way.clear()
    wrong = bytearray(copy.files[0].num_bytes)
    for offset in (0, PART_BYTES):
        new.on_message("1", part(LayerBytes(wrong).part(offset), offset=offset), 10.0)
    assert outcome == ["the bytes of layer 0 do not have the hash that they were sent with"]
