"""The first line of each of an event log's segments: who writes it, and under which promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

from layerwise.machine import Machine
from layerwise.plan import TrainingPlan

FORMAT = "layerwise-events"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has no `Machine`, and no record of passes without a ticket: such a log can be audited as ever."""


def checked_line(text: str) -> bytes:
    """``text`` as a line of the log: behind its CRC-32."""
    data = text.encode()
    return b"%08x %b\n" % (crc32(data), data)


def text_of_line(line: bytes) -> bytes | None:
    """What a whole line says; ``None`` unless it fits its checksum."""
    text = line[9:-1]
    return text if line[8:9] == b" " and line[:8] == b"%08x" % crc32(text) else None


def name_of(job: str) -> str:
    """A job's name, without the number in its id: a coordinator that resumes a directory may give another one."""
    name, _, number = job.rpartition("-")
    return name if name and number.isdecimal() else job


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """Who writes this log, and what it promises.

    Block ``[start, stop)`` of the ``num_layers`` layers of ``job`` in ``life``, trained under ``plan`` with
    ``window`` microbatches open. ``max_staleness`` is the promise in updates. ``position_order``: gradients are
    summed in position order. ``hash_algorithm`` names that of the updates' digests. ``layer_names`` belong to the
    block's layers. ``machine`` says where it was computed (``None`` in logs of format version 1). What a rollback has
    changed: learning rates are ``rate_factor`` times those of the schedule; up to version ``synchronous_until`` no gradient
    is stale; ``moments_forgotten``: the optimizers began anew at the restore.
    """

    job: str
    num_layers: int
    start: int
    stop: int
    life: int
    hash_algorithm: str
    plan: TrainingPlan
    window: int
    max_staleness: int
    position_order: bool
    backward_weights: str
    layer_names: tuple[str, ...]
    machine: Machine | None = None
    rate_factor: float = 1.0
    synchronous_until: int = 0
    moments_forgotten: bool = False

    def __post_init__(self) -> None:
        names_fit = len(self.layer_names) == self.stop - self.start
        if not 0 <= self.start < self.stop <= self.num_layers or not names_fit or self.life < 0:
            raise ValueError(
                f"not a block's log: layers [{self.start}, {self.stop}), life {self.life}, names {self.layer_names}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in the first line of a segment."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "job": self.job,
            "num_layers": self.num_layers,
            "block": [self.start, self.stop],
            "life": self.life,
            "hash_algorithm": self.hash_algorithm,
            "num_samples": self.plan.num_samples,
            "batch": self.plan.batch,
            "accumulation": self.plan.accumulation,
            "num_updates": self.plan.num_updates,
            "window": self.window,
            "max_staleness": self.max_staleness,
            "position_order": self.position_order,
            "backward_weights": self.backward_weights,
            "layer_names": list(self.layer_names),
            "machine": None if self.machine is None else self.machine.to_json(),
            "rate_factor": self.rate_factor,
            "synchronous_until": self.synchronous_until,
            "moments_forgotten": self.moments_forgotten,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LogHeader:
        """The inverse of `to_json`.

        ``ValueError``, ``KeyError`` or ``TypeError`` when it is not such a header, or of another format version.
        """
        if value.get("format") != FORMAT or value.get("format_version") not in READABLE_VERSIONS:
            raise ValueError(
                f"format {value.get('format')!r} version {value.get('format_version')!r}, "
                f"this reads {FORMAT!r} {' and '.join(map(str, READABLE_VERSIONS))}"
            )
        machine = value.get("machine")
        numbers = {name: value[name] for name in ("num_samples", "batch", "accumulation", "num_updates")}
        others = [*value["block"], *(value[name] for name in ("num_layers", "life", "window", "max_staleness"))]
        if any(type(one) is not int for one in (*numbers.values(), *others)):
            raise ValueError("a number of the header is none")
        start, stop = value["block"]
        return cls(
            job=str(value["job"]),
            num_layers=value["num_layers"],
            start=start,
            stop=stop,
            life=value["life"],
            hash_algorithm=str(value["hash_algorithm"]),
            plan=TrainingPlan(**numbers),
            window=value["window"],
            max_staleness=value["max_staleness"],
            position_order=bool(value["position_order"]),
            backward_weights=str(value["backward_weights"]),
            layer_names=tuple(str(name) for name in value["layer_names"]),
            machine=None if machine is None else Machine.from_json(machine),
            # What logs of before there were rollbacks do not have.
            rate_factor=float(value.get("rate_factor", 1.0)),
            synchronous_until=int(value.get("synchronous_until", 0)),
            moments_forgotten=bool(value.get("moments_forgotten", False)),
        )
