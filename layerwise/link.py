"""Exactly-once, in-order delivery between two processes over a path that loses, repeats and reorders.

Pure: packets are values, the time is an argument, messages are opaque. The gRPC transport carries packets on streams
that break; the simulated world carries the same packets over a network that does worse.

A link is named by its two *link incarnations*, one drawn by each side when it makes its `Link`. A packet says from
which incarnation to which it goes, so nothing of an earlier link can enter a later one:

    packet.receiver        packet.sender     what it is                                  what happens
    mine                   the peer's        this link                                   taken
    mine                   another           the peer forgot this link and made anew     LinkLost
    0 (not known yet)      the peer's        this link, before the peer heard from me    taken
    0                      another           the peer restarted, or opened anew          LinkLost, then a new link
    another                any               a link that I no longer have                refused (`refusal`)
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from layerwise.errors import MalformedMessageError, RetryableError


class LinkLost(RetryableError):
    """The link is gone for good; what was not acknowledged may or may not have arrived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """What travels on a link. ``sequence`` 0 carries no message; ``lost`` (why) ends the link."""

    sender: int
    receiver: int
    acknowledged: int
    sequence: int = 0
    message: Any = None
    lost: str = ""

    @property
    def opens(self) -> bool:
        """Whether the sender has not heard from the receiver yet."""
        return self.receiver == 0 and not self.lost


def refusal(packet: Packet, reason: str) -> Packet:
    """The answer to a packet that belongs to no link here: it ends the link at its sender."""
    return Packet(sender=packet.receiver, receiver=packet.sender, acknowledged=0, lost=reason)


@dataclass(slots=True)
class _Sent:
    sequence: int
    message: Any
    size: int
    at: float


