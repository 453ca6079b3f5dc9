"""Replays what the log says of one layer in one life, and notes every contradiction.

It shares no code with `layerwise.layer_ledger`, whose work it checks, beyond the plan and the applied sets. After a
contradiction it goes on from what the record says, so that one wrong record is reported once and not by every record
after it.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.applied import AppliedSet
from layerwise.audit_report import Findings
from layerwise.event_records import record_from_json
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    PassEvent,
    RestoreEvent,
    UpdateEvent,
    WeightMode,
)
from layerwise.ids import Attempt
from layerwise.log_header import LogHeader
from layerwise.rate_book import RateBook


@dataclass(frozen=True, slots=True, kw_only=True)
class CutState:
    """What a layer's state counted when it was copied."""

    samples: int
    digest: str
    applied: AppliedSet
    buffers: AppliedSet

    def to_json(self) -> dict[str, Any]:
        """Plain values for a summary."""
        sets = {"applied": self.applied.to_json(), "buffers": self.buffers.to_json()}
        return {"samples": self.samples, "digest": self.digest, **sets}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CutState:
        """The inverse of `to_json`."""
        return cls(
            samples=int(value["samples"]),
            digest=str(value["digest"]),
            applied=AppliedSet.from_json(value["applied"]),
            buffers=AppliedSet.from_json(value["buffers"]),
        )


class LayerAudit:
    """One layer in one life: feed it the layer's events in order, then call `finish`."""

    def __init__(
        self,
        layer: int,
        header: LogHeader,
        findings: Findings,
        rates: RateBook,
        *,
        wanted: Container[int] | None = None,
    ) -> None:
        """``wanted``: only cuts of these versions are remembered; by default all of them."""
        self._wanted = wanted
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
            case PassEvent():
                self._pass(event)
            case BackwardEvent():
                self.read(event.attempt, event.read, at_most=True)

    def summary(self) -> dict[str, Any]:
        """All that later records are checked against, as plain values: what stands for the records so far."""
        return {
            "restored": None if self.restored is None else json.loads(self.restored.to_json(0)),
            "version": self.version,
            "revision": self._revision,
            "samples": self._samples,
            "digest": self._digest,
            "applied": self.applied.to_json(),
            "buffers": self._buffers.to_json(),
            "open": [json.loads(forward.to_json(0)) for forward in self.open.values()],
            "cuts": {str(version): cut.to_json() for version, cut in self.cuts.items()},
            "staleness": {str(updates): count for updates, count in self.staleness.items()},
            "closed_age": self._closed_age,
            "left_open": self._left_open,
            "ordered": self._ordered,
            "members": list(self._members),
            "gradients": self._gradients,
            "gradient_samples": self._gradient_samples,
            "update_samples": self._update_samples,
            "largest": self._largest,
        }

    def go_on(self, summary: Mapping[str, Any]) -> None:
        """Begin where `summary` was taken; ``ValueError``, ``KeyError`` or ``TypeError`` when it is none."""
        restored = None if summary["restored"] is None else record_from_json(summary["restored"]).event
        if restored is not None and not isinstance(restored, RestoreEvent):
            raise ValueError(f"layer {self.layer} begins with event {restored.event!r}")
        self.restored = restored
        self.version, self._revision = int(summary["version"]), int(summary["revision"])
        self._samples, self._digest = int(summary["samples"]), str(summary["digest"])
        self.applied = AppliedSet.from_json(summary["applied"])
        self._buffers = AppliedSet.from_json(summary["buffers"])
        for value in summary["open"]:
            forward = record_from_json(value).event
            if not isinstance(forward, ForwardEvent):
                raise ValueError(f"layer {self.layer} has an open {forward.event!r}")
            self.open[self._plan.index(forward.attempt.microbatch)] = forward
        self.cuts = {int(version): CutState.from_json(value) for version, value in summary["cuts"].items()}
        self.staleness = {int(updates): int(count) for updates, count in summary["staleness"].items()}
        self._closed_age, self._left_open = int(summary["closed_age"]), int(summary["left_open"])
        self._ordered = bool(summary["ordered"])
        self._members = [int(index) for index in summary["members"]]
        self._gradients, self._gradient_samples = int(summary["gradients"]), int(summary["gradient_samples"])
        self._update_samples, self._largest = int(summary["update_samples"]), int(summary["largest"])

    def read(self, attempt: Attempt, version: int, *, at_most: bool) -> None:
        """A pass of ``attempt`` read ``version``: the one that the layer is at, or with ``at_most`` an earlier one."""
        if version > self.version or (version < self.version and not at_most):
            self._fail_version(f"a pass of {attempt} reads version {version}")

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

    def _pass(self, event: PassEvent) -> None:
        self._findings.count("tickets")
        self.read(event.attempt, event.read, at_most=False)
        index = self._index(event.attempt)
        if index is not None and index not in self.applied:
            self._fail_ticket(event.attempt, "passes without a ticket, though the layer lacks the microbatch")

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
        if self._wanted is None or event.version in self._wanted:
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
