"""Replays what the log says of one layer in one life, and notes every contradiction.

It shares no code with `layerwise.layer_ledger`, whose work it checks, beyond the plan and the applied sets. After a
contradiction it goes on from what the record says, so that one wrong record is reported once and not by every record
after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isclose, isfinite
from statistics import median_low

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

LearningRate = Callable[[int, int, int], float]
"""``learning_rate(layer, samples_before, staleness)`` is what an update must use."""

_SAME_RATIO = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class CutState:
    """What a layer's state counted when it was copied."""

    samples: int
    digest: str
    applied: AppliedSet
    buffers: AppliedSet


@dataclass(slots=True)
class RateBook:
    """The learning rate of each (samples before, staleness) on each layer, over all lives.

    Layers may have base rates of their own, as when an optimizer treats matrices and vectors differently; what the
    schedule and the delay policy make of them must be the same on every layer.
    """

    findings: Findings
    expected: LearningRate | None = None
    rates: dict[int, dict[tuple[int, int], float]] = field(default_factory=dict)

    def take(self, event: UpdateEvent, used: float, factor: float) -> None:
        """``event``'s step ``used`` a rate that is ``factor`` (a power of a half) times what the schedule says."""
        layer, key = event.layer, (event.samples_before, event.staleness)
        where = f"layer {layer} made version {event.version} with learning rate {used!r}"
        where += "" if factor == 1.0 else f" in a life with {factor!r} of it"
        rate = used / factor
        known = self.rates.setdefault(layer, {}).setdefault(key, rate)
        if not isfinite(rate) or rate < 0:
            self.findings.fail("learning-rates", f"{where}, which is no learning rate")
        elif event.gradients == 0:
            self.findings.fail("learning-rates", f"{where}, but there was no gradient to step with")
        elif self.expected is not None and rate != self.expected(layer, *key):
            self.findings.fail("learning-rates", f"{where}; {_after(key)} it must be {self.expected(layer, *key)!r}")
        elif rate != known:
            self.findings.fail("learning-rates", f"{where}; {_after(key)} an earlier life used {known!r}")

    def finish(self) -> None:
        """Compare the layers with each other."""
        layers = sorted(self.rates)
        for layer in layers[1:]:
            first, mine = self.rates[layers[0]], self.rates[layer]
            shared = sorted(first.keys() & mine.keys())
            ratios = [mine[key] / first[key] for key in shared if first[key] > 0]
            usual = median_low(ratios) if ratios else 1.0
            for key in shared:
                if not isclose(mine[key], usual * first[key], rel_tol=_SAME_RATIO):
                    self.findings.fail(
                        "learning-rates",
                        f"layer {layer} used learning rate {mine[key]!r} {_after(key)}; as layer {layers[0]} used "
                        f"{first[key]!r}, it must be {usual * first[key]!r}",
                    )


def _after(key: tuple[int, int]) -> str:
    return f"after {key[0]} samples at staleness {key[1]}"


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
        self.reasons: dict[int, str] = {}
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
        if event.update < self.header.synchronous_until:
            self._findings.count("rollbacks")
            if staleness:
                self._findings.fail(
                    "rollbacks",
                    f"{self._who}: {event.attempt} is {staleness} updates old in update {event.update}, and none was to "
                    f"be before version {self.header.synchronous_until}",
                )
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
        self.reasons[index] = event.reason
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
        if event.learning_rate is not None:
            self._rates.take(event, event.learning_rate, self.header.rate_factor)
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
