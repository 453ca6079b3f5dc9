"""A microbatch that was given up, as ledger, cut, job document and audit tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.ids import Microbatch

MOST_REASON = 300
"""Characters of a reason that are kept: a user's own code may say anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedMicrobatch:
    """A microbatch whose gradient is missing, and why.

    ``missing_from`` is the lowest layer that dropped it, where others have applied it (``None``: all layers dropped it).
    """

    microbatch: Microbatch
    reason: str
    missing_from: int | None = None

    def __str__(self) -> str:
        where = "" if self.missing_from is None else f" (layer {self.missing_from} dropped it, others applied it)"
        return f"samples {self.microbatch} are dropped: {self.reason}{where}"

    def to_json(self) -> dict[str, object]:
        """Plain values, for the job document and the manifest of a cut."""
        return {
            "epoch": self.microbatch.epoch,
            "start": self.microbatch.start,
            "stop": self.microbatch.stop,
            "reason": self.reason[:MOST_REASON],
            "missing_from": self.missing_from,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DroppedMicrobatch:
        """The inverse of `to_json`."""
        return cls(
            microbatch=Microbatch(value["epoch"], value["start"], value["stop"]),
            reason=value["reason"],
            missing_from=value["missing_from"],
        )
