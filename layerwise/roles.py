"""What every role object is: events in, effects out.

A role has no socket, thread, clock or file. Its shell (real or simulated) calls ``on_message`` and the like from one thread, with the time as an
argument, and carries out the effects in order. The same objects run on gRPC and in the simulated world.
"""

from __future__ import annotations

from dataclasses import dataclass

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
