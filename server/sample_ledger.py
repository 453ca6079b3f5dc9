"""Which microbatches of a run are unleased, leased or closed: every one ends up applied or listed as dropped."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwise.applied import AppliedSet
from layerwise.dropped import DroppedMicrobatch
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Outcome
from layerwise.plan import TrainingPlan

MOST_DROPPED = 1000
"""Dropped microbatches that a summary lists, so that it can be sent. Their tombstones are in the layers, all of them."""

ALREADY_APPLIED, STILL_OPEN, STOPPING, OUT_OF_ORDER = "applied", "open", "stopping", "order"


@dataclass(slots=True)
class _Open:
    """The current attempt at one microbatch. ``holder`` is None once nobody holds it and only its close is awaited."""

    attempt: int
    holder: str | None
    since: float
    older_aborted: bool = False
    """An older attempt was reported aborted while this one was leased."""


@dataclass(slots=True)
class _Worker:
    """What one forward worker holds, also what is void because it was since closed or leased again."""

    held: set[tuple[int, int]] = field(default_factory=set)


class SampleLedger:
    """Leases the microbatches of a plan, lowest index first, until all of them (or those of a stop version) are closed.

    ::

        unleased ── lease ──► leased ── closed applied / dropped ──► closed
           ▲                    │  └── given back "open" / "applied" ──► ownerless ── closed ──► closed
           └─ aborted, lost, ───┴──────────────────────────────────────────┘ aborted
              expired, given back      (the next lease has attempt + 1)

    ``done`` holds what every layer has already (after a restore); ``partial`` what some layers have and others lack:
    those are leased before anything else, so that a stop can complete them on all layers. ``drops`` were given up before,
    and stay so whatever was restored: `reason_to_drop` says so of their next leases. ``missing_from`` says for indices in
    ``done`` that some layers dropped and others applied which is the lowest of the former. Not thread-safe.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        *,
        done: AppliedSet | None = None,
        partial: Iterable[int] = (),
        first_attempt: int = 1,
        drops: Iterable[DroppedMicrobatch] = (),
        missing_from: Mapping[int, int] | None = None,
    ) -> None:
        self.plan = plan
        self._first_attempt = first_attempt
        self._closed = done.copy() if done is not None else AppliedSet()
        self._first = {index for index in partial if index not in self._closed}
        self._open: dict[int, _Open] = {}
        self._workers: dict[str, _Worker] = {}
        self._attempts: dict[int, int] = {}
        self._returned: list[int] = []
        self._unneeded: list[
            int
        ] = []  # declined because the stop version needs no more; wanted again if one of those is lost
        self._early: list[
            int
        ] = []  # declined because an earlier one must come first; wanted again once something has closed
        self._cursor = self._closed.watermark
        self._target = plan.num_microbatches
        self._open_samples = 0
        self._closed_samples = self._samples_below(self._closed.watermark) + sum(
            plan.microbatch(index).num_samples for index in self._closed.above
        )
        self._dropped_samples = sum(plan.microbatch(index).num_samples for index in self._closed.dropped)
        self.drops: dict[int, DroppedMicrobatch] = {plan.index(one.microbatch): one for one in drops}
        """All that is given up, whether closed or not, by index."""
        self.num_decisions = 0
        """How many times ``drops`` was changed by what happened, or found in ``done``."""
        lowest = missing_from or {}
        for index in self._closed.dropped:
            known = self.drops.get(index)
            reason = known.reason if known is not None else "dropped before the restore"
            self.drops[index] = DroppedMicrobatch(
                microbatch=plan.microbatch(index), reason=reason, missing_from=lowest.get(index)
            )
            self.num_decisions += 1

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Microbatches with an attempt that is leased, or whose close is awaited."""
        return len(self._open)

    @property
    def num_closed(self) -> int:
        """Microbatches applied on every layer, or dropped; those closed before a restore included."""
        return len(self._closed)

    @property
    def complete(self) -> bool:
        """Everything up to the end of the run, or up to the stop version, is closed."""
        return len(self._closed) >= self._target

    def summary(self) -> dict[str, Any]:
        """What is closed so far, for manifests and documents; lists at most `MOST_DROPPED` of the dropped microbatches."""
        dropped = self.dropped
        return {
            "samples_leased": self.samples_leased,
            "samples_applied": self.samples_applied,
            "samples_dropped": self.samples_dropped,
            "num_dropped": len(dropped),
            "dropped": [one.to_json() for one in dropped[:MOST_DROPPED]],
        }

    @property
    def samples_applied(self) -> int:
        """Unique samples whose gradients every layer has."""
        return self._closed_samples - self._dropped_samples

    @property
    def samples_dropped(self) -> int:
        """Unique samples whose gradients are missing on at least one layer, for good."""
        return self._dropped_samples

    @property
    def samples_leased(self) -> int:
        """Unique samples leased and not given back: applied + dropped + open."""
        return self._closed_samples + self._open_samples

    def closed(self) -> AppliedSet:
        """A copy of the set of closed microbatches."""
        return self._closed.copy()

    @property
    def dropped(self) -> list[DroppedMicrobatch]:
        """What is closed without its gradient on every layer, in position order."""
        return [self.drops[index] for index in sorted(self._closed.dropped)]

    def samples_given_up(self, epoch: int) -> int:
        """Samples of ``epoch`` that are dropped, or will be."""
        return sum(one.microbatch.num_samples for one in self.drops.values() if one.microbatch.epoch == epoch)

    def reason_to_drop(self, microbatch: Microbatch) -> str:
        """Why the microbatch is given up; empty when it is not."""
        known = self.drops.get(self.plan.index(microbatch))
        return "" if known is None else known.reason

    def is_partial(self, microbatch: Microbatch) -> bool:
        """Some layers had it when training began, and others still lack it: nothing may go on before it is closed."""
        return self.plan.index(microbatch) in self._first

    # What happens ----------------------------------------------------------------------------------------------------

    def stop_at(self, version: int) -> None:
        """Training ends at ``version``: lease no more than its updates need."""
        self._target = min(self._target, self.plan.gradients_before(version))

    def lease(self, worker: str, capacity: int, now: float, *, paused: bool = False) -> tuple[Attempt, ...]:
        """Fill ``worker`` up to ``capacity`` leases; while ``paused``, only with what an open one may wait for."""
        state = self._workers.setdefault(worker, _Worker())
        granted = []
        while len(state.held) < capacity:
            index = self._next()
            if index is None or (paused and index > max(self._open, default=-1)):
                break
            self._take(index)
            attempt = self._attempts.get(index, self._first_attempt - 1) + 1
            self._attempts[index] = attempt
            self._open[index] = _Open(attempt, worker, now)
            self._open_samples += self.plan.microbatch(index).num_samples
            state.held.add((index, attempt))
            granted.append(Attempt(self.plan.microbatch(index), attempt))
        return tuple(granted)

    def close(self, attempt: Attempt, outcome: Outcome, *, reason: str = "", missing_from: int | None = None) -> bool:
        """A number was closed; True when this is what closed the microbatch.

        Any attempt's "applied" or "dropped" closes the microbatch, once. "aborted" frees it for the next attempt,
        unless a newer attempt is already under way. ``ValueError`` when the microbatch is not of this plan.
        """
        index = self.plan.index(attempt.microbatch)
        for worker in self._workers.values():
            worker.held.discard((index, attempt.attempt))
        if index in self._closed:
            return False
        current = self._open.get(index)
        if outcome is Outcome.ABORTED:
            if current is not None:
                if attempt.attempt >= current.attempt or current.holder is None:
                    self._release(index)
                    self._want(self._unneeded)
                else:
                    current.older_aborted = True
            self._want(self._early)
            return False
        if current is not None:
            self._remove_open(index)
        self._attempts.pop(index, None)
        dropped = outcome is Outcome.DROPPED
        self._closed.add(index, dropped=dropped)
        self._first.discard(index)
        self._want(self._early)
        self._closed_samples += attempt.microbatch.num_samples
        if dropped:
            self._dropped_samples += attempt.microbatch.num_samples
            known = self.drops.get(index)
            if known is not None:
                reason = known.reason  # that of the decision; the route may only have found its tombstone
            self.drops[index] = DroppedMicrobatch(
                microbatch=attempt.microbatch, reason=reason, missing_from=missing_from
            )
            self.num_decisions += 1
        elif self.drops.pop(index, None) is not None:
            self.num_decisions += 1
        return True

    def give_up(self, worker: str, attempt: Attempt, reason: str) -> bool:
        """``worker`` can't bring the samples of ``attempt``, so the microbatch is dropped for good: leased again, as a drop.

        False, and no change, when ``attempt`` is not the one that counts.
        """
        try:
            index = self.plan.index(attempt.microbatch)
        except ValueError:
            return False
        current = self._open.get(index)
        given_up = current is not None and current.attempt == attempt.attempt and current.holder == worker
        if given_up and index not in self.drops:
            self.drops[index] = DroppedMicrobatch(microbatch=attempt.microbatch, reason=reason)
            self.num_decisions += 1
        self.give_back(worker, attempt, reason)
        return given_up

    def give_back(self, worker: str, attempt: Attempt, reason: str) -> None:
        """``worker`` no longer works on ``attempt``.

        "applied" and "open" mean that an older attempt has closed or goes on, so its close is awaited; "stopping" that
        the stop version does not need it, as long as what it needs is not lost; "order" that an earlier one must come
        first. Any other reason frees the microbatch at once. What is not a microbatch of the plan, or not leased to
        ``worker``, changes nothing.
        """
        try:
            index = self.plan.index(attempt.microbatch)
        except ValueError:
            return
        if (state := self._workers.get(worker)) is not None:
            state.held.discard((index, attempt.attempt))
        current = self._open.get(index)
        if current is None or current.attempt != attempt.attempt or current.holder != worker:
            return
        if reason == ALREADY_APPLIED or (reason == STILL_OPEN and not current.older_aborted):
            current.holder = None
        elif reason == STOPPING or (reason == OUT_OF_ORDER and not self._is_first(index)):
            self._remove_open(index)
            (self._unneeded if reason == STOPPING else self._early).append(index)
        else:
            # The report that the older attempt was aborted overtook this answer, or those that came first have closed
            # since (nothing else may), or the reason says that nobody has it.
            self._release(index)
        if not self._open:
            # What comes first is among those that came too early for what came before it.
            self._want(self._early)

    def lose(self, worker: str) -> int:
        """``worker`` is gone: what it held is free again; gives how many microbatches that were."""
        state = self._workers.pop(worker, None)
        if state is None:
            return 0
        freed = 0
        for index, attempt in sorted(state.held):
            current = self._open.get(index)
            if current is not None and current.attempt == attempt and current.holder == worker:
                self._release(index)
                freed += 1
        self._want(self._unneeded)
        self._want(self._early)
        return freed

    def recall(self) -> None:
        """The run is over: what is still leased will not be applied in it, so it counts as leased no more."""
        self._workers.clear()
        for index in list(self._open):
            self._release(index)

    def expire(self, before: float) -> int:
        """Free what was leased before that time and is not closed; its holder may yet finish it. Gives how many."""
        late = [index for index, current in self._open.items() if current.holder is not None and current.since < before]
        for index in late:
            self._release(index)
        if late:
            self._want(self._unneeded)
            self._want(self._early)
        return len(late)

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard: leases expire that much later."""
        for current in self._open.values():
            current.since = min(current.since + seconds, now)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _is_first(self, index: int) -> bool:
        """Whether nothing comes before it where microbatches come in order."""
        return index in self._first if self._first else index == self._closed.watermark

    def _release(self, index: int) -> None:
        self._remove_open(index)
        heapq.heappush(self._returned, index)

    def _want(self, parked: list[int]) -> None:
        for index in parked:
            heapq.heappush(self._returned, index)
        parked.clear()

    def _remove_open(self, index: int) -> None:
        del self._open[index]
        self._open_samples -= self.plan.microbatch(index).num_samples

    def _next(self) -> int | None:
        """The lowest index that may be leased now; it stays where it is until `_take`.

        What was leased before is wanted whatever the stop version: the first shard may hold a place for it.
        """
        first = min((index for index in self._first if index not in self._open), default=None)
        if first is not None:
            return first
        while self._returned and self._is_taken(self._returned[0]):
            heapq.heappop(self._returned)
        while self._cursor < self.plan.num_microbatches and self._is_taken(self._cursor):
            self._cursor += 1
        fresh = self._cursor if self._cursor < self.plan.num_microbatches else None
        if self._returned and (fresh is None or self._returned[0] <= fresh):
            return self._returned[0]
        return fresh if len(self._closed) + len(self._open) < self._target else None

    def _take(self, index: int) -> None:
        if self._returned and self._returned[0] == index:
            heapq.heappop(self._returned)
        if self._cursor == index:
            self._cursor += 1

    def _is_taken(self, index: int) -> bool:
        return index in self._open or index in self._closed

    def _samples_below(self, index: int) -> int:
        epoch, inside = divmod(index, self.plan.microbatches_per_epoch)
        return epoch * self.plan.num_samples + min(inside * self.plan.microbatch_samples, self.plan.num_samples)
