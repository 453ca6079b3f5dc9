"""Which microbatch is admitted next, and which admission numbers are still open.

The route's first shard asks this object. A *number* belongs to an attempt; it is open from its grant until every block of the route has reported
it. The window is the span from the oldest open number to the newest::

    number   4    5    6    7    8    9         window 4: after 8 nothing is granted until 5 closes,
             done open done done open (10)      although only two numbers are open

Decisions come back as values (`Granted`, `Declined`, `ClosedNumber`) in the order in which they were made. Not thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt
from layerwise.messages import Metric, Outcome
from layerwise.plan import TrainingPlan
from layerwise.server.cut_schedule import CutSchedule

GENERATION_BITS = 32
"""Below these bits of an admission number is the count of numbers, above them the generation of the route."""

MAX_PENDING_CUTS = 3
"""Admission goes on up to this many cuts beyond the newest durable one: so many copies of every layer may be in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """``attempt``, offered by ``peer``, is admitted as ``number``."""

    peer: str
    attempt: Attempt
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined:
    """``attempt``, offered by ``peer``, is not admitted; ``reason`` as in `layerwise.messages.Decline`."""

    peer: str
    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedNumber:
    """Every block has reported ``number``. ``peer`` offered it (``None``: it is lost).

    ``missing_from``: the lowest layer that dropped the microbatch while others have applied it.
    """

    number: int
    attempt: Attempt
    peer: str | None
    outcome: Outcome
    loss: float | None
    metrics: tuple[Metric, ...]
    reason: str
    missing_from: int | None


Decision = Granted | Declined | ClosedNumber


@dataclass(slots=True)
class OpenNumber:
    """An admitted attempt. ``arrived``: its tensors are here, so it goes on without its worker."""

    number: int
    attempt: Attempt
    index: int
    peer: str | None
    granted_at: float
    arrived: bool = False
    aborting: bool = False
    reports: dict[int, Outcome] = field(default_factory=dict)
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()
    reason: str = ""
    missing_from: int | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    attempt: Attempt
    index: int
    since: float


