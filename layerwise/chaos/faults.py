"""What can be done to a running job, as values: processes killed or paused, disks that are full.

Places are named by what they do in the job, ``shard:1`` (whoever has block 1), ``forward:0`` (the first of those
who work for it), ``backward:0``, ``coordinator``, or ``all``; which process that is gets looked up when the fault is
due. Time is counted in updates: a fault is due when every layer has reached ``at_version`` for the first time, and then
waits ``after`` seconds, so that it falls into the middle of something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from layerwise.ids import COORDINATOR

EVERYBODY = "all"


class ProcessFaultKind(StrEnum):
    """``kill``: SIGKILL. ``pause``: SIGSTOP, and SIGCONT after ``seconds``."""

    KILL = "kill"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFault:
    """One fault of the process at ``target``."""

    kind: ProcessFaultKind
    target: str
    at_version: int
    after: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        role, _, index = self.target.partition(":")
        named = self.target in (EVERYBODY, COORDINATOR) or (
            role in ("shard", "forward", "backward") and index.isdigit()
        )
        pauses = self.kind is ProcessFaultKind.PAUSE
        if not named or self.at_version < 0 or self.after < 0 or (self.seconds > 0) != pauses:
            raise ValueError(f"no such fault of a process: {self!r}")

    def __str__(self) -> str:
        what = f"pause {self.target} for {self.seconds:.1f} s" if self.seconds else f"kill {self.target}"
        return f"{what} at version {self.at_version}" + (f" + {self.after * 1e3:.0f} ms" if self.after else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def process_named(target: str, document: Mapping[str, Any]) -> str | None:
    """The process at a place of the job with this ``document``; ``None``: nobody is there now."""
    role, _, index = target.partition(":")
    if role == COORDINATOR:
        return COORDINATOR
    names, place = _names(role, document), int(index)
    return names[place] if place < len(names) else None


def works_for(name: str, document: Mapping[str, Any]) -> bool:
    """Whether the process has a place in the job with this ``document``."""
    return any(name in _names(role, document) for role in ("shard", "forward", "backward"))


def _names(role: str, document: Mapping[str, Any]) -> list[str]:
    if role == "shard":
        return [str(block["shard"]) for block in document.get("blocks") or ()]
    return [str(name) for name in document.get(f"{role}_workers") or ()]
