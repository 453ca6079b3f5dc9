"""Lives, leases and generations while shards, workers, links and the coordinator come and go in any order."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerwise.messages import Assignment, Lease, LeaseKind, LeaseRequest, LinkDown, Reroute, Role, StartTraining
from tests.unit.played_cluster import PlayedCluster, spec

SHARDS = ("shard-0", "shard-1", "shard-2")
WORKERS = ("forward-0", "forward-1")
PATIENT = {"heartbeat": 1e6, "lease": 1e6, "task": 1e6, "start": 1e5, "drain": 1e6}
MOST = 5
"""Fewer disruptions than the recoveries in a row after which a run is given up."""


class RecoveryMachine(RuleBasedStateMachine):
    """A job on two of three shards and one of two forward workers."""

    @initialize()
    def begin(self) -> None:
        self.played = PlayedCluster()
        self.played.add(Role.SHARD, *SHARDS)
        self.played.add(Role.FORWARD, *WORKERS)
        self.budget = 0
        self.disruptions = 0
        self.played.hold = self.hold
        self.job = self.played.submit(spec(timeouts=PATIENT))

    def hold(self, worker: str, lease: Lease) -> bool:
        if self.budget <= 0 and lease.kind is LeaseKind.TRAIN:
            return True
        self.budget -= len(lease.attempts)
        return False

    @property
    def running(self) -> bool:
        return self.job in self.played.role.runs

    def linked(self, name: str) -> bool:
        return self.played.role.members.get(name) is not None

    # Training --------------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 12))
    def train(self, count: int) -> None:
        self.budget = count
        self.played.play_held()
        self.budget = 0

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.played.wait(seconds)

    # Disruptions -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.disruptions < MOST)
    @rule(name=st.sampled_from((*SHARDS, *WORKERS)))
    def kill(self, name: str) -> None:
        if name in self.played.roles:
            self.disruptions += 1
            self.played.kill(name)

    @rule(name=st.sampled_from((*SHARDS, *WORKERS)))
    def start_again(self, name: str) -> None:
        if name not in self.played.roles:
            self.played.add(Role(name.partition("-")[0]), name)

    @precondition(lambda self: self.disruptions < MOST)
    @rule(name=st.sampled_from((*SHARDS, *WORKERS)))
    def lose_the_coordinator_s_link(self, name: str) -> None:
        if name in self.played.roles and self.linked(name):
            self.disruptions += 1
            self.played.perform(self.played.role.on_lost(name, self.played.now))
            self.played.run()

    @rule(name=st.sampled_from((*SHARDS, *WORKERS)))
    def find_the_coordinator(self, name: str) -> None:
        if name in self.played.roles and not self.linked(name):
            self.played.come_back(name)

    @precondition(lambda self: self.disruptions < MOST)
    @rule()
    def restart_the_coordinator(self) -> None:
        self.disruptions += 1
        self.played.restart_coordinator()

    @precondition(lambda self: self.disruptions < MOST and self.running)
    @rule()
    def break_a_link_between_shards(self) -> None:
        first = self.played.jobs[self.job].route[0].shard
        if first in self.played.blocks and self.linked(first):
            self.disruptions += 1
            generation = self.played.blocks[first].generation
            self.played.say(first, LinkDown(job=self.job, peer="other", generation=generation))

    # What always holds -----------------------------------------------------------------------------------------------

    @invariant()
    def no_attempt_is_leased_twice(self) -> None:
        leases = [message for _, message in self.played.sent if isinstance(message, Lease)]
        attempts = [attempt for lease in leases for attempt in lease.attempts]
        assert len(set(attempts)) == len(attempts)

    @invariant()
    def every_life_is_given_out_once_and_every_generation_is_above_all_lives_before(self) -> None:
        told = [message for _, message in self.played.sent if isinstance(message, Assignment | Reroute)]
        generations = [message.generation for message in told]
        assert generations == sorted(generations)
        for before, after in pairwise(told):
            if after.generation != before.generation:
                assert max(place.life for place in before.route) < after.generation
            else:
                assert after.route == before.route
        assigned = [
            (message.block, message.route[message.block].life)
            for peer, message in self.played.sent
            if isinstance(message, Assignment) and peer in SHARDS
        ]
        assert len({life for _, life in assigned}) == len(assigned)

    @invariant()
    def a_block_is_where_the_newest_route_says_and_nowhere_else_in_that_life(self) -> None:
        held = [(one.block, one.place.life) for one in self.played.blocks.values()]
        assert len(set(held)) == len(held)

    @invariant()
    def a_run_trains_only_with_every_place_filled(self) -> None:
        run = self.played.role.runs.get(self.job)
        if run is not None and run.training is not None and not run.training.suspended:
            assert not run.shards.empty
            assert len(run.shards.names) == 2

    @invariant()
    def a_generation_starts_once(self) -> None:
        starts = generation = 0
        for _, message in self.played.sent:
            if isinstance(message, Assignment | Reroute) and message.generation != generation:
                starts, generation = 0, message.generation
            elif isinstance(message, StartTraining):
                starts += 1
                assert starts <= 1

    def teardown(self) -> None:
        """From wherever it got to: when all are there again, the job comes to its end with every sample applied once."""
        if not hasattr(self, "played"):
            return
        played = self.played
        played.hold = lambda worker, lease: False
        for name in (*SHARDS, *WORKERS):
            if name not in played.roles:
                played.add(Role(name.partition("-")[0]), name)
            elif not self.linked(name):
                played.come_back(name)
        played.play_held()
        for _ in range(5):
            played.wait(1.5)
            for name in WORKERS:
                if (hosting := played.workers.get(name)) is not None:
                    played.say(name, LeaseRequest(job=hosting.job, count=3))
            played.report(*played.blocks)
        document = played.role.job(self.job)
        assert document["state"] == "done", document["message"]
        ledger = {"samples_leased": 80, "samples_applied": 80, "samples_dropped": 0, "num_dropped": 0, "dropped": []}
        assert document["ledger"] == ledger
        assert document["cuts"][-1]["version"] == 10
        assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


TestRecovery = RecoveryMachine.TestCase
TestRecovery.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