class Admission:
    """One job's numbers.

    With ``window`` 1 and in ``synchronous`` mode microbatches are admitted in position order, else in the order of arrival. Synchronous
    mode admits the microbatches of an update once all earlier updates are closed on all layers, and one after the other: a number is given when the
    tensors of the one before have arrived, so that every layer sees them in position order. So it is up to version ``synchronous_until``
    in any mode.
    """

    def __init__(
        self,
        *,
        plan: TrainingPlan,
        window: int,
        num_blocks: int,
        schedule: CutSchedule,
        synchronous: bool = False,
        durable: int = 0,
        generation: int = 0,
        synchronous_until: int = 0,
    ) -> None:
        if window < 1 or num_blocks < 1:
            raise ValueError(f"window and number of blocks must be at least 1, got {window} and {num_blocks}")
        self.window = window
        self.started = False
        self.done = AppliedSet()
        self.next_number = generation << GENERATION_BITS
        self.stop_version: int | None = None
        self._plan = plan
        self._num_blocks = num_blocks
        self._schedule = schedule
        self._synchronous = synchronous
        self._synchronous_stop = plan.gradients_before(synchronous_until)
        self._durable = durable
        self._open: dict[int, OpenNumber] = {}
        self._by_index: dict[int, OpenNumber] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._partial: set[int] = set()

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def synchronous(self) -> bool:
        """Updates are made one after the other now."""
        return self._synchronous or self.done.watermark < self._synchronous_stop

    @property
    def ordered(self) -> bool:
        """Microbatches are admitted in position order now."""
        return self.synchronous or self.window == 1

    @property
    def oldest_open(self) -> int | None:
        """The oldest open number."""
        return next(iter(self._open), None)

    @property
    def num_open(self) -> int:
        """Numbers open now."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Offers that wait, at most one a link."""
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who waits with an offer."""
        return tuple(self._waiting)

    @property
    def span(self) -> int:
        """From the oldest open number to the newest given; never above the window."""
        oldest = self.oldest_open
        return 0 if oldest is None else self.next_number - oldest

    @property
    def complete(self) -> bool:
        """Everything up to the end of the run, or up to the stop version, is closed."""
        return self.started and not self._open and not self._partial and len(self.done) >= self._final_limit

    def get(self, number: int) -> OpenNumber | None:
        """The open number, if it is open."""
        return self._open.get(number)

    def open_numbers(self) -> tuple[OpenNumber, ...]:
        """All open numbers, oldest first."""
        return tuple(self._open.values())

    # What happens ----------------------------------------------------------------------------------------------------

    def start(self, done: AppliedSet, held: AppliedSet | None, now: float) -> list[Decision]:
        """Training may begin. ``done`` is on every layer, ``held`` on at least one (a stop must complete it)."""
        self.started = True
        self.done = done.copy()
        if held is not None:
            top = max(held.above, default=held.watermark - 1) + 1
            self._partial = {index for index in self.done.missing(top) if index in held}
        return self._settle(now)

    def offer(self, peer: str, attempt: Attempt, now: float) -> list[Decision]:
        """``peer`` holds ``attempt``. It replaces the offer of that link that still waits.

        Raises:
            ValueError: the plan cuts no such microbatch.
        """
        self._waiting.pop(peer, None)
        self._waiting[peer] = _Waiting(attempt=attempt, index=self._plan.index(attempt.microbatch), since=now)
        return self._settle(now)

    def arrived(self, number: int, attempt: Attempt, now: float) -> list[Decision] | None:
        """The tensors of ``number`` are here; ``None``: it is not open, is being aborted or has its tensors, so they are not wanted."""
        entry = self._open.get(number)
        if entry is None or entry.attempt != attempt or entry.aborting or entry.arrived:
            return None
        entry.arrived = True
        return self._settle(now)

    def give_up(self, number: int, attempt: Attempt, peer: str) -> OpenNumber | None:
        """The number to abort because what ``peer`` sent for it can't be used; ``None``: it does not wait for that."""
        entry = self._open.get(number)
        if entry is None or entry.attempt != attempt or entry.peer != peer:
            return None
        return entry if self._abort(entry) else None

    def lose(self, peer: str, now: float) -> tuple[list[OpenNumber], list[Decision]]:
        """``peer`` is gone: its offer is forgotten; gives the numbers to abort, those whose tensors had not arrived."""
        self._waiting.pop(peer, None)
        lost = [entry for entry in self._open.values() if entry.peer == peer]
        for entry in lost:
            entry.peer = None
        aborted = [entry for entry in lost if self._abort(entry)]
        return aborted, self._settle(now)

    def withdraw(self, peer: str) -> Attempt | None:
        """``peer`` takes part no more: its offer that waits is forgotten; gives the attempt."""
        waiting = self._waiting.pop(peer, None)
        return None if waiting is None else waiting.attempt

    def abort_late(self, granted_before: float) -> list[OpenNumber]:
        """Numbers to abort because their tensors have not arrived since before that time."""
        return [entry for entry in self._open.values() if entry.granted_at < granted_before and self._abort(entry)]

    def report(
        self,
        number: int,
        attempt: Attempt,
        block: int,
        outcome: Outcome,
        now: float,
        *,
        loss: float | None = None,
        metrics: tuple[Metric, ...] = (),
        reason: str = "",
        missing_from: int | None = None,
        partial: bool = False,
    ) -> list[Decision]:
        """``block`` has closed ``number``; a repeat, or a report of a number that is not open, changes nothing."""
        entry = self._open.get(number)
        if entry is None or entry.attempt != attempt or block in entry.reports or not 0 <= block < self._num_blocks:
            return []
        entry.reports[block] = outcome
        entry.loss = entry.loss if loss is None else loss
        entry.metrics = metrics or entry.metrics
        entry.reason = entry.reason or reason
        if missing_from is not None:
            entry.partial = entry.partial or partial
            entry.missing_from = missing_from if entry.missing_from is None else min(entry.missing_from, missing_from)
        if len(entry.reports) < self._num_blocks:
            return []
        return [self._close(entry), *self._settle(now)]

    def cut_durable(self, version: int, now: float) -> list[Decision]:
        """Cuts up to ``version`` are on disk (or given up)."""
        self._durable = max(self._durable, version)
        return self._settle(now)

    def stop(self, now: float) -> tuple[int, list[Decision]]:
        """Fix the next update boundary: the lowest version at which all that is admitted, or on some layer, is in whole updates."""
        if self.stop_version is None:
            held = len(self.done) + len(self._unclosed())
            version = self._plan.update_of(held - 1) + 1 if held else 0
            self.stop_version = min(version, self._schedule.final)
            self._schedule.stop_at(self.stop_version)
        return self.stop_version, self._settle(now)

    def unblock(self, waiting_since: float) -> list[Decision]:
        """Decline what waits since before that time for an earlier microbatch that nobody offers ("order", or "stopping").

        Its worker may have no room for the lease of that microbatch; the others wait for it for ever.
        """
        if not self.started or self._open or not self._waiting:
            return []
        if any(waiting.since >= waiting_since for waiting in self._waiting.values()):
            return []
        wanted = self._wanted()
        if not wanted or any(waiting.index in wanted for waiting in self._waiting.values()):
            return []
        # What a stop does not need is not to be leased again at once, unless what it needs is lost.
        declined: list[Decision] = [
            Declined(
                peer=peer, attempt=waiting.attempt, reason="order" if self._is_needed(waiting.index) else "stopping"
            )
            for peer, waiting in self._waiting.items()
        ]
        self._waiting.clear()
        return declined

    # Inside ----------------------------------------------------------------------------------------------------------

    @property
    def _final_limit(self) -> int:
        return self._plan.gradients_before(self._schedule.final)

    def _limit(self) -> int:
        """How many microbatches may be done or admitted: up to the end, and not past too many cuts that are not durable."""
        pending = self._schedule.following(self._durable, MAX_PENDING_CUTS)
        return self._plan.gradients_before(pending[-1]) if pending else self._final_limit

    def _unclosed(self) -> set[int]:
        return self._partial | self._by_index.keys()

    def _abort(self, entry: OpenNumber) -> bool:
        if entry.arrived or entry.aborting:
            return False
        entry.aborting = True
        return True

    def _close(self, entry: OpenNumber) -> ClosedNumber:
        outcomes = set(entry.reports.values())
        outcome = next(one for one in (Outcome.ABORTED, Outcome.DROPPED, Outcome.APPLIED) if one in outcomes)
        del self._open[entry.number], self._by_index[entry.index]
        if outcome is not Outcome.ABORTED:
            self.done.add(entry.index, dropped=outcome is Outcome.DROPPED)
            self._partial.discard(entry.index)
        elif len(outcomes) > 1:
            self._partial.add(entry.index)
        return ClosedNumber(
            number=entry.number,
            attempt=entry.attempt,
            peer=entry.peer,
            outcome=outcome,
            loss=entry.loss,
            metrics=entry.metrics,
            reason=entry.reason,
            missing_from=entry.missing_from if entry.partial or Outcome.APPLIED in outcomes else None,
        )

    def _settle(self, now: float) -> list[Decision]:
        """Decline what can never be admitted, grant what can be now."""
        decisions: list[Decision] = []
        if not self.started:
            return decisions
        while True:
            for peer, waiting in list(self._waiting.items()):
                reason = self._refusal(waiting)
                if reason is not None:
                    del self._waiting[peer]
                    decisions.append(Declined(peer=peer, attempt=waiting.attempt, reason=reason))
            peer_granted = self._choose()
            if peer_granted is None:
                return decisions
            decisions.append(self._grant(peer_granted, now))

    def _refusal(self, waiting: _Waiting) -> str | None:
        if waiting.index in self.done:
            return "applied"
        entry = self._by_index.get(waiting.index)
        if entry is not None and (entry.arrived or entry.attempt.attempt >= waiting.attempt.attempt):
            return "open"
        if self.stop_version is not None and self.complete:
            return "stopping"
        return None

    def _choose(self) -> str | None:
        """The link whose offer is granted now."""
        if self._open:
            if self.span >= self.window:
                return None
            if self.synchronous and not next(reversed(self._open.values())).arrived:
                return None
        if not self._waiting:
            return None
        if self.ordered:
            wanted = self._lowest_wanted()
            if wanted is None or (self.synchronous and not self._may_be_synchronous(wanted)):
                return None
            candidates = [peer for peer, waiting in self._waiting.items() if waiting.index == wanted]
            # Of two attempts at one microbatch the newer is the one that its lease stands behind.
            return max(candidates, key=lambda peer: self._waiting[peer].attempt, default=None)
        return next((peer for peer, waiting in self._waiting.items() if self._fits(waiting.index)), None)

    def _fits(self, index: int) -> bool:
        if index in self._by_index:
            return False
        return index in self._partial or len(self.done) + len(self._unclosed()) < self._limit()

    def _wanted(self) -> set[int]:
        """With nothing open: the only microbatches that can be admitted (empty: any can, or none)."""
        if self.ordered:
            lowest = self._lowest_wanted()
            return set() if lowest is None else {lowest}
        return self._partial if len(self.done) + len(self._unclosed()) >= self._limit() else set()

    def _is_needed(self, index: int) -> bool:
        """With nothing open: whether what is left until the end, or until the stop version, takes ``index``."""
        if index in self._partial:
            return True
        left = self._final_limit - len(self.done) - len(self._partial)
        if not self.ordered:
            return left > 0
        below = sum(1 for one in self.done.above | self._partial if one < index)
        return index - min(index, self.done.watermark) - below < left

    def _lowest_wanted(self) -> int | None:
        """The index that must be admitted next where microbatches come in position order: what some layers lack comes first."""
        if self._partial:
            return min(self._partial - self._by_index.keys(), default=None)
        if len(self.done) + len(self._unclosed()) >= self._limit():
            return None
        index = self.done.watermark
        while index in self.done or index in self._by_index:
            index += 1
        return index if index < self._plan.num_microbatches else None

    def _may_be_synchronous(self, index: int) -> bool:
        """Whether ``index`` can be admitted and meet no update on its way.

        What only some layers lack goes alone: they may be in the middle of an update. When all layers have the same
        microbatches, so many as complete the next update go together.
        """
        if self._partial:
            return index in self._partial and not self._open
        closed = len(self.done)
        return closed + len(self._open) < self._plan.gradients_before(self._plan.update_of(closed) + 1)

    def _grant(self, peer: str, now: float) -> Granted:
        waiting = self._waiting.pop(peer)
        entry = OpenNumber(
            number=self.next_number, attempt=waiting.attempt, index=waiting.index, peer=peer, granted_at=now
        )
        self.next_number += 1
        self._open[entry.number] = self._by_index[entry.index] = entry
        return Granted(peer=peer, attempt=entry.attempt, number=entry.number)
