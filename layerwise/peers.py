"""Everybody to whom a transport has a link, up or not, and why the last link to each of the others ended."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator

from layerwise.link import Admission, Link, LinkTable, Packet
from layerwise.peer import Peer
from layerwise.proto.frames import MAX_FRAME_PACKETS
from layerwise.silence import LOOKS

ACKNOWLEDGE_SECONDS = 0.25
"""How long what has arrived waits for a message of ours to be acknowledged along with. A frame for it alone costs both sides about a
quarter of a millisecond; much data and many messages are acknowledged sooner, so nobody waits for this."""

LONGEST_STUCK_SECONDS = 60.0
"""How long a stream that its link has left may be stuck, where silence has no limit."""

MAX_REASONS = 256
LONGEST_REASON = 500
"""Characters kept of why a link ended: the other side may have said it."""


class Peers:
    """Links by the names of the peers. ``on_lost(name)`` is called once when one is gone for good.

    A peer that owes us something and gives no sign of life for ``silence_seconds`` (``inf``: however long) loses its stream. One
    timer looks at all of them, so that a frame costs nothing for it. Event loop's thread only.
    """

    def __init__(self, *, credit_bytes: int, silence_seconds: float, on_lost: Callable[[str], None]) -> None:
        self.silence_seconds = silence_seconds
        self._look_timer: asyncio.TimerHandle | None = None
        self._credit_bytes = credit_bytes
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._table = LinkTable(self._new_link)
        self._peers: dict[str, Peer] = {}
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._refused: set[str] = set()

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, name: str) -> Peer | None:
        """The peer of that name, if there is a link to it."""
        return self._peers.get(name)

    def holds(self, state: Peer) -> bool:
        """Whether that link is there still."""
        return self._peers.get(state.name) is state

    def open(self, name: str) -> Peer:
        """Begin a link to ``name``, to which there is none."""
        return self._add(name, self._table.open(name))

    def admit(self, name: str, packet: Packet) -> Admission:
        """Find, replace or make the link for a packet that ``name`` sent, see `LinkTable.admit`."""
        return self._table.admit(name, packet)

    def admitted(self, name: str, link: Link) -> Peer | None:
        """The peer of a link that `admit` gave; ``None`` when it was closed meanwhile."""
        if self._table.get(name) is not link:
            return None
        return self._peers.get(name) or self._add(name, link)

    def expire(self, state: Peer) -> None:
        """Nothing was heard of the peer for too long."""
        self.lose(
            state, f"no answer from {state.name}{f' at {state.address}' if state.address else ''}: {state.reason}"
        )

    def lose(self, state: Peer, reason: str, *, refused: bool = False) -> None:
        """End a link that can't go on, and say so once."""
        if not self.holds(state):
            return
        reason = reason[:LONGEST_REASON]
        self.remove(state, reason)
        self._reasons[state.name] = reason
        (self._refused.add if refused else self._refused.discard)(state.name)
        if len(self._reasons) > MAX_REASONS:
            self._refused.discard(self._reasons.popitem(last=False)[0])
        self._on_lost(state.name)

    def remove(self, state: Peer, farewell: str) -> None:
        """Close a link; the other side is told ``farewell``."""
        del self._peers[state.name]
        if self._table.get(state.name) is state.link:
            self._table.drop(state.name)
        if not self._peers and self._look_timer is not None:
            self._look_timer.cancel()
            self._look_timer = None
        state.close(farewell, stuck_seconds=min(self.silence_seconds, LONGEST_STUCK_SECONDS))

    def lost_reason(self, name: str) -> str:
        """Why the last link to ``name`` was lost."""
        return self._reasons.get(name, "")

    def refused(self, name: str) -> bool:
        """Whether the last link to ``name`` ended because one side rejects what the other says."""
        return name in self._refused

    def _new_link(self) -> Link:
        return Link(
            secrets.randbits(63) | 1,
            resend_seconds=float("inf"),  # a stream loses nothing; after a break everything goes again
            acknowledge_seconds=ACKNOWLEDGE_SECONDS,
            max_packets=MAX_FRAME_PACKETS,
            max_size=self._credit_bytes,
        )

    def _add(self, name: str, link: Link) -> Peer:
        state = self._peers[name] = Peer(name, link, self._loop)
        self._reasons.pop(name, None)
        self._look_later()
        return state

    def _look_later(self) -> None:
        if self._look_timer is None and self._peers and math.isfinite(self.silence_seconds):
            self._look_timer = self._loop.call_later(self.silence_seconds / LOOKS, self._look)

    def _look(self) -> None:
        self._look_timer = None
        for state in self:
            state.look(self.silence_seconds)
        self._look_later()
