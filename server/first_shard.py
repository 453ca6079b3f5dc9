"""What the route's first shard does beside computing: it admits microbatches, closes their numbers and tells the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt, first_attempt
from layerwise.messages import (
    MAX_OFFERED_BYTES,
    Abort,
    AttemptClosed,
    AttemptsClosed,
    BlockClosed,
    Closed,
    Decline,
    Forward,
    Grant,
    Offer,
    Outcome,
    StartTraining,
    StopAt,
    Stopping,
)
from layerwise.roles import Effect, Send
from layerwise.server.admission import Admission, ClosedNumber, Decision, Declined, Granted, OpenNumber
from layerwise.server.block_context import BlockContext
from layerwise.server.cut_schedule import CutSchedule

REPORT_SECONDS = 0.25
"""Closed numbers are told to the coordinator in batches, at most so often while workers hold leases for some seconds ahead."""
ORDERED_REPORT_SECONDS = 0.02
"""The same where they hold few: the next leases follow from what has closed."""
MAX_BATCH = 256
STALL_SECONDS = 1.0
"""How long offers may wait for an earlier microbatch that nobody offers before their leases are given back."""

MAX_UNFIT = 8
"""Microbatches in a row that do not fit before the job fails: one bad worker among good ones does no harm."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offered:
    """An offer that waits. ``unfit``: why its tensors can't be used; empty when they can."""

    offer: Offer
    unfit: str


