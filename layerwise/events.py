"""What happens to a layer, one record each: the vocabulary of the event log, and its JSON form.

    restore ─► forward ─► accumulate ─► ... ─► update ─► (cut) ─► forward ...
                     ├──► drop      the microbatch is given up: a tombstone fills its place in the update
                     └──► abort     the attempt is given up: the microbatch may come again
               pass ─► backward     the layer has the microbatch already: it only hands on outputs and a gradient
               walk                 a backward pass through the whole block begins by computing it anew

Each event says which versions were read and written. Together with the seed they fix every bit that was computed: see
`layerwise.replay`. The sink numbers the records of one block and life 0, 1, 2, ...
without gaps. The JSON form is frozen (``FORMAT_VERSION``): other programs read these files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, NamedTuple, Protocol

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt


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


def _owners(versions: tuple[int, ...]) -> str:
    return f',"owners":[{",".join(map(str, versions))}]' if versions else ""


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
    """A gradient joins update ``update``: its forward pass read version ``base``, its backward pass ``read``.

    ``owners`` are the versions that the backward pass read of the lower layers whose parameters this layer shares.
    """

    event: ClassVar[str] = "accumulate"
    layer: int
    attempt: Attempt
    number: int
    base: int
    read: int
    mode: WeightMode
    update: int
    owners: tuple[int, ...] = ()

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"accumulate","layer":{self.layer},{_subject(self.attempt)},'
            f'"number":{self.number},"base":{self.base},"read":{self.read},"mode":"{self.mode}","update":{self.update}'
            f"{_owners(self.owners)}}}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEvent:
    """A forward pass of a layer that has the microbatch already: it read version ``read``, and changed nothing."""

    event: ClassVar[str] = "pass"
    layer: int
    attempt: Attempt
    number: int
    read: int

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"pass","layer":{self.layer},{_subject(self.attempt)},'
            f'"number":{self.number},"read":{self.read}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardEvent:
    """A backward pass read version ``read`` of a layer that has the microbatch already: only what it hands down counts.

    ``owners`` as in `AccumulateEvent`.
    """

    event: ClassVar[str] = "backward"
    layer: int
    attempt: Attempt
    number: int
    read: int
    mode: WeightMode
    owners: tuple[int, ...] = ()

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        return (
            f'{{"sequence":{sequence},"event":"backward","layer":{self.layer},{_subject(self.attempt)},'
            f'"number":{self.number},"read":{self.read},"mode":"{self.mode}"{_owners(self.owners)}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkEvent:
    """A backward pass through the block whose first layer is ``layer`` has computed the block's forward pass again.

    ``reads`` has what that read of each of the block's layers: its version, then those of the layers that own
    parameters of its. ``detached``: they are what a worker was given, so its backward pass reads the same; if the
    worker is lost, another walk of the attempt follows.
    """

    event: ClassVar[str] = "walk"
    layer: int
    attempt: Attempt
    number: int
    detached: bool
    reads: tuple[tuple[int, ...], ...]

    def to_json(self, sequence: int) -> str:
        """The record as compact JSON."""
        reads = ",".join(f"[{','.join(map(str, one))}]" for one in self.reads)
        return (
            f'{{"sequence":{sequence},"event":"walk","layer":{self.layer},{_subject(self.attempt)},'
            f'"number":{self.number},"detached":{"true" if self.detached else "false"},"reads":[{reads}]}}'
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


Event = (
    RestoreEvent
    | ForwardEvent
    | AccumulateEvent
    | UpdateEvent
    | DropEvent
    | AbortEvent
    | CutEvent
    | PassEvent
    | BackwardEvent
    | WalkEvent
)


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
