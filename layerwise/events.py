"""What happens to a layer, one record each: the vocabulary of the event log, and its JSON form.

    restore ─► forward ─► accumulate ─► ... ─► update ─► (cut) ─► forward ...
                     ├──► drop      the microbatch is given up: a tombstone fills its place in the update
                     └──► abort     the attempt is given up: the microbatch may come again

Each event says which versions were read and written. The sink numbers the records of one block and life 0, 1, 2, ...
without gaps. The JSON form is frozen (``FORMAT_VERSION``): other programs read these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Protocol

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt, Microbatch


class WeightMode(StrEnum):
    """Which weights a backward pass used.

    ``latest``: those there now. ``stashed``: those of the forward pass. ``recompute``: those there now (or those that
    a detached worker pulled), with the forward pass done again.
    """

    LATEST = "latest"
    STASHED = "stashed"
    RECOMPUTE = "recompute"


def _subject(attempt: Attempt) -> str:
    microbatch = attempt.microbatch
    return f'"microbatch":[{microbatch.epoch},{microbatch.start},{microbatch.stop}],"attempt":{attempt.attempt}'


def _optional(value: int | None) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreEvent:
    """A life of the layer begins at ``version``, with what the cut (or the initial weights) held.

    ``digest`` is "" at version 0.
    """

    event: ClassVar[str] = "restore"
    layer: int
    version: int
    revision: int
    samples: int
    digest: str
    applied: AppliedSet
    buffers: AppliedSet

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return json.dumps(
            {
                "sequence": sequence,
                "event": "restore",
                "layer": self.layer,
                "version": self.version,
                "revision": self.revision,
                "samples": self.samples,
                "digest": self.digest,
                "applied": self.applied.to_json(),
                "buffers": self.buffers.to_json(),
            },
            separators=(",", ":"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardEvent:
    """A forward pass read version ``read`` and opened a ticket.

    ``buffers``: it is the one that writes this microbatch's buffers.
    """

    event: ClassVar[str] = "forward"
    layer: int
    attempt: Attempt
    number: int
    read: int
    buffers: bool

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"forward","layer":{self.layer},{_subject(self.attempt)},"number":{self.number},'
            f'"read":{self.read},"buffers":{"true" if self.buffers else "false"}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulateEvent:
    """A gradient joins update ``update``: its forward pass read version ``base``, its backward pass ``read``."""

    event: ClassVar[str] = "accumulate"
    layer: int
    attempt: Attempt
    number: int
    base: int
    read: int
    mode: WeightMode
    update: int

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"accumulate","layer":{self.layer},{_subject(self.attempt)},'
            f'"number":{self.number},"base":{self.base},"read":{self.read},"mode":"{self.mode}","update":{self.update}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEvent:
    """An update is made: version ``version - 1`` was read, ``version`` is written.

    ``gradients`` of them, over ``samples`` samples, are in it (0: tombstones only); ``samples_before`` is the layer's
    sample count that the schedule was asked with; ``staleness`` the largest of its gradients'; ``open_tickets`` those
    left open just after; ``learning_rate`` what the optimizer used (``None``: no step was made); ``digest`` the hash
    of the layer's state after it.
    """

    event: ClassVar[str] = "update"
    layer: int
    version: int
    revision: int
    gradients: int
    samples: int
    samples_before: int
    staleness: int
    open_tickets: int
    learning_rate: float | None
    digest: str

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        rate = "null" if self.learning_rate is None else repr(float(self.learning_rate))
        return (
            f'{{"sequence":{sequence},"event":"update","layer":{self.layer},"version":{self.version},"revision":{self.revision},'
            f'"gradients":{self.gradients},"samples":{self.samples},"samples_before":{self.samples_before},'
            f'"staleness":{self.staleness},"open_tickets":{self.open_tickets},"learning_rate":{rate},"digest":{json.dumps(self.digest)}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DropEvent:
    """A tombstone fills a place in update ``update``.

    ``number`` and ``base`` are those of the ticket it closed, if one was open.
    """

    event: ClassVar[str] = "drop"
    layer: int
    attempt: Attempt
    number: int | None
    base: int | None
    update: int
    reason: str

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"drop","layer":{self.layer},{_subject(self.attempt)},'
            f'"number":{_optional(self.number)},"base":{_optional(self.base)},"update":{self.update},"reason":{json.dumps(self.reason)}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortEvent:
    """An attempt's ticket is closed at version ``version`` without a gradient; its microbatch may come again."""

    event: ClassVar[str] = "abort"
    layer: int
    attempt: Attempt
    number: int
    base: int
    version: int

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"abort","layer":{self.layer},{_subject(self.attempt)},"number":{self.number},'
            f'"base":{self.base},"version":{self.version}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CutEvent:
    """The layer is copied as it is at ``version``: a later life may start here."""

    event: ClassVar[str] = "cut"
    layer: int
    version: int
    digest: str

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"cut","layer":{self.layer},"version":{self.version},'
            f'"digest":{json.dumps(self.digest)}}}'
        )


