"""Who holds each block in which life, and which worker has which place: against plain lists."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerwise.job import parse_job
from layerwise.messages import Hello, Role
from layerwise.server.membership import Process
from layerwise.server.placement import Places
from layerwise.server.shard_places import ShardPlaces
from layerwise.server.worker_places import WorkerPlaces

NUM_BLOCKS = 3
blocks = st.integers(0, NUM_BLOCKS - 1)


def process(name: str, role: Role) -> Process:
    hello = Hello(role=role, name=name, address=f"at {name}", device="cpu", host="here", pid=1, version="1")
    return Process(hello, 1, joined=0.0, seen=0.0)


@dataclass
class Held:
    """What the model has of a block."""

    name: str
    there: bool = True
    life: int = 0
    holds: bool = False


class ShardPlacesMachine(RuleBasedStateMachine):
    """Shards come, are restored in new lives, go, and come back with their layers or without."""

    @initialize(absent=st.sets(blocks))
    def begin(self, absent: set[int]) -> None:
        self.num_names = NUM_BLOCKS
        self.next_life = 1
        names = [f"s{block}" for block in range(NUM_BLOCKS)]
        present = {name: process(name, Role.SHARD) for block, name in enumerate(names) if block not in absent}
        self.places = ShardPlaces(names, present, 7.0)
        self.model = [Held(name, block not in absent) for block, name in enumerate(names)]

    @rule(block=blocks)
    def lose(self, block: int) -> None:
        held = self.model[block]
        if not held.there:
            with pytest.raises(KeyError):
                self.places.vacate(held.name, "gone", 1.0)
            return
        left = self.places.vacate(held.name, "gone", 9.0)
        assert (left.block, left.process, left.life) == (block, held.name, held.life)
        held.there = held.holds = False

    @rule(block=blocks)
    def replace(self, block: int) -> None:
        held = self.model[block]
        if not held.there:
            self.num_names += 1
            held.name, held.there, held.holds = f"s{self.num_names}", True, False
            self.places.fill(block, process(held.name, Role.SHARD))

    @rule(block=blocks)
    def come_back(self, block: int) -> None:
        held = self.model[block]
        if not held.there and held.life:
            held.there = held.holds = True
            self.places.fill(block, process(held.name, Role.SHARD), holds=True)

    @rule()
    def assign(self) -> None:
        if self.places.empty:
            return
        for block in self.places.lacking:
            self.places.give_life(block, self.next_life)
            self.model[block].life = self.next_life
            self.next_life += 1

    @rule(block=blocks)
    def restore(self, block: int) -> None:
        if self.model[block].there and self.model[block].life:
            self.places[block].holds = self.model[block].holds = True

    @invariant()
    def it_says_what_the_model_says(self) -> None:
        there = [held.name for held in self.model if held.there]
        assert self.places.names == tuple(there)
        assert [one.block for one in self.places.empty] == [
            block for block, held in enumerate(self.model) if not held.there
        ]
        assert self.places.lacking == tuple(block for block, held in enumerate(self.model) if not held.holds)
        for block, held in enumerate(self.model):
            assert (held.name in self.places) is held.there
            assert self.places[block].life == held.life
            assert (self.places[block].empty_since is None) is held.there

    @invariant()
    def the_route_has_every_block_in_its_newest_life(self) -> None:
        route = self.places.route(((0, 1), (1, 4), (4, 6)))
        assert [(one.shard, one.life) for one in route] == [(held.name, held.life) for held in self.model]
        lives = [one.life for one in route if one.life]
        assert len(set(lives)) == len(lives)


class WorkerPlacesMachine(RuleBasedStateMachine):
    """Workers fill places and leave them; others join, and are counted nowhere."""

    @initialize(forward=st.integers(1, 3), detached=st.integers(0, 4))
    def begin(self, forward: int, detached: int) -> None:
        cluster = {"shards": NUM_BLOCKS, "forward": forward, "backward": {"attached": True, "detached": detached}}
        job = parse_job({"name": "toy", "model": "mlp", "data": "digits", "cluster": cluster})
        self.wanted = [(Role.FORWARD, -1)] * forward
        self.wanted += [(Role.BACKWARD, place % NUM_BLOCKS) for place in range(detached)]
        self.places = WorkerPlaces(job, Places(shards=(), forward=(), backward=()), ())
        self.filled: dict[str, tuple[Role, int]] = {}
        self.joined: dict[str, tuple[Role, int]] = {}
        self.num_names = 0

    @rule(role=st.sampled_from((Role.FORWARD, Role.BACKWARD)))
    def join(self, role: Role) -> None:
        self.num_names += 1
        name = f"{role}-{self.num_names}"
        served = [block for one, block in (*self.filled.values(), *self.joined.values()) if one is Role.BACKWARD]
        block = self.places.join(name, role)
        self.joined[name] = (role, block)
        if role is Role.FORWARD:
            assert block == -1
        else:
            assert served.count(block) == min(served.count(other) for other in range(NUM_BLOCKS))

    @precondition(lambda self: bool(self.joined))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.joined)))
        left = self.places.empty(name)
        assert (left.role, left.block) == self.joined.pop(name)

    @precondition(lambda self: len(self.filled) < len(self.wanted))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        role, block = data.draw(st.sampled_from(self.places.vacancies()))
        self.num_names += 1
        name = f"{role}-{self.num_names}"
        self.places.fill(name, role, block)
        self.filled[name] = (role, block)

    @precondition(lambda self: bool(self.filled))
    @rule(data=st.data())
    def empty(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.filled)))
        left = self.places.empty(name)
        assert (left.role, left.block) == self.filled.pop(name)

    @invariant()
    def filled_and_vacant_places_are_those_that_the_job_asks_for(self) -> None:
        assert sorted([*self.filled.values(), *self.places.vacancies()]) == sorted(self.wanted)
        assert (set(self.places.placed), set(self.places.joined)) == (set(self.filled), set(self.joined))
        everybody = {**self.filled, **self.joined}
        assert set(self.places.names) == set(everybody)
        assert {(one.process, one.role, one.block) for one in self.places.records} == {
            (name, role, block) for name, (role, block) in everybody.items()
        }
        assert bool(self.places.missing()) == (Role.FORWARD not in {role for role, _ in everybody.values()})


TestShardPlaces = ShardPlacesMachine.TestCase
TestShardPlaces.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestWorkerPlaces = WorkerPlacesMachine.TestCase
TestWorkerPlaces.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
