"""Replays what the log says of one layer in one life, and notes every contradiction.

It shares no code with `layerwise.layer_ledger`, whose work it checks, beyond the plan and the applied sets. After a
contradiction it goes on from what the record says, so that one wrong record is reported once and not by every record
after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite

from layerwise.applied import AppliedSet
from layerwise.audit_report import Findings
from layerwise.event_log import LogHeader
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    RestoreEvent,
    UpdateEvent,
    WeightMode,
)
from layerwise.ids import Attempt

LearningRate = Callable[[int, int], float]
"""``learning_rate(samples_before, staleness)`` is what an update must use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutState:
    """What a layer's state counted when it was copied."""

    samples: int
    digest: str
    applied: AppliedSet
    buffers: AppliedSet


@dataclass(slots=True)
class RateBook:
    """The learning rate of each (samples before, staleness) that any layer used, with the layer that used it first."""

    expected: LearningRate | None = None
    seen: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)

    def contradiction(self, event: UpdateEvent, rate: float) -> str | None:
        """Why ``event`` can't have used ``rate``."""
        key = (event.samples_before, event.staleness)
        first, layer = self.seen.setdefault(key, (rate, event.layer))
        where = f"layer {event.layer} made version {event.version} with learning rate {rate!r}"
        if not isfinite(rate) or rate < 0:
            return f"{where}, which is no learning rate"
        if self.expected is not None and rate != self.expected(*key):
            return f"{where}; after {key[0]} samples at staleness {key[1]} it must be {self.expected(*key)!r}"
        if rate != first:
            return f"{where}; layer {layer} used {first!r} after as many samples ({key[0]}) and staleness ({key[1]})"
        return None


