from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import MalformedMessageError
from layerwise.link import Link, LinkLost, LinkTable, Packet, refusal

SIDES = ("left", "right")


class BadNetwork:
    """Two links and the packets under way between them."""

    def __init__(self, **limits: int) -> None:
        self.links = {"left": Link(11, **limits), "right": Link(22, **limits)}
        self.flying: dict[str, list[Packet]] = {side: [] for side in SIDES}
        self.sent: dict[str, list[int]] = {side: [] for side in SIDES}
        self.arrived: dict[str, list[int]] = {side: [] for side in SIDES}
        self.now = 0.0
        self.names = itertools.count()

    def other(self, side: str) -> str:
        return SIDES[1 - SIDES.index(side)]

    def send(self, side: str) -> None:
        message = next(self.names)
        self.sent[side].append(message)
        self.flying[side] += self.links[side].send(message, self.now)

    def deliver(self, side: str, index: int, *, keep: bool) -> None:
        """Hand one packet that ``side`` sent to the other one; ``keep``: a copy stays under way."""
        if not self.flying[side]:
            return
        index %= len(self.flying[side])
        packet = self.flying[side][index] if keep else self.flying[side].pop(index)
        other = self.other(side)
        self.arrived[other] += self.links[other].receive(packet, self.now)
        self.flying[other] += self.links[other].tick(self.now)

    def lose(self, side: str, index: int) -> None:
        if self.flying[side]:
            self.flying[side].pop(index % len(self.flying[side]))

    def reconnect(self) -> None:
        for side in SIDES:
            self.flying[side] = []
        for side in SIDES:
            self.flying[side] += self.links[side].reconnect(self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for side in SIDES:
            self.flying[side] += self.links[side].tick(self.now)

    def under_way(self, side: str) -> int:
        """How many messages (of size 1 each) are sent and have not arrived."""
        waiting = self.links[side].outbox_size
        return len(self.sent[side]) - waiting - self.links[self.other(side)].acknowledged

    def settle(self) -> None:
        """A network that loses nothing any more, for as long as something is unacknowledged."""
        for _ in range(1000):
            if all(link.idle for link in self.links.values()):
                return
            self.wait(1.0)
            for side in SIDES:
                while self.flying[side]:
                    self.deliver(side, 0, keep=False)
        raise AssertionError("the links do not come to rest")


side = st.sampled_from(SIDES)
index = st.integers(0, 20)
step = st.one_of(
    st.tuples(st.just("send"), side),
    st.tuples(st.just("deliver"), side, index),
    st.tuples(st.just("repeat"), side, index),
    st.tuples(st.just("lose"), side, index),
    st.tuples(st.just("reconnect")),
    st.tuples(st.just("wait"), st.sampled_from((0.001, 0.03, 0.3))),
)


@given(st.lists(step, max_size=80), st.integers(1, 4), st.integers(1, 6))
def test_every_message_arrives_once_and_in_order(
    steps: list[tuple[object, ...]], max_packets: int, max_size: int
) -> None:
    network = BadNetwork(max_packets=max_packets, max_size=max_size)
    for name, *arguments in steps:
        match name:
            case "send":
                network.send(str(arguments[0]))
            case "deliver":
                network.deliver(str(arguments[0]), int(str(arguments[1])), keep=False)
            case "repeat":
                network.deliver(str(arguments[0]), int(str(arguments[1])), keep=True)
            case "lose":
                network.lose(str(arguments[0]), int(str(arguments[1])))
            case "reconnect":
                network.reconnect()
            case "wait":
                network.wait(float(str(arguments[0])))
        for one in SIDES:
            assert network.under_way(one) <= max(max_size, 1)
    network.settle()
    for one in SIDES:
        assert network.arrived[network.other(one)] == network.sent[one]


def test_what_is_unacknowledged_is_bounded_and_the_rest_waits() -> None:
    link = Link(1, max_size=10)
    assert [packet.message for packet in link.send("a", 0.0, 6)] == ["a"]
    assert link.send("b", 0.0, 6) == []
    assert link.outbox_size == 6
    link.receive(Packet(sender=2, receiver=1, acknowledged=1), 0.0)
    assert [packet.message for packet in link.tick(0.0)] == ["b"]
    assert link.outbox_size == 0


def test_a_message_larger_than_the_bound_goes_alone() -> None:
    link = Link(1, max_size=10)
    assert len(link.send("huge", 0.0, 1000)) == 1
    assert link.send("small", 0.0, 1) == []


def test_an_acknowledgement_waits_a_little_for_a_message_to_ride_on() -> None:
    link = Link(1, acknowledge_seconds=0.02)
    assert link.receive(Packet(sender=2, receiver=0, acknowledged=0, sequence=1, message="x"), 0.0) == ["x"]
    assert link.due == 0.02
    assert link.tick(0.01) == []
    assert [packet.acknowledged for packet in link.tick(0.02)] == [1]
    assert link.tick(1.0) == []


def test_a_message_carries_the_acknowledgement() -> None:
    link = Link(1)
    link.receive(Packet(sender=2, receiver=0, acknowledged=0, sequence=1, message="x"), 0.0)
    assert [packet.acknowledged for packet in link.send("answer", 0.0)] == [1]
    assert link.tick(0.1) == []


def test_nothing_is_resent_before_its_time() -> None:
    link = Link(1, resend_seconds=0.25)
    link.send("x", 0.0)
    assert link.tick(0.2) == []
    assert [packet.message for packet in link.tick(0.25)] == ["x"]
    assert link.tick(0.3) == []


def test_packets_too_far_ahead_are_not_kept() -> None:
    link = Link(1, max_packets=2)
    for sequence in (3, 4):
        assert (
            link.receive(Packet(sender=2, receiver=1, acknowledged=0, sequence=sequence, message=sequence), 0.0) == []
        )
    assert link.receive(Packet(sender=2, receiver=1, acknowledged=0, sequence=2, message=2), 0.0) == []
    assert link.receive(Packet(sender=2, receiver=1, acknowledged=0, sequence=1, message=1), 0.0) == [1, 2]


def test_a_restarted_peer_ends_the_link() -> None:
    link = Link(1)
    link.receive(Packet(sender=2, receiver=0, acknowledged=0, sequence=1, message="x"), 0.0)
    with pytest.raises(LinkLost, match="restarted"):
        link.receive(Packet(sender=3, receiver=0, acknowledged=0, sequence=1, message="y"), 0.0)


def test_a_refusal_ends_the_link_it_names_and_no_other() -> None:
    link = Link(1)
    link.receive(Packet(sender=2, receiver=1, acknowledged=0), 0.0)
    mine = link.send("x", 0.0)[0]
    assert link.receive(refusal(replace(mine, sender=9), "gone"), 0.0) == []
    assert link.receive(refusal(replace(mine, receiver=7), "gone"), 0.0) == []
    with pytest.raises(LinkLost, match="gone"):
        link.receive(refusal(mine, "gone"), 0.0)


def test_packets_for_an_earlier_link_of_mine_are_ignored() -> None:
    link = Link(1)
    assert link.receive(Packet(sender=2, receiver=8, acknowledged=0, sequence=1, message="x"), 0.0) == []
    assert link.peer_incarnation == 0


def test_an_acknowledgement_of_the_future_is_refused() -> None:
    link = Link(1)
    with pytest.raises(MalformedMessageError, match="acknowledges packet 4, but only 0"):
        link.receive(Packet(sender=2, receiver=1, acknowledged=4), 0.0)


def make_table() -> LinkTable:
    incarnations = itertools.count(100)
    return LinkTable(lambda: Link(next(incarnations)), max_retired=2)


def opening(sender: int) -> Packet:
    return Packet(sender=sender, receiver=0, acknowledged=0, sequence=1, message="hello")


def test_an_opening_packet_makes_a_link_and_its_repeat_finds_it() -> None:
    table = make_table()
    first = table.admit("peer", opening(5))
    assert first.link is not None
    first.link.receive(opening(5), 0.0)
    again = table.admit("peer", opening(5))
    assert (again.link, again.lost) == (first.link, "")


def test_a_new_incarnation_replaces_the_link_and_the_old_one_stays_out() -> None:
    table = make_table()
    old = table.admit("peer", opening(5)).link
    assert old is not None
    old.receive(opening(5), 0.0)
    new = table.admit("peer", opening(6))
    assert new.lost
    assert new.link is not None
    assert new.link is not old
    new.link.receive(opening(6), 0.0)
    late = table.admit("peer", opening(5))
    assert late.link is None
    assert late.refusal is not None
    assert late.refusal.receiver == 5
    assert table.get("peer") is new.link


def test_a_packet_of_a_forgotten_link_is_refused() -> None:
    table = make_table()
    packet = Packet(sender=5, receiver=77, acknowledged=3, sequence=4, message="x")
    answer = table.admit("peer", packet)
    assert answer.link is None
    assert answer.refusal is not None
    assert (answer.refusal.sender, answer.refusal.receiver) == (77, 5)


def test_a_dropped_link_does_not_come_back_by_a_late_packet() -> None:
    table = make_table()
    link = table.admit("peer", opening(5)).link
    assert link is not None
    link.receive(opening(5), 0.0)
    table.drop("peer")
    assert table.admit("peer", opening(5)).link is None
    assert table.admit("peer", opening(6)).link is not None
