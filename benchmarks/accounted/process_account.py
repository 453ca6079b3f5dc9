"""What one process has used, read from what it wrote down, and the samples that this was for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

Row = tuple[str, str]
"""Where (a kind of thread), and what."""

BACKWARD = ("backward", "loss backward", "gradient sums")
ONCE_AN_UPDATE = ("optimizer step", "hashes", "cut copies")
_PLACES = {"main": "event loop", "slot-": "slots"}
"""By how the name of a thread begins; others are "other threads"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """How many samples went forward and backward between two moments, and how many those updates hold that were made."""

    forward: float
    backward: float
    updated: float

    def through(self, part: str) -> float:
        """How many samples have passed through ``part``: at both moments something is under way."""
        if part in ONCE_AN_UPDATE:
            return self.updated
        return self.backward if part in BACKWARD else self.forward


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessAccount:
    """Seconds by place and part; calls by part."""

    seconds: Counter[Row]
    calls: Counter[str]

    def since(self, before: ProcessAccount) -> ProcessAccount:
        """What was added after ``before``."""
        seconds = Counter({key: value - before.seconds[key] for key, value in self.seconds.items()})
        return ProcessAccount(seconds=seconds, calls=self.calls - before.calls)


def read_account(path: Path) -> ProcessAccount:
    """Read what `accounts.snapshot` gave."""
    values = json.loads(path.read_text(encoding="utf-8"))
    seconds: Counter[Row] = Counter()
    calls: Counter[str] = Counter()
    for thread in values["threads"]:
        place = next((kind for name, kind in _PLACES.items() if thread["name"].startswith(name)), "other threads")
        for part, value in thread["parts"].items():
            seconds[place, part] += value
        seconds[place, "rest"] += thread["seconds"] - sum(thread["parts"].values())
        calls.update(thread["calls"])
    python = sum(thread["seconds"] for thread in values["threads"])
    seconds["other threads", "gRPC, torch"] += values["process"] - python
    return ProcessAccount(seconds=seconds, calls=calls)