class LayerAudit:
    """One layer in one life: feed it the layer's events in order, then call `finish`."""

    def __init__(self, layer: int, header: LogHeader, findings: Findings, rates: RateBook) -> None:
        self.layer = layer
        self.header = header
        self.restored: RestoreEvent | None = None
        self.version = 0
        self.applied = AppliedSet()
        self.open: dict[int, ForwardEvent] = {}
        self.cuts: dict[int, CutState] = {}
        self.staleness: dict[int, int] = {}
        self._plan = header.plan
        self._findings = findings
        self._rates = rates
        self._who = f"layer {layer} (life {header.life})"
        self._revision = 0
        self._samples = 0
        self._digest = ""
        self._buffers = AppliedSet()
        self._closed_age = 0
        self._left_open = 0
        self._ordered = header.position_order
        # Of the update that gathers now:
        self._members: list[int] = []
        self._gradients = 0
        self._gradient_samples = 0
        self._update_samples = 0
        self._largest = 0

    def take(self, event: Event) -> None:
        """The layer's next record."""
        if self.restored is None and not isinstance(event, RestoreEvent):
            self._findings.fail("lives", f"{self._who} begins with event {event.event!r}, not with its restore")
            self.restored = RestoreEvent(
                layer=self.layer,
                version=0,
                revision=0,
                samples=0,
                digest="",
                applied=AppliedSet(),
                buffers=AppliedSet(),
            )
        match event:
            case RestoreEvent():
                self._restore(event)
            case ForwardEvent():
                self._forward(event)
            case AccumulateEvent():
                self._accumulate(event)
            case UpdateEvent():
                self._update(event)
            case DropEvent():
                self._drop(event)
            case AbortEvent():
                self._abort(event)
            case CutEvent():
                self._cut(event)

    def finish(self) -> None:
        """The log of this life ends here."""
        open_age = sum(self.version - forward.read for forward in self.open.values())
        self._findings.count("staleness-identity")
        if self._closed_age + open_age != self._left_open:
            self._findings.fail(
                "staleness-identity",
                f"{self._who}: closed tickets were {self._closed_age} updates old in all and open ones are {open_age}, "
                f"but {self._left_open} tickets were left open over all updates",
            )

    def _restore(self, event: RestoreEvent) -> None:
        if self.restored is not None:
            self._findings.fail("lives", f"{self._who} is restored a second time, at version {event.version}")
            return
        self._findings.count("lives")
        self.restored = event
        self.version, self._revision = event.version, event.revision
        self._samples, self._digest = event.samples, event.digest
        self.applied, self._buffers = event.applied.copy(), event.buffers.copy()
        self._ordered = self._ordered and not self.applied.above
        if len(self.applied) != self._plan.gradients_before(event.version):
            self._findings.fail(
                "updates",
                f"{self._who} begins at version {event.version} with {len(self.applied)} microbatches, the plan says "
                f"{self._plan.gradients_before(event.version)}",
            )

    def _forward(self, event: ForwardEvent) -> None:
        self._findings.count("tickets")
        index = self._index(event.attempt)
        if index is None:
            return
        if event.read != self.version:
            self._fail_version(f"forward of {event.attempt} read version {event.read}")
        if index in self.applied:
            self._fail_ticket(event.attempt, "opens although the microbatch is applied or dropped already")
        if index in self.open:
            self._fail_ticket(event.attempt, f"opens while {self.open[index].attempt} is open")
        self._findings.count("buffers")
        if self._buffers.add(index) != event.buffers:
            what = "writes the buffers a second time" if event.buffers else "leaves the buffers unwritten"
            self._findings.fail("buffers", f"{self._who}: forward of {event.attempt} {what}")
        self.open[index] = event

    def _accumulate(self, event: AccumulateEvent) -> None:
        self._findings.count("tickets")
        index = self._index(event.attempt)
        if index is None:
            return
        self._close(index, event.attempt, event.number, event.base)
        if not event.base <= event.read <= self.version or (
            event.mode is WeightMode.STASHED and event.read != event.base
        ):
            self._fail_ticket(
                event.attempt,
                f"has a backward pass that read version {event.read} ({event.mode}), forward read {event.base}, "
                f"at version {self.version}",
            )
        staleness = event.update - event.base
        self._closed_age += staleness
        self.staleness[staleness] = self.staleness.get(staleness, 0) + 1
        self._findings.count("staleness-bound")
        if staleness > self.header.max_staleness:
            self._findings.fail(
                "staleness-bound",
                f"{self._who}: {event.attempt} is {staleness} updates old, {self.header.max_staleness} were promised",
            )
        if self._fill(index, event.attempt, event.update, dropped=False):
            self._gradients += 1
            self._gradient_samples += event.attempt.microbatch.num_samples
            self._largest = max(self._largest, staleness)

    def _drop(self, event: DropEvent) -> None:
        self._findings.count("tickets")
        index = self._index(event.attempt)
        if index is None:
            return
        if event.number is not None and event.base is not None:
            self._close(index, event.attempt, event.number, event.base)
            self._closed_age += event.update - event.base
        elif index in self.open:
            self._fail_ticket(event.attempt, f"is dropped and {self.open.pop(index).attempt} stays open")
        self._fill(index, event.attempt, event.update, dropped=True)

    def _abort(self, event: AbortEvent) -> None:
        self._findings.count("tickets")
        index = self._index(event.attempt)
        if index is None:
            return
        if event.version != self.version:
            self._fail_version(f"{event.attempt} is aborted at version {event.version}")
        self._close(index, event.attempt, event.number, event.base)
        self._closed_age += event.version - event.base

    def _update(self, event: UpdateEvent) -> None:
        findings, version = self._findings, self.version
        for name in ("versions", "updates", "learning-rates"):
            findings.count(name)
        if event.version != version + 1:
            self._fail_version(f"the next update writes version {event.version}")
        if event.revision != self._revision + 1:
            findings.fail(
                "versions",
                f"{self._who}: revision {event.revision} of version {event.version} follows {self._revision}",
            )
        said = (len(self._members), event.gradients, event.samples, event.samples_before)
        counted = (self._plan.count(version), self._gradients, self._gradient_samples, self._samples)
        if said != counted:
            findings.fail(
                "updates",
                f"{self._who}: the update to version {event.version} closes after {said[0]} of {counted[0]} "
                f"microbatches; it says {said[1]} gradients of {said[2]} samples after {said[3]} samples, counted are "
                f"{counted[1]} of {counted[2]} after {counted[3]}",
            )
        if event.staleness != self._largest:
            findings.fail(
                "staleness-bound",
                f"{self._who}: the update to version {event.version} says staleness {event.staleness}, its gradients' "
                f"largest is {self._largest}",
            )
        if event.open_tickets != len(self.open):
            findings.fail(
                "staleness-identity",
                f"{self._who}: the update to version {event.version} says that it left {event.open_tickets} tickets "
                f"open, {len(self.open)} were",
            )
        self._check_rate(event)
        self._check_order(event)
        self.version, self._revision, self._digest = event.version, event.revision, event.digest
        self._samples += self._update_samples
        self._left_open += event.open_tickets
        self._clear()

    def _cut(self, event: CutEvent) -> None:
        if event.version != self.version:
            self._fail_version(f"a cut is taken of version {event.version}")
        if event.digest != self._digest:
            self._findings.fail(
                "lives", f"{self._who}: the cut of version {event.version} has another hash than that version"
            )
        if self._members:
            self._findings.fail("updates", f"{self._who}: a cut is taken while {len(self._members)} gradients wait")
        self.cuts[event.version] = CutState(
            samples=self._samples, digest=event.digest, applied=self.applied.copy(), buffers=self._buffers.copy()
        )

    def _check_rate(self, event: UpdateEvent) -> None:
        if event.learning_rate is None:
            return
        if event.gradients == 0:
            sentence: str | None = f"{self._who} made a step without gradients, to version {event.version}"
        else:
            sentence = self._rates.contradiction(event, event.learning_rate)
        if sentence:
            self._findings.fail("learning-rates", sentence)

    def _check_order(self, event: UpdateEvent) -> None:
        if not self._ordered:
            return
        self._findings.count("position-order")
        first, stop = self._plan.gradients_before(self.version), self._plan.gradients_before(self.version + 1)
        if sorted(self._members) != list(range(first, stop)):
            self._findings.fail(
                "position-order",
                f"{self._who}: the update to version {event.version} is made of microbatches {sorted(self._members)}, "
                f"the plan says {first} to {stop - 1}",
            )

    def _fill(self, index: int, attempt: Attempt, update: int, *, dropped: bool) -> bool:
        self._findings.count("exactly-once")
        if update != self.version:
            self._fail_version(f"{attempt} is taken into update {update}")
        if not self.applied.add(index, dropped=dropped):
            self._findings.fail("exactly-once", f"{self._who} takes {attempt.microbatch} in again, as {attempt}")
            return False
        self._members.append(index)
        self._update_samples += attempt.microbatch.num_samples
        return True

    def _close(self, index: int, attempt: Attempt, number: int, base: int) -> None:
        forward = self.open.pop(index, None)
        if forward is None:
            self._fail_ticket(attempt, "has no open forward pass")
        elif (forward.attempt, forward.number, forward.read) != (attempt, number, base):
            self._fail_ticket(
                attempt,
                f"closes as number {number} with base version {base}; open is {forward.attempt}, number "
                f"{forward.number}, base version {forward.read}",
            )

    def _index(self, attempt: Attempt) -> int | None:
        try:
            return self._plan.index(attempt.microbatch)
        except ValueError as error:
            self._findings.fail("exactly-once", f"{self._who}: {error}")
            return None

    def _clear(self) -> None:
        self._members = []
        self._gradients = 0
        self._gradient_samples = 0
        self._update_samples = 0
        self._largest = 0

    def _fail_version(self, what: str) -> None:
        self._findings.fail("versions", f"{self._who} is at version {self.version}: {what}")

    def _fail_ticket(self, attempt: Attempt, what: str) -> None:
        self._findings.fail("tickets", f"{self._who}: {attempt} {what}")