class Link:
    """One side of a link.

    What is sent but not acknowledged is bounded by ``max_packets`` and ``max_size`` (in the units of `send`'s
    ``size``; one message larger than that goes alone); the rest waits in the outbox. Packets of the peer that come
    early wait for the missing ones, at most ``max_packets``.

    Not thread-safe: one thread owns a link.
    """

    def __init__(
        self,
        incarnation: int,
        *,
        resend_seconds: float = 0.25,
        acknowledge_seconds: float = 0.02,
        max_packets: int = 1024,
        max_size: int = 32 << 20,
    ) -> None:
        if incarnation <= 0:
            raise ValueError(f"a link incarnation is positive, not {incarnation}")
        self.incarnation = incarnation
        self.peer_incarnation = 0
        self.outbox_size = 0
        self._resend_seconds = resend_seconds
        self._acknowledge_seconds = acknowledge_seconds
        self._max_packets = max_packets
        self._max_size = max_size
        self._sequence = 0
        self._outbox: deque[tuple[Any, int]] = deque()
        self._unacknowledged: deque[_Sent] = deque()
        self._unacknowledged_size = 0
        self._received = 0
        self._early: dict[int, Any] = {}
        self._acknowledge_at = math.inf
        self._taken_packets = 0

    @property
    def acknowledged(self) -> int:
        """Up to which sequence the peer's packets have arrived here."""
        return self._received

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is unacknowledged."""
        return not self._outbox and not self._unacknowledged

    @property
    def due(self) -> float:
        """When `tick` has to be called at the latest (``inf``: no need)."""
        if math.isinf(self._resend_seconds):
            return self._acknowledge_at
        return min(self._acknowledge_at, *(sent.at + self._resend_seconds for sent in self._unacknowledged), math.inf)

    def send(self, message: Any, now: float, size: int = 1) -> list[Packet]:
        """Queue ``message``; returns the packets that may leave now."""
        self._outbox.append((message, size))
        self.outbox_size += size
        return self._release(now)

    def receive(self, packet: Packet, now: float) -> list[Any]:
        """Take a packet in; returns the messages that are now in order.

        Call `tick` afterwards for what it allows or requires to send.

        Raises:
            LinkLost: the peer restarted, opened a new link, or no longer knows this one.
            MalformedMessageError: it acknowledges what was never sent.
        """
        if packet.receiver not in (0, self.incarnation):
            return []
        if packet.lost:
            if packet.sender == self.peer_incarnation or (packet.receiver and not packet.sender):
                raise LinkLost(packet.lost)
            return []
        if self.peer_incarnation == 0:
            self.peer_incarnation = packet.sender
        elif packet.sender != self.peer_incarnation:
            raise LinkLost("the other side has begun a new link: it was restarted, or had given this one up")
        self._acknowledge(packet.acknowledged)
        if packet.sequence == 0:
            return []
        if packet.sequence <= self._received:
            self._acknowledge_at = now  # a repeat: the sender has not heard of it
            return []
        if packet.sequence > self._received + self._max_packets:
            return []  # beyond what is kept; it comes again
        self._early.setdefault(packet.sequence, packet.message)
        messages = []
        while self._received + 1 in self._early:
            self._received += 1
            messages.append(self._early.pop(self._received))
        self._taken_packets += 1
        wait = self._acknowledge_seconds if self._taken_packets < self._max_packets // 4 and messages else 0.0
        self._acknowledge_at = min(self._acknowledge_at, now + wait)
        return messages

    def reconnect(self, now: float) -> list[Packet]:
        """The path is new: everything unacknowledged again; at least one packet, so that the peer hears of it."""
        packets = self._resend(self._unacknowledged, now) + self._release(now)
        return packets or [self._packet()]

    def tick(self, now: float) -> list[Packet]:
        """What is due: what now has room, resends, or a bare acknowledgement."""
        packets = self._release(now)
        if not math.isinf(self._resend_seconds):
            packets += self._resend(
                [sent for sent in self._unacknowledged if sent.at + self._resend_seconds <= now], now
            )
        if not packets and self._acknowledge_at <= now:
            packets.append(self._packet())
        return packets

    def acknowledge_now(self, now: float) -> None:
        """Let the next `tick` acknowledge: the receiver of much data frees the sender's memory."""
        self._acknowledge_at = min(self._acknowledge_at, now)

    def farewell(self, reason: str) -> Packet:
        """The packet that ends the link at the other side."""
        return Packet(sender=self.incarnation, receiver=self.peer_incarnation, acknowledged=self._received, lost=reason)

    def _packet(self, sequence: int = 0, message: Any = None) -> Packet:
        self._acknowledge_at = math.inf
        self._taken_packets = 0
        return Packet(
            sender=self.incarnation,
            receiver=self.peer_incarnation,
            acknowledged=self._received,
            sequence=sequence,
            message=message,
        )

    def _release(self, now: float) -> list[Packet]:
        packets = []
        while self._outbox:
            message, size = self._outbox[0]
            waiting = len(self._unacknowledged)
            if waiting and (waiting >= self._max_packets or self._unacknowledged_size + size > self._max_size):
                break
            self._outbox.popleft()
            self.outbox_size -= size
            self._sequence += 1
            self._unacknowledged.append(_Sent(self._sequence, message, size, now))
            self._unacknowledged_size += size
            packets.append(self._packet(self._sequence, message))
        return packets

    def _resend(self, sent: deque[_Sent] | list[_Sent], now: float) -> list[Packet]:
        for one in sent:
            one.at = now
        return [self._packet(one.sequence, one.message) for one in sent]

    def _acknowledge(self, sequence: int) -> None:
        if sequence > self._sequence:
            raise MalformedMessageError(
                f"the peer acknowledges packet {sequence}, but only {self._sequence} were sent on this link"
            )
        while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
            self._unacknowledged_size -= self._unacknowledged.popleft().size


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What `LinkTable.admit` decided: the link that takes the packet, or ``None`` with the ``refusal`` to answer.

    ``lost``: the link that the peer had before is gone, and why.
    """

    link: Link | None
    lost: str = ""
    refusal: Packet | None = None


class LinkTable:
    """The links of one process by the names of its peers; decides to which link a packet belongs.

    ``new_link`` makes a `Link` with a fresh incarnation. The incarnations of the last ``max_retired`` links given up
    are remembered, so that a late packet can't open one of them again.
    """

    def __init__(self, new_link: Callable[[], Link], *, max_retired: int = 1024) -> None:
        self._new_link = new_link
        self._links: dict[str, Link] = {}
        self._retired: OrderedDict[int, None] = OrderedDict()
        self._max_retired = max_retired

    def __iter__(self) -> Iterator[tuple[str, Link]]:
        return iter(list(self._links.items()))

    def get(self, peer: str) -> Link | None:
        """The link to ``peer``, if there is one."""
        return self._links.get(peer)

    def open(self, peer: str) -> Link:
        """The link to ``peer``; made when there is none."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = self._new_link()
        return link

    def drop(self, peer: str) -> Link | None:
        """Give the link up (lost or closed); later packets of it are refused."""
        link = self._links.pop(peer, None)
        if link is not None and link.peer_incarnation:
            self._retired[link.peer_incarnation] = None
            if len(self._retired) > self._max_retired:
                self._retired.popitem(last=False)
        return link

    def admit(self, peer: str, packet: Packet) -> Admission:
        """Find, replace or make the link for a packet that ``peer`` sent."""
        link = self._links.get(peer)
        if packet.lost:
            return Admission(link=link)
        if packet.sender in self._retired:
            return Admission(link=None, refusal=refusal(packet, "this link was given up"))
        if packet.receiver == 0:
            if link is None:
                return Admission(link=self.open(peer))
            if link.peer_incarnation in (0, packet.sender):
                return Admission(link=link)
            self.drop(peer)
            return Admission(link=self.open(peer), lost="the process was restarted, or began a new link")
        if link is None or packet.receiver != link.incarnation:
            return Admission(
                link=None,
                refusal=refusal(packet, "this link is not known here: it was given up, or the process was restarted"),
            )
        return Admission(link=link)
