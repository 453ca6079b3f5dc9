"""When a peer that says nothing is given up: it is asked first, and only while something is waited for.

A network that is cut tells nobody: no stream ends, what is sent is swallowed. So each link is looked at now and then::

    something has come since the last look, or a lot has left    fine
    nothing is waited for                                        fine: who has nothing to say is silent
    else                                                         asked once; after ``LOOKS`` such looks in a row given up

Looks are counted, not seconds. Who was stopped or held up itself finds what has come meanwhile at its next look, and must not
take its own pause for one of everybody else.
"""

from __future__ import annotations

import json
from enum import Enum

LOOKS = 8
"""So many looks in a row that find nothing make a peer lost; they are spread over the time limit."""
MOVING_BYTES = 256 << 10
"""What has to leave between two looks for the path to be thought open. A slow one takes a while to pass on what has gone before the
question; one that swallows everything takes no more than its buffers hold, a few megabytes."""


class Verdict(Enum):
    """What to do about a peer."""

    FINE = "fine"
    ASK = "ask"
    GIVE_UP = "give up"


class Silence:
    """How long one peer has been silent, on the stream that carries its link now. Not thread-safe."""

    def __init__(self) -> None:
        self._heard = True
        self._looks = 0

    def hear(self) -> None:
        """Something has come. Called for every frame."""
        self._heard = True

    def look(self, *, waiting: bool, sent_bytes: int = 0) -> Verdict:
        """Look once: is something of the peer waited for, and how much has left for it since the last look?"""
        if self._heard or not waiting or sent_bytes >= MOVING_BYTES:
            self._heard, self._looks = False, 0
            return Verdict.FINE
        self._looks += 1
        if self._looks > LOOKS:
            self._looks = 0
            return Verdict.GIVE_UP
        return Verdict.ASK if self._looks == 1 else Verdict.FINE


def patience(spec_json: str) -> float:
    """Seconds that the processes of a job may be silent: a third more than one that is stopped keeps its place (0: it does not say)."""
    try:
        return 4 / 3 * float(json.loads(spec_json)["timeouts"]["heartbeat"])
    except (ValueError, KeyError, TypeError):
        return 0.0  # whoever takes the job on says what is wrong with it