Event = RestoreEvent | ForwardEvent | AccumulateEvent | UpdateEvent | DropEvent | AbortEvent | CutEvent


class Record(NamedTuple):
    """One event and its place in the log of its block and life."""

    sequence: int
    event: Event


class EventSink(Protocol):
    """Where a layer's ledger writes down what happens. Called under the layer's lock; safe from several threads."""

    def append(self, event: Event) -> None:
        """Take ``event`` down as the next record."""
        ...


@dataclass(slots=True)
class MemoryEventLog:
    """An `EventSink` that keeps its records: for the simulated world and for tests. One thread at a time."""

    records: list[Record] = field(default_factory=list)

    def append(self, event: Event) -> None:
        """Keep ``event``."""
        self.records.append(Record(len(self.records), event))


_EVENTS: dict[str, type[Event]] = {
    kind.event: kind
    for kind in (RestoreEvent, ForwardEvent, AccumulateEvent, UpdateEvent, DropEvent, AbortEvent, CutEvent)
}
_KEYS: dict[str, frozenset[str]] = {
    name: frozenset(one.name for one in fields(kind))
    | {"sequence", "event"}
    | ({"microbatch"} if "attempt" in {one.name for one in fields(kind)} else set())
    for name, kind in _EVENTS.items()
}
_OTHER_TYPES: dict[str, tuple[type, ...]] = {
    "event": (str,),
    "digest": (str,),
    "reason": (str,),
    "mode": (str,),
    "buffers": (bool, dict),
    "applied": (dict,),
    "microbatch": (list,),
    "learning_rate": (float, int, type(None)),
}
_OPTIONAL_IN_DROP = {"number", "base"}


def record_from_json(value: Any) -> Record:
    """The inverse of ``to_json`` for parsed JSON; ``ValueError`` says what is wrong with it."""
    if not isinstance(value, Mapping) or not isinstance(value.get("event"), str):
        raise ValueError("not a record: an object with an event is expected")
    name: str = value["event"]
    kind = _EVENTS.get(name)
    if kind is None:
        raise ValueError(f"no event is called {name!r}")
    if value.keys() != _KEYS[name]:
        raise ValueError(
            f"a record of event {name!r} has other fields: {sorted(value.keys() ^ _KEYS[name])} are missing or too many"
        )
    for key, one in value.items():
        allowed = _OTHER_TYPES.get(key, (int,))
        if type(one) not in allowed and not (one is None and name == "drop" and key in _OPTIONAL_IN_DROP):
            raise ValueError(f"{key} of event {name!r} can't be {one!r}")
    arguments: dict[str, Any] = {
        key: one for key, one in value.items() if key not in ("sequence", "event", "microbatch")
    }
    if "microbatch" in value:
        arguments["attempt"] = Attempt(_microbatch(value["microbatch"]), value["attempt"])
    if kind is RestoreEvent:
        arguments["applied"] = AppliedSet.from_json(value["applied"])
        arguments["buffers"] = AppliedSet.from_json(value["buffers"])
    elif kind is AccumulateEvent:
        arguments["mode"] = WeightMode(value["mode"])
    return Record(value["sequence"], kind(**arguments))


def _microbatch(value: list[Any]) -> Microbatch:
    if len(value) != 3 or any(type(one) is not int for one in value):
        raise ValueError(f"not a microbatch: {value!r}")
    return Microbatch(*value)