class FirstShard:
    """The admission part of `ShardRole` for block 0. Events in, effects out; called by `ShardRole` and its parts only.

    ``enter(worker, forward, now)`` takes a microbatch whose tensors came with its offer, once it is granted.
    """

    def __init__(
        self,
        context: BlockContext,
        enter: Callable[[str, Forward, float], list[Effect]],
        *,
        synchronous: bool,
        schedule: CutSchedule,
        version: int,
        task_seconds: float,
        synchronous_until: int = 0,
    ) -> None:
        self.max_span = 0
        """The largest span of open numbers so far; the window at most."""
        self._context = context
        self._enter = enter
        self._job = context.job
        self._life = context.life
        self._schedule = schedule
        self._synchronous = synchronous
        self._synchronous_until = synchronous_until
        self._task_seconds = task_seconds
        self._closed: list[AttemptClosed] = []
        self._reported_at = 0.0
        self._told = 0
        """How many microbatches the coordinator knows to be closed."""
        self._awaited = 0
        """How many it has to know of before it commits the newest cut that this block has saved."""
        self._first_admission: float | None = None
        self._last_close = 0.0
        self._stop_wanted = False
        self._durable = version
        self._num_unfit = 0
        self._offered: dict[str, _Offered] = {}
        """What `Admission` lets wait, at most one offer a link."""
        self._strangers: dict[str, _Offered] = {}
        """Offers of those that the coordinator has not named (yet), at most one a link."""
        self.admission = self._new_admission()

    def describe(self) -> str:
        """What is admitted and what waits, in one line."""
        numbers = []
        for one in self.admission.open_numbers():
            state = "aborting" if one.aborting else "arrived" if one.arrived else "awaited"
            numbers.append(f"{one.number}:{one.attempt} {state} {dict(one.reports)}")
        waiting, done = self.admission.num_waiting, len(self.admission.done)
        return f"open [{', '.join(numbers)}], waiting {waiting}, done {done}, stop {self.admission.stop_version}"

    def begin_anew(self, durable: int) -> list[Effect]:
        """The route has changed: no number is open any more, and none is given until `on_start`. Cuts up to ``durable`` are on disk.

        What has closed is told first, so that it is not thought open.
        """
        effects = self._report(self._reported_at)
        self._durable = max(self._durable, durable)
        self.admission = self._new_admission()
        self._stop_wanted = False
        self._offered.clear()
        self._strangers.clear()
        return effects

    def _new_admission(self) -> Admission:
        context = self._context
        return Admission(
            plan=context.plan,
            window=context.window,
            num_blocks=context.num_blocks,
            schedule=self._schedule,
            synchronous=self._synchronous,
            durable=self._durable,
            generation=context.generation,
            synchronous_until=self._synchronous_until,
        )

    def on_start(self, message: StartTraining, now: float) -> list[Effect]:
        """The coordinator says that every role is ready."""
        if self.admission.started:
            return []
        stop = self._context.plan.num_microbatches
        done = AppliedSet.parse(message.done_json, stop=stop)
        held = AppliedSet.parse(message.held_json, stop=stop) if message.held_json else None
        self._told = len(done)
        effects = self.carry_out(self.admission.start(done, held, now), now)
        if self._stop_wanted:
            effects += self.on_stop(now)
        return effects

    def on_offer(self, peer: str, offer: Offer, now: float, *, unfit: str = "") -> list[Effect]:
        """A worker holds a microbatch; the tensors that came with it are ``unfit`` for the block, where that is not empty."""
        if offer.life != self._life:
            log.warning(
                "offer of %s by %s refused: it is for life %d, the block is in %d",
                offer.attempt,
                peer,
                offer.life,
                self._life,
            )
            return [Send(peer, Decline(job=self._job, attempt=offer.attempt, reason="life", life=offer.life))]
        if offer.attempt.attempt < first_attempt(self._context.generation):
            # Granted it would hold a place until the time limit: its worker forgets it, if it has not yet, with the new route.
            return self._context.refuse(peer, offer, "it was leased under an older route")
        size = 0 if offer.samples is None else offer.samples.num_bytes
        if size > MAX_OFFERED_BYTES:
            return self._context.refuse(
                peer,
                offer,
                f"it brings {size} bytes of tensors; more than {MAX_OFFERED_BYTES} have to follow the grant",
            )
        offered = _Offered(offer=offer, unfit=unfit)
        if not self._context.is_worker(peer):
            self._strangers[peer] = offered
            return self._context.refuse(peer, offer, "the coordinator has not named it among the job's workers")
        return self._let_wait(peer, offered, now)

    def _let_wait(self, peer: str, offered: _Offered, now: float) -> list[Effect]:
        self._offered[peer] = offered
        return self.carry_out(self.admission.offer(peer, offered.offer.attempt, now), now)

    def on_workers(self, now: float) -> list[Effect]:
        """Who works for the job has changed: nobody else is granted anything, nor waited for."""
        effects: list[Effect] = []
        is_worker = self._context.is_worker
        for entry in self.admission.open_numbers():
            if entry.peer is not None and not is_worker(entry.peer) and not entry.arrived:
                given_up = self.admission.give_up(entry.number, entry.attempt, entry.peer)
                reason = f"forward worker {entry.peer} left before it had sent the samples"
                effects += self._abort(given_up, reason, now) if given_up is not None else []
        for peer in self.admission.waiting:
            if not is_worker(peer):
                self.admission.withdraw(peer)
                self._strangers[peer] = self._offered.pop(peer)
        for peer in [one for one in self._strangers if is_worker(one)]:
            effects += self._let_wait(peer, self._strangers.pop(peer), now)
        return effects

    def on_tensors(self, peer: str, number: int, attempt: Attempt, now: float) -> list[Decision] | None:
        """A microbatch arrived whole; ``None`` when it is not wanted, or not from ``peer``.

        Gives what admission decides after it: to be carried out once the microbatch itself is under way.
        """
        entry = self.admission.get(number)
        if entry is None or entry.peer != peer:
            return None
        decisions = self.admission.arrived(number, attempt, now)
        if decisions is None:
            return None
        self._num_unfit = 0
        return decisions

    def on_unfit(self, peer: str, number: int, attempt: Attempt, why: str, now: float) -> list[Effect]:
        """What arrived for ``number`` can't be used: its worker loses the microbatch to another one."""
        entry = self.admission.give_up(number, attempt, peer)
        if entry is None:
            return []
        self._num_unfit += 1
        if self._num_unfit >= MAX_UNFIT:
            return self._context.fail(
                f"what forward worker {peer} sent for {attempt.microbatch} does not fit the job's model ({why}), nor did "
                f"the {MAX_UNFIT - 1} microbatches before; its data differ from those that were measured"
            )
        return self._abort(entry, f"what forward worker {peer} sent does not fit: {why}", now)

    def on_block_closed(self, report: BlockClosed, now: float) -> list[Effect]:
        """A block of the route, this one included, has closed an attempt."""
        decisions = self.admission.report(
            report.number,
            report.attempt,
            report.block,
            report.outcome,
            now,
            loss=report.loss,
            metrics=report.metrics,
            reason=report.reason,
            missing_from=report.missing_from,
            partial=report.partial,
        )
        return self.carry_out(decisions, now)

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """A forward worker is gone: what it had not sent whole is aborted."""
        self._strangers.pop(peer, None)
        self._offered.pop(peer, None)
        aborted, decisions = self.admission.lose(peer, now)
        effects: list[Effect] = []
        for entry in aborted:
            effects += self._abort(entry, f"forward worker {peer} was lost before it had sent the samples", now)
        return effects + self.carry_out(decisions, now)

    def on_stop(self, now: float) -> list[Effect]:
        """Stop at the next update boundary."""
        if not self.admission.started:
            self._stop_wanted = True
            return []
        repeated = self.admission.stop_version is not None
        version, decisions = self.admission.stop(now)
        effects: list[Effect] = [Send(self._context.coordinator, Stopping(job=self._job, version=version))]
        if not repeated:
            self._context.compute.hold_cut(version)
            self._context.compute.cut_at(version)
            if (after := self._context.downstream) is not None:
                effects.append(Send(after.shard, StopAt(job=self._job, version=version, life=after.life)))
        return effects + self.carry_out(decisions, now) + self._report(now)

    def on_cut_durable(self, version: int, now: float) -> list[Effect]:
        """Admission may pass the cuts after ``version``."""
        self._durable = max(self._durable, version)
        return self.carry_out(self.admission.cut_durable(version, now), now)

    def on_tick(self, now: float) -> list[Effect]:
        """Abort what never arrived, dissolve a stall, report what has closed."""
        effects: list[Effect] = []
        for entry in self.admission.abort_late(now - self._task_seconds):
            reason = f"the samples of {entry.attempt} did not arrive within {self._task_seconds:g} s of its grant"
            effects += self._abort(entry, reason, now)
        return effects + self.carry_out(self.admission.unblock(now - STALL_SECONDS), now)

    def _abort(self, entry: OpenNumber, reason: str, now: float) -> list[Effect]:
        log.info("number %d aborted: %s", entry.number, reason)
        self._context.compute.abort(entry.attempt)
        effects: list[Effect] = []
        if (after := self._context.downstream) is not None:
            self._context.routed = True
            abort = Abort(job=self._job, attempt=entry.attempt, number=entry.number, life=after.life)
            effects.append(Send(after.shard, abort))
        decisions = self.admission.report(entry.number, entry.attempt, 0, Outcome.ABORTED, now, reason=reason)
        return effects + self.carry_out(decisions, now)

    def carry_out(self, decisions: list[Decision], now: float) -> list[Effect]:
        """Tell workers and coordinator what admission has decided; what is admitted and here whole is taken in."""
        effects: list[Effect] = []
        for decision in decisions:
            match decision:
                case Granted(peer=peer, attempt=attempt, number=number):
                    if self._first_admission is None:
                        self._first_admission = now
                    effects += self._grant(peer, attempt, number, now)
                case Declined(peer=peer, attempt=attempt, reason=reason):
                    self._offered.pop(peer, None)
                    effects.append(Send(peer, Decline(job=self._job, attempt=attempt, reason=reason, life=self._life)))
                case ClosedNumber():
                    effects += self._close(decision, now)
        self.max_span = max(self.max_span, self.admission.span)
        return effects + self._report_due(now)

    def _grant(self, peer: str, attempt: Attempt, number: int, now: float) -> list[Effect]:
        offered = self._offered.pop(peer)
        samples = offered.offer.samples
        arrived = samples is not None
        effects: list[Effect] = [
            Send(peer, Grant(job=self._job, attempt=attempt, number=number, life=self._life, arrived=arrived))
        ]
        if samples is None:
            return effects
        if offered.unfit:
            return effects + self.on_unfit(peer, number, attempt, offered.unfit, now)
        self._context.routed = True
        forward = Forward(
            job=self._job,
            attempt=attempt,
            number=number,
            life=self._life,
            needed_from=self._context.num_layers,
            inputs=samples.inputs,
            targets=samples.targets,
            dropped=samples.dropped,
        )
        return effects + self._enter(peer, forward, now)

    def _close(self, closed: ClosedNumber, now: float) -> list[Effect]:
        self._last_close = now
        self._closed.append(
            AttemptClosed(
                attempt=closed.attempt,
                number=closed.number,
                outcome=closed.outcome,
                loss=closed.loss,
                metrics=closed.metrics,
                reason=closed.reason,
                missing_from=closed.missing_from,
            )
        )
        effects: list[Effect] = []
        if closed.peer is not None:
            done = Closed(
                job=self._job, attempt=closed.attempt, outcome=closed.outcome, life=self._life, loss=closed.loss
            )
            effects.append(Send(closed.peer, done))
        return effects

    def _report_due(self, now: float) -> list[Effect]:
        """Tell what has closed when it is time; at once where a cut waits, or nothing goes on: somebody may wait for just that."""
        patience = ORDERED_REPORT_SECONDS if self.admission.ordered else REPORT_SECONDS
        due = now - self._reported_at >= patience or len(self._closed) >= MAX_BATCH or self._told < self._awaited
        return self._report(now) if due or self.admission.num_open == 0 else []

    def on_cut_saved(self, version: int, now: float) -> list[Effect]:
        """The block is saved at ``version``; the coordinator commits that once it is told of all that has closed by then."""
        self._awaited = self._context.plan.gradients_before(version)
        return self._report(now)

    def _report(self, now: float) -> list[Effect]:
        if not self._closed:
            return []
        closed, self._closed = tuple(self._closed), []
        self._reported_at = now
        self._told = len(self.admission.done)
        active = self._last_close - (self._first_admission or 0.0)
        return [Send(self._context.coordinator, AttemptsClosed(job=self._job, closed=closed, active_seconds=active))]
