"""One peer of a transport: its link, what carries it, and when to give it up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from layerwise.address import Address
from layerwise.carrier import Carrier
from layerwise.link import Link, Packet
from layerwise.silence import Silence, Verdict

log = logging.getLogger(__name__)


class Peer:
    """The link to process ``name`` and its state on this side. Event loop's thread only."""

    def __init__(self, name: str, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.link = link
        self.address: Address | None = None
        """Where it is dialed; ``None``: only it dials."""
        self.carrier: Carrier | None = None
        self.dialing: asyncio.Task[None] | None = None
        self.down = asyncio.Event()
        """Set while nothing carries the link."""
        self.heard = False
        """A frame of this link has arrived."""
        self.up = False
        """One has arrived on the stream that carries it now."""
        self.reason = "nobody answered"
        """Why the last stream ended."""
        self._loop = loop
        self._asked_at: float | None = None
        self._silence = Silence()
        self._seen_bytes = 0
        self._loss_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None

    def attach(self, carrier: Carrier) -> None:
        """Let ``carrier`` carry the link from now on: all that is unacknowledged goes again."""
        older, self.carrier = self.carrier, carrier
        if older is not None:
            older.release()
        self.down.clear()
        self.up, self._asked_at = False, None
        self._silence, self._seen_bytes = Silence(), 0
        self.push(self.link.reconnect(self._loop.time()))

    def detach(self, carrier: Carrier) -> bool:
        """The stream has ended; whether it was the one that carried the link."""
        if self.carrier is not carrier:
            return False
        self.carrier = None
        self.up = False
        self.down.set()
        return True

    def silent_for(self) -> float:
        """Somebody else says this peer's name: ask the one that has it for an answer; seconds without one."""
        now = self._loop.time()
        if self._asked_at is None and self.carrier is not None:
            self._asked_at = now
            self.carrier.ask()
        return 0.0 if self._asked_at is None else now - self._asked_at

    def look(self, seconds: float) -> None:
        """One of the looks at whether the peer is there still, ``seconds`` of silence being too much (see `Silence`)."""
        carrier = self.carrier
        if carrier is None or not self.up:
            return  # it is waited for already, and not for as long
        sent, self._seen_bytes = carrier.sent_bytes - self._seen_bytes, carrier.sent_bytes
        match self._silence.look(waiting=not self.link.idle or self._asked_at is not None, sent_bytes=sent):
            case Verdict.ASK:
                carrier.ask()
            case Verdict.GIVE_UP:
                reason = f"{self.name} was asked for a sign of life and gave none for {seconds:g} s"
                log.warning("%s; its stream is given up", reason)
                carrier.give_up(reason)

    def push(self, packets: list[Packet]) -> None:
        """Hand packets to the carrier. Without one nothing is lost: `Link.reconnect` gives them again."""
        if packets and self.carrier is not None:
            self.carrier.push(packets)

    def tick(self) -> None:
        """Send what an acknowledgement has made room for, and our own acknowledgement when it is due."""
        self.push(self.link.tick(self._loop.time()))
        due = self.link.due
        if self._tick_timer is None and due != float("inf"):
            self._tick_timer = self._loop.call_at(due, self._on_tick_timer)

    def _on_tick_timer(self) -> None:
        self._tick_timer = None
        self.tick()

    def expect(self, seconds: float, expire: Callable[[Peer], None]) -> None:
        """Call ``expire`` after ``seconds``, unless the peer is heard before."""
        if self._loss_timer is None:
            self._loss_timer = self._loop.call_later(seconds, expire, self)

    def hear(self) -> None:
        """A frame has arrived."""
        self.heard = self.up = True
        self._silence.hear()
        self._asked_at = None
        if self._loss_timer is not None:
            self._loss_timer.cancel()
            self._loss_timer = None

    def close(self, farewell: str, *, stuck_seconds: float) -> None:
        """Leave the link: what is queued still goes, then the other side is told ``farewell``.

        Its stream ends when for ``stuck_seconds`` nothing has left on it.
        """
        for timer in (self._loss_timer, self._tick_timer):
            if timer is not None:
                timer.cancel()
        carrier, self.carrier = self.carrier, None
        self.down.set()
        if carrier is not None:
            carrier.release(self.link.farewell(farewell))
            carrier.end_when_stuck(stuck_seconds)
        if self.dialing is not None and not (carrier is not None and carrier.dialed):
            self.dialing.cancel()  # otherwise dialing ends by itself, after the farewell
