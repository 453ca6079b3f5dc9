"""What one reading of a block's log finds out before the replay: from where a life begins, and what it will need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.applied import AppliedSet
from layerwise.event_records import record_from_json
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    RestoreEvent,
    UpdateEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.ids import Attempt
from layerwise.log_header import LogHeader
from layerwise.log_reader import LogReader

Owners = Mapping[int, tuple[int, ...]]
"""For each layer the lower ones that own parameters of its."""

_REMEMBERED_WINDOWS = 8


@dataclass(slots=True, kw_only=True, eq=False)
class LifeIndex:
    """One block in one life.

    ``past_reads`` counts passes that read a version of a layer after the layer has left it. ``walks`` has the attempts
    with more than one `WalkEvent`, and how many. ``quiet_cuts`` are the (layer, version) of cuts at which no ticket
    was open; ``last`` the version at which each layer ends. ``trimmed``: the first part of the log was removed.
    """

    folder: Path
    header: LogHeader
    trimmed: bool = False
    restored: dict[int, RestoreEvent] = field(default_factory=dict)
    past_reads: dict[tuple[int, int], int] = field(default_factory=dict)
    walks: dict[Attempt, int] = field(default_factory=dict)
    quiet_cuts: set[tuple[int, int]] = field(default_factory=set)
    last: dict[int, int] = field(default_factory=dict)
    num_records: int = 0
    num_updates: int = 0

    @property
    def complete(self) -> bool:
        """Whether every layer of the block has begun; else this life has done nothing."""
        return len(self.restored) == self.header.stop - self.header.start

    @property
    def version(self) -> int:
        """The version at which the life begins."""
        return self.restored[self.header.start].version

    def __str__(self) -> str:
        return f"life {self.header.life} of block {self.header.start}-{self.header.stop}"


def index_life(folder: Path, owners: Owners) -> LifeIndex:
    """Read a log once.

    Raises:
        NotFoundError: nothing was written.
        CorruptError: the log can't be read.
    """
    reader = LogReader(folder)
    found = LifeIndex(folder=folder, header=reader.header)
    open_tickets = dict.fromkeys(range(reader.header.start, reader.header.stop), 0)
    found.last = dict.fromkeys(open_tickets, 0)
    taken = dict.fromkeys(open_tickets, 0)
    plan = reader.header.plan
    walks = _Walks(reader.header.window)
    for layer, state in reader.summary.layers.items() if reader.summary is not None else ():
        found.trimmed = True
        found.last[layer] = int(state["version"])
        taken[layer] = len(AppliedSet.from_json(state["applied"]))
        open_tickets[layer] = len(state["open"])
        restored = None if state["restored"] is None else record_from_json(state["restored"]).event
        if isinstance(restored, RestoreEvent):
            found.restored[layer] = restored
    for record in reader.records:
        event = record.event
        found.num_records += 1
        for key in reads_of(event, owners, detached=walks.detached(event)):
            if key[1] < found.last.get(key[0], 0):
                found.past_reads[key] = found.past_reads.get(key, 0) + 1
        match event:
            case RestoreEvent(layer=layer):
                found.restored[layer] = event
                found.last[layer] = event.version
                taken[layer] = len(event.applied)
            case UpdateEvent(layer=layer):
                found.last[layer] = event.version
                found.num_updates += 1
            case ForwardEvent(layer=layer):
                open_tickets[layer] += 1
            case AbortEvent(layer=layer):
                open_tickets[layer] -= 1
            case AccumulateEvent(layer=layer) | DropEvent(layer=layer):
                open_tickets[layer] -= event.number is not None
                # The update is made with its last gradient; records of other layers may stand between the two.
                taken[layer] += 1
                found.last[layer] += taken[layer] == plan.gradients_before(found.last[layer] + 1)
            case CutEvent(layer=layer):
                if open_tickets[layer] == 0:
                    found.quiet_cuts.add((layer, event.version))
            case WalkEvent():
                count = walks.take(event)
                if count > 1:
                    found.walks[event.attempt] = count
    return found


def reads_of(event: Event, owners: Owners, *, detached: bool = False) -> Iterator[tuple[int, int]]:
    """The (layer, version) whose weights the backward pass (or recomputation) of ``event`` read.

    ``detached``: the gradient of an `AccumulateEvent` came from a worker, which has read what its `WalkEvent` says.
    """
    match event:
        case AccumulateEvent() | BackwardEvent():
            if not detached and event.mode is not WeightMode.STASHED:
                yield event.layer, event.read
                yield from zip(owners.get(event.layer, ()), event.owners, strict=False)
        case WalkEvent():
            for index, versions in enumerate(event.reads, start=event.layer):
                yield index, versions[0]
                if not event.detached:  # a worker has one state of each layer; here an owner may be met at several
                    yield from zip(owners.get(index, ()), versions[1:], strict=False)
        case _:
            return


class _Walks:
    """The latest walk of each attempt that can still be open."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._latest: dict[Attempt, tuple[WalkEvent, int]] = {}

    def detached(self, event: Event) -> bool:
        """Whether ``event`` is of a gradient that a detached worker computed."""
        if not isinstance(event, AccumulateEvent):
            return False
        walk = self._latest.get(event.attempt)
        return walk is not None and walk[0].detached

    def take(self, event: WalkEvent) -> int:
        """A walk begins; gives how many there are of its attempt."""
        before = self._latest.pop(event.attempt, None)
        count = 1 if before is None else before[1] + 1
        self._latest[event.attempt] = event, count
        if len(self._latest) > _REMEMBERED_WINDOWS * self._window:
            del self._latest[next(iter(self._latest))]
        return count
