"""What a replay has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerwise.replay.divergence import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedLayer:
    """Where a layer stands at the end of a replay; ``digest`` is the hash of its state after its last update."""

    layer: int
    name: str
    life: int
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """``passed``: all records of all lives were reached, or those up to where the replay was told to stop.

    ``start`` is the version that it began at, ``updates`` the number of updates whose hashes were compared, ``cuts``
    the versions whose files were compared bit for bit. ``left_out`` names what a later life made void and could not be
    executed, ``notes`` what differs between the machines. ``unfinished`` says why a log could not be executed to its
    end.
    """

    job: str
    directory: str
    start: int
    stopped_at: str
    lives: int
    records: int
    updates: int
    cuts: tuple[int, ...]
    layers: tuple[ReplayedLayer, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    unfinished: str
    divergence: Divergence | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the replay reached what was recorded."""
        return self.divergence is None and not self.unfinished

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--output json``."""
        return {
            "job": self.job,
            "directory": self.directory,
            "passed": self.passed,
            "start": self.start,
            "stopped_at": self.stopped_at or None,
            "lives": self.lives,
            "records": self.records,
            "updates": self.updates,
            "cuts": list(self.cuts),
            "layers": [
                {"layer": one.layer, "name": one.name, "life": one.life, "version": one.version, "digest": one.digest}
                for one in self.layers
            ],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "unfinished": self.unfinished or None,
            "divergence": None if self.divergence is None else self.divergence.to_json(),
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        reached = ", ".join(sorted({str(one.version) for one in self.layers}, key=int))
        lines = [
            f"{self.job}: {self.updates} updates and {self.records} records of {self.lives} lives executed again, "
            f"from version {self.start} to {reached}"
        ]
        if self.cuts:
            lines.append(f"equal bit for bit to the saved cuts {', '.join(map(str, self.cuts))}")
        lines += [f"note: {one}" for one in (*self.notes, *self.left_out)]
        if self.divergence is not None:
            lines.append(f"DIVERGED  {self.divergence}")
        elif self.unfinished:
            lines.append(f"UNFINISHED  {self.unfinished}")
        else:
            where = f", stopped at {self.stopped_at}" if self.stopped_at else ""
            lines.append(f"every hash is the recorded one{where}")
        return lines
