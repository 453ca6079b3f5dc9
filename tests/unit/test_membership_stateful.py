"""Who is there: against a dictionary of what each process last said and was told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from layerwise.messages import Heartbeat, Hello, Role
from layerwise.server.membership import Membership

NAMES = [f"{role}-{number}" for role in ("shard", "forward") for number in (0, 2, 10)]
names = st.sampled_from(NAMES)
jobs = st.sampled_from(["toy-1", "toy-2"])
LIMIT = 30.0


@dataclass
class Known:
    """What the model has of a living process."""

    incarnation: int
    seen: float
    job: str | None = None
    leaving: bool = False
    limit: float = LIMIT
    sent: int = 0


class MembershipMachine(RuleBasedStateMachine):
    """Processes come, speak, fall silent, work, leave and are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.members = Membership(heartbeat_timeout=LIMIT)
        self.known: dict[str, Known] = {}
        self.incarnations: dict[str, int] = {}
        self.gone_bytes = {"shard": 0, "forward": 0}

    @rule(seconds=st.floats(0.0, 20.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=names)
    def join(self, name: str) -> None:
        role = Role(name.partition("-")[0])
        hello = Hello(role=role, name=name, address="", device="cpu", host="here", pid=1, version="1")
        if name in self.known:
            with pytest.raises(ValueError, match="already there"):
                self.members.join(hello, self.now)
            return
        self.incarnations[name] = self.incarnations.get(name, 0) + 1
        self.known[name] = Known(self.incarnations[name], self.now)
        assert self.members.join(hello, self.now).free

    @rule(name=names)
    def lose(self, name: str) -> None:
        lost, known = self.members.lose(name), self.known.pop(name, None)
        assert (lost is None) == (known is None)
        if lost is not None and known is not None:
            assert lost.job == known.job
            self.gone_bytes[name.partition("-")[0]] += known.sent

    @rule(name=names, sent=st.integers(0, 5))
    def speak(self, name: str, sent: int) -> None:
        if name in self.known:
            known = self.known[name]
            known.seen = self.now
            known.sent += sent
            self.members.heard(name, self.now, Heartbeat(sent_bytes=known.sent) if sent else None)

    @rule(name=names, job=jobs, limit=st.floats(1.0, 60.0))
    def assign(self, name: str, job: str, limit: float) -> None:
        if name in self.known and self.known[name].job is None:
            self.members.assign([name], job, limit)
            self.known[name].job, self.known[name].limit, self.known[name].leaving = job, limit, False

    @rule(name=names)
    def leave(self, name: str) -> None:
        if name in self.known and self.known[name].job is not None:
            self.members.leave(name)
            self.known[name].leaving = True

    @rule(name=names, job=jobs)
    def release(self, name: str, job: str) -> None:
        self.members.release(name, job)
        if name in self.known and self.known[name].job == job:
            known = self.known[name]
            known.job, known.leaving, known.limit = None, False, LIMIT

    @invariant()
    def it_says_what_the_model_says(self) -> None:
        assert len(self.members) == len(self.known)
        listed = {one.name: one for one in self.members}
        assert set(listed) == set(self.known)
        for name, known in self.known.items():
            one = listed[name]
            assert self.members.get(name) is one
            assert (one.incarnation, one.job, one.leaving) == (known.incarnation, known.job, known.leaving)
            assert one.free == (known.job is None)
        overdue = {name for name, known in self.known.items() if self.now - known.seen > known.limit}
        assert {one.name for one in self.members.overdue(self.now)} == overdue

    @invariant()
    def each_role_is_listed_in_natural_order(self) -> None:
        for role in (Role.SHARD, Role.FORWARD):
            found = [one.name for one in self.members.of_role(role)]
            assert found == [name for name in NAMES if name in self.known and name.startswith(str(role))]

    @invariant()
    def bytes_are_counted_for_ever(self) -> None:
        for role in (Role.SHARD, Role.FORWARD):
            living = sum(known.sent for name, known in self.known.items() if name.startswith(str(role)))
            assert self.members.wire_bytes(role)[0] == self.gone_bytes[str(role)] + living


TestMembership = MembershipMachine.TestCase
TestMembership.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
