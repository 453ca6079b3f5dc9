"""Faults of frames: what a bad network would do to them, done on purpose in real processes.

gRPC never repeats, reorders or loses a frame, so what lies above has to be shown such things by somebody. Which frames
are hit is planned before the processes start and reaches them in one environment variable, read once when a process
makes its transport. Nothing that comes over a network can change it, and without the variable no code of this module
runs.

Frames are addressed on the side that receives them: the ``frame``-th one, from 1, that ``receiver`` gets from peers
whose name begins with ``sender``, over all links and streams since the process began. Only frames that carry something
of a job count: how many heartbeats come before says more about the clock than about the run.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from layerwise.errors import ConfigError

VARIABLE = "LAYERWISE_FRAME_FAULTS"
"""Holds what `frame_fault_variable` wrote."""

FRAMES_BETWEEN = 4
"""Between two frames that are to suffer the same fault, when it could not be done to the first."""

log = logging.getLogger(__name__)


class FrameFaultKind(StrEnum):
    """What happens to the frame.

    ``delay``: it, and all behind it, come ``seconds`` late. ``duplicate``: it comes again, behind the next one.
    ``reorder``: the next one overtakes it. ``drop``: the stream breaks and takes the frame with it. (Only so does a
    connection that is made of TCP lose anything; the link then sends again what was not acknowledged.)
    """

    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFault:
    """One fault of one frame; see this module's docstring for its address."""

    kind: FrameFaultKind
    receiver: str
    frame: int
    sender: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.frame < 1 or self.seconds < 0 or not self.receiver:
            raise ValueError(f"no such fault of a frame: {self!r}")

    def __str__(self) -> str:
        what = f"{self.kind} frame {self.frame} of {self.receiver} from {self.sender or 'anybody'}"
        return f"{what} by {self.seconds * 1e3:.0f} ms" if self.seconds else what

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FrameFault:
        """The inverse of `to_json`; ``ValueError`` or ``TypeError`` for anything else."""
        return cls(**{**value, "kind": FrameFaultKind(value.get("kind", ""))})


def frame_fault_variable(faults: Iterable[FrameFault], fired: str | Path) -> dict[str, str]:
    """The environment variable that plans ``faults``; each that has happened is appended to the file ``fired``."""
    value = {"faults": [fault.to_json() for fault in faults], "fired": str(fired)}
    return {VARIABLE: json.dumps(value, separators=(",", ":"))}


def frame_faults_of(receiver: str, environment: Mapping[str, str] | None = None) -> FrameFaults | None:
    """What is planned for process ``receiver``; ``None``: nothing, which is so wherever the variable is not set.

    Raises:
        ConfigError: the variable can't be read.
    """
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    if not text:
        return None
    try:
        value = json.loads(text)
        planned = [FrameFault.from_json(one) for one in value["faults"]]
        fired = Path(value["fired"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{VARIABLE}: no plan of frame faults can be read from it: {error}") from error
    mine = [fault for fault in planned if fault.receiver == receiver]
    return FrameFaults(mine, fired) if mine else None


class FrameFaults:
    """The faults that wait in one process. Event loop's thread only.

    A process that is started again does not repeat those that its predecessors had: the file knows them.
    """

    def __init__(self, faults: Iterable[FrameFault], fired: Path) -> None:
        had = {fault for fault, _ in fired_faults(fired)}
        self._waiting = [fault for fault in faults if fault not in had]
        self._from = {fault: fault.frame for fault in self._waiting}
        self._received: dict[str, int] = {fault.sender: 0 for fault in self._waiting}
        self._fired = fired

    def next_fault(self, sender: str) -> FrameFault | None:
        """A frame of ``sender`` has come: the fault that hits it, if one does."""
        for prefix in self._received:
            if sender.startswith(prefix):
                self._received[prefix] += 1
        for fault in self._waiting:
            if sender.startswith(fault.sender) and self._received[fault.sender] >= self._from[fault]:
                self._waiting.remove(fault)
                return fault
        return None

    def put_back(self, fault: FrameFault) -> None:
        """It could not be done to the frame that it was given for: a later one suffers it.

        Not one of the next few: who waits for an answer to the frame before sends one at a time.
        """
        self._from[fault] = self._received[fault.sender] + FRAMES_BETWEEN
        self._waiting.insert(0, fault)

    def record(self, fault: FrameFault, sender: str) -> None:
        """Write down that ``fault`` hit a frame of ``sender``."""
        line = json.dumps({"time": time.time(), "sender": sender, "fault": fault.to_json()}, separators=(",", ":"))
        with self._fired.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        log.warning("planned fault: %s of frame %d from %s", fault.kind, fault.frame, sender)


def fired_faults(path: str | Path) -> list[tuple[FrameFault, float]]:
    """The faults that have happened by now, in order, and when in unix seconds."""
    file = Path(path)
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            value = json.loads(line)
            found.append((FrameFault.from_json(value["fault"]), float(value["time"])))
    return found
