"""What every role object is: events in, effects out.

A role has no socket, thread, clock or file. Its shell (real or simulated) calls ``on_message`` and the like from one thread, with the time as an
argument, and carries out the effects in order. The same objects run on gRPC and in the simulated world.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.messages import Failure, Message

TICK_SECONDS = 0.2
"""How often a shell calls its role's ``on_tick``."""


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


@dataclass(frozen=True, slots=True)
class End:
    """End this process: it has run out of memory. ``sentence`` says where."""

    sentence: str


Effect = Send | Connect | Disconnect | End


def run_out(coordinator: str, job: str, sentence: str) -> list[Effect]:
    """What a role does when memory runs out at its work for ``job``: tell it, and end, so that another process takes over."""
    return [Send(coordinator, Failure(job=job, message=sentence, memory=True)), End(sentence)]
