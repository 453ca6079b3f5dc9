"""What every role object is: events in, effects out.

A role has no socket, thread, clock or file. Its shell (real or simulated) calls ``on_message`` and the like from one thread, with the time as an
argument, and carries out the effects in order. The same objects run on gRPC and in the simulated world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from layerwise.messages import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Put ``message`` on the link to process ``peer`` (delivered exactly once and in order, unless the link is lost)."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a link to process ``peer`` at ``address`` (a no-op when there is one)."""

    peer: str
    address: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the link to ``peer``; nothing is reported."""

    peer: str


Effect = Send | Connect | Disconnect


class LinkRole(Protocol):
    """A role as the transport sees it."""

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message from ``peer`` arrived."""
        ...

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """The link to ``peer`` is gone for good: that incarnation was killed, left, or stayed unreachable past the grace."""
        ...

    def on_tick(self, now: float) -> list[Effect]:
        """Called about ten times a second."""
        ...
