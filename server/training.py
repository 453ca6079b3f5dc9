"""One run while it trains: leases out, closed microbatches in, cuts made durable, evaluations in between.

::

    training ── a cut that is to be evaluated is taken by all blocks ──► draining   (nothing new is leased)
       ▲                                                                    │ no microbatch is open
       └──────────── every validation range is answered ◄── evaluating ◄────┘       (a pause, not counted as training)

After the last microbatch the same steps end the run: it is finished when the last cut is durable, its evaluation is in,
and every block has reported the last version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from layerwise.applied import AppliedSet
from layerwise.dropped import DroppedMicrobatch
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    AttemptClosed,
    AttemptsClosed,
    BlockReport,
    CutCommitted,
    CutSaved,
    CutTaken,
    DroppedAttempt,
    Evaluated,
    LayerFile,
    LayerReport,
    Lease,
    LeaseKind,
    LeaseReturn,
    Outcome,
    Recall,
    ReleaseCut,
)
from layerwise.roles import Effect, Send
from layerwise.server.cut_commits import CutCommits
from layerwise.server.cut_ledger import CutLedger
from layerwise.server.divergence_guard import Divergence, DivergenceGuard
from layerwise.server.evaluation_round import Evaluation, EvaluationRound
from layerwise.server.job_record import CutRecord
from layerwise.server.journal import Journal
from layerwise.server.membership import natural_order
from layerwise.server.preparation import Prepared
from layerwise.server.run_clock import RunClock, StallWatch
from layerwise.server.sample_ledger import SampleLedger
from layerwise.server.training_loss import TrainingLoss

LOAD_FAILED = "load-failed"
NOT_FINITE = "its loss is not finite"
"""How the last shard begins to say why it dropped a microbatch."""


class Training:
    """Decides for one run and one route, from `StartTraining` on. Not thread-safe.

    No layer began below version ``restored``, and no cut below ``first_whole`` can become durable any more. The microbatches in
    ``done`` are on all of them, those in ``held`` on at least one. Attempts are numbered from ``first_attempt``; ``drops`` are given
    up already, those in ``missing_from`` are on some layers (see `SampleLedger`). Version ``evaluated`` and those below need no evaluation.
    ``failure`` holds the sentence once the run can't go on, ``divergence`` what ``guard`` has found; ``finished`` says that nothing is left to do.
    """

    def __init__(
        self,
        *,
        job: str,
        prepared: Prepared,
        shards: tuple[str, ...],
        restored: int,
        durable: tuple[CutRecord, ...],
        done: AppliedSet,
        held: AppliedSet,
        first_whole: int,
        evaluated: int,
        first_attempt: int,
        drops: Iterable[DroppedMicrobatch],
        missing_from: Mapping[int, int],
        guard: DivergenceGuard | None,
        journal: Journal,
        manifest: Callable[[int, tuple[LayerFile, ...]], str],
        now: float,
    ) -> None:
        self.plan = prepared.settings.plan
        top = max(held.above, default=held.watermark - 1) + 1
        partial = [index for index in done.missing(top) if index in held]
        self.ledger = SampleLedger(
            self.plan,
            done=done,
            partial=partial,
            first_attempt=first_attempt,
            drops=drops,
            missing_from=missing_from,
        )
        self.cuts = CutLedger(
            len(shards),
            keep=prepared.spec.checkpoint.keep,
            durable=tuple(cut.version for cut in durable),
            first_whole=first_whole,
        )
        self.commits = CutCommits(
            job=job,
            shard=shards[0],
            cuts=self.cuts,
            samples=self.ledger,
            durable=durable,
            journal=journal,
            manifest=manifest,
        )
        self.clock = RunClock()
        self.loss = TrainingLoss(self.plan)
        self.final = self.plan.num_updates
        self.restored = restored
        self.failure: str | None = None
        self.divergence: Divergence | None = None
        self.stopping = False
        self.suspended = False
        """Nothing is handed out: the route is being changed."""
        self.moved = False
        """Processes were let go at its end: on the next route all layers begin at the newest durable cut."""
        self.evaluations: list[Evaluation] = []
        self.reports: dict[int, BlockReport] = {}
        self.round: EvaluationRound | None = None
        self.watch = StallWatch(lease=prepared.spec.timeouts.lease, task=prepared.spec.timeouts.task, now=now)
        self.samples_to_redo = sum(self.plan.microbatch(index).num_samples for index in partial)
        """Samples that some layers had and others lacked when this training began."""
        self._job = job
        self._shards = shards
        self._every = prepared.spec.train.evaluate_every
        self._num_validation = prepared.profile.num_validation_samples
        # Places for a window of microbatches are planned for, with all that is kept of them; evaluation keeps nothing.
        self._range_samples = min(self.plan.batch, self.plan.microbatch_samples * prepared.settings.window)
        self._timeouts = prepared.spec.timeouts
        self._train = prepared.spec.train
        self._guard = guard
        if guard is not None and self._train.on_divergence == "rollback":
            self.cuts.pin(guard.good_version(restored))
        self._journal = journal
        self._capacity: dict[str, int] = {}
        self._taken: list[int] = []
        self._due: list[int] = []
        self._evaluated = evaluated
        self._released = restored - 1
        self._samples_before = self.ledger.samples_applied + self.ledger.samples_dropped
        self._stop_asked: float | None = None

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version that all layers have reached, as far as reported."""
        layers = [layer.version for layer in self.layers()]
        reported = min(layers) if len(self.reports) == len(self._shards) and layers else self.restored
        return max(reported, self.restored, max(self._taken, default=0))

    def layers(self) -> list[LayerReport]:
        """The newest report of every layer, in order."""
        return [layer for block in sorted(self.reports) for layer in self.reports[block].layers]

    def layers_of(self, block: int) -> tuple[LayerReport, ...]:
        """The newest report of one block's layers."""
        report = self.reports.get(block)
        return report.layers if report is not None else ()

    @property
    def samples_closed(self) -> int:
        """Samples that are applied on every layer, or dropped."""
        return self.ledger.samples_applied + self.ledger.samples_dropped

    @property
    def run_samples(self) -> int:
        """Samples closed since this run began."""
        return self.ledger.samples_applied + self.ledger.samples_dropped - self._samples_before

    @property
    def phase(self) -> str:
        """What is going on, in a few words."""
        if self.round is not None:
            return f"evaluating version {self.round.version}"
        if self._due and not self.ledger.complete:
            return f"waiting for open microbatches, to evaluate version {self._due[0]}"
        if self.ledger.complete:
            return f"saving version {self.final}"
        return "stopping" if self.stopping else "training"

    @property
    def finished(self) -> bool:
        """The last cut is durable, evaluated if it is to be, and reported by all."""
        return (
            self.ledger.complete
            and (self.final == self.restored or self.final in self.commits.records)
            and not self._due
            and self.round is None
            and (self.final == self.restored or self._all_reported())
        )

    @property
    def wants_evaluation(self) -> bool:
        """The job has validation samples."""
        return self._num_validation > 0

    def carry_on(self, before: Training, restored: Iterable[int], now: float) -> None:
        """Take over what ``before``, the training until the route changed, has counted; ``restored`` blocks report anew."""
        self.loss = before.loss
        self.reports = {block: report for block, report in before.reports.items() if block not in set(restored)}
        self._samples_before = before._samples_before
        self.clock = before.clock
        if 0 in set(restored):
            self.clock.begin_anew(now - before.watch.moved_at)
        if before.round is not None:
            self.clock.pause(now - before.round.began)

    # Workers ---------------------------------------------------------------------------------------------------------

    def offer_room(self, worker: str, count: int, now: float) -> list[Effect]:
        """A forward worker can hold ``count`` leases in all."""
        self._capacity[worker] = max(count, 0)
        return self._advance(now)

    def lose_worker(self, worker: str, now: float) -> list[Effect]:
        """A forward worker is gone; what it held goes to others at once."""
        self._capacity.pop(worker, None)
        freed = self.ledger.lose(worker)
        if freed:
            self._journal("info", f"{freed} microbatches of forward worker {worker} are leased again", worker=worker)
        if self.round is not None:
            self.round.lose(worker)
        return self._advance(now)

    def take_back(self, worker: str, message: LeaseReturn, now: float) -> list[Effect]:
        """A worker does not work on a lease any more."""
        if message.reason.startswith(LOAD_FAILED):
            what = message.reason.removeprefix(LOAD_FAILED).lstrip(": ")
            if self._train.on_bad_sample == "fail":
                self.failure = f"forward worker {worker} could not load samples {message.attempt.microbatch}: {what}"
                return []
            if self.ledger.give_up(worker, message.attempt, what):
                self._count_drop(message.attempt.microbatch, what)
            return self._advance(now)
        if self.round is None or not self.round.give_back(worker, message.attempt.microbatch):
            self.ledger.give_back(worker, message.attempt, message.reason)
        return self._advance(now)

    def close(self, message: AttemptsClosed, now: float) -> list[Effect]:
        """The first shard reports closed numbers."""
        for closed in message.closed:
            known = self.ledger.reason_to_drop(closed.attempt.microbatch)
            fresh = self.ledger.close(
                closed.attempt, closed.outcome, reason=closed.reason, missing_from=closed.missing_from
            )
            if fresh and closed.loss is not None:
                self.loss.add(closed.loss, closed.attempt.microbatch.num_samples)
            if fresh and (closed.loss is not None or closed.reason.startswith(NOT_FINITE)):
                self._watch(closed)
            if fresh and closed.outcome is Outcome.DROPPED and not known:
                self._count_drop(closed.attempt.microbatch, closed.reason)
        self.clock.reach(message.active_seconds)
        self.watch.moved(now)
        return self._advance(now)

    # Cuts ------------------------------------------------------------------------------------------------------------

    def take_cut(self, message: CutTaken, now: float) -> list[Effect]:
        """A block copied itself."""
        self.watch.moved(now)
        if not self.cuts.take(message.block, message.version):
            return []
        self._taken.append(message.version)
        if self._is_due(message.version):
            self._due.append(message.version)
            return self._recall() + self._advance(now)
        return self._advance(now)

    def save_cut(self, message: CutSaved, now: float) -> list[Effect]:
        """A block's files of a cut are on disk, or can't be."""
        self.watch.moved(now)
        if message.error:
            reason = f"{self._shards[message.block]} could not save its block: {message.error}"
            effects = self.commits.give_up(message.version, reason)
        else:
            self.cuts.save(message.block, message.version, message.files)
            effects = self.commits.ask()
        self._look_at_last_cut()
        return effects

    def commit_cut(self, message: CutCommitted, now: float) -> list[Effect]:
        """The manifest of a cut is on disk, or can't be."""
        if message.version != self.cuts.committing:
            # An answer to the training before: it may be of a life that was replaced since. What stays is committed again.
            return []
        self.watch.moved(now)
        effects = self.commits.note(message, now)
        self._look_at_last_cut()
        return effects

    # Reports, evaluation, stop ---------------------------------------------------------------------------------------

    def report(self, message: BlockReport) -> None:
        """A shard's totals. What its disk refuses is a warning once, and so is that it takes everything again."""
        before = self.reports.get(message.block)
        self.reports[message.block] = message
        shard, known = self._shards[message.block], before.shortage if before is not None else ""
        if message.shortage and not known:
            self._journal("warning", f"{shard}: {message.shortage}", shard=shard)
        elif known and not message.shortage:
            self._journal("info", f"{shard}: the event log can be written again", shard=shard)

    def evaluated(self, message: Evaluated, now: float) -> list[Effect]:
        """A validation range is evaluated."""
        if self.round is None or not self.round.answer(message, now):
            return []
        self.watch.moved(now)
        return self._advance(now)

    def stop_asked(self, now: float) -> list[Effect]:
        """The first shard was told to stop; nothing is leased until it says at which version."""
        self.stopping = True
        self._stop_asked = now
        self.watch.moved(now)
        return self._recall()

    def stop_at(self, version: int, now: float) -> list[Effect]:
        """The first shard has fixed the last version."""
        self._stop_asked = None
        self.final = min(self.final, version)
        self.ledger.stop_at(self.final)
        if self.final < self.plan.num_updates:
            # A cancelled run is not evaluated any more; what is out comes back to nobody.
            self.round = None
            self._due.clear()
        self.watch.moved(now)
        return self._advance(now)

    def tick(self, now: float) -> list[Effect]:
        """Expire leases, notice that nothing moves."""
        effects: list[Effect] = []
        if self.suspended:
            return effects
        if len(self._capacity) > 1 and not self.stopping and self.ledger.expire(now - self._timeouts.lease):
            effects = self._advance(now)
        if any(report.shortage for report in self.reports.values()):
            self.watch.wait_for_room(now)
        stands = f"nothing has moved for {self.watch.silence(now):.0f} s ({self.phase})"
        if self.watch.is_to_warn(now):
            self._journal("warning", stands)
        if self.watch.has_stalled(now, saving=self.cuts.saving):
            self.failure = f"{stands}, so the run was given up"
        return effects

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nothing that moved could be heard of."""
        self.watch.excuse(seconds, now)
        self.ledger.excuse(seconds, now)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _recall(self) -> list[Effect]:
        """Have the workers give back what they hold for later, so that what is leased closes soon."""
        return [Send(worker, Recall(job=self._job)) for worker in sorted(self._capacity, key=natural_order)]

    def _advance(self, now: float) -> list[Effect]:
        """Commit a cut that waited, begin or end an evaluation where it is time, then hand out what may be handed out."""
        effects: list[Effect] = []
        if self.suspended:
            return effects
        if self.divergence is None:  # else the run goes back, to a cut that this commit might delete
            effects += self.commits.ask()
        if self.round is not None and self.round.complete:
            effects += self._end_round(now)
        if self.round is None and self._due and self.ledger.num_open == 0 and self._stop_asked is None:
            self.round = EvaluationRound(
                self._due.pop(0), num_samples=self._num_validation, range_samples=self._range_samples, now=now
            )
        effects += self._release()
        self._look_at_last_cut()
        if self._stop_asked is not None or self.failure is not None:
            return effects
        for worker in sorted(self._capacity, key=natural_order):
            effects += self._lease(worker, now)
        return effects

    def _lease(self, worker: str, now: float) -> list[Effect]:
        if self.round is not None:
            ranges = self.round.lease(worker, max(self._capacity[worker], 1))
            version = self.round.version
            return (
                [Send(worker, Lease(job=self._job, kind=LeaseKind.EVALUATE, version=version, ranges=ranges))]
                if ranges
                else []
            )
        attempts: tuple[Attempt, ...] = self.ledger.lease(worker, self._capacity[worker], now, paused=bool(self._due))
        if not attempts:
            return []
        urgent = tuple(one for one in attempts if self.ledger.is_partial(one.microbatch))
        others = tuple(one for one in attempts if one not in urgent)
        return [Send(worker, self._training_lease(some, urgent=some is urgent)) for some in (urgent, others) if some]

    def _training_lease(self, attempts: tuple[Attempt, ...], *, urgent: bool) -> Lease:
        reasons = {attempt: self.ledger.reason_to_drop(attempt.microbatch) for attempt in attempts}
        return Lease(
            job=self._job,
            kind=LeaseKind.TRAIN,
            attempts=tuple(attempt for attempt, reason in reasons.items() if not reason),
            drops=tuple(
                DroppedAttempt(attempt=attempt, reason=reason) for attempt, reason in reasons.items() if reason
            ),
            urgent=urgent,
        )

    def _watch(self, closed: AttemptClosed) -> None:
        """Have the guard judge a loss, and remember what to keep in case that it trips."""
        if self._guard is None or self.stopping:
            return
        update = self.plan.update_of(self.ledger.num_closed - 1)
        loss = math.nan if closed.loss is None else closed.loss
        found = self._guard.add(update, loss, closed.attempt.microbatch.num_samples)
        self.divergence = self.divergence or found
        if self._train.on_divergence == "rollback":
            self.cuts.pin(self._guard.good_version(update))

    def _count_drop(self, microbatch: Microbatch, reason: str) -> None:
        """Say what is given up; too much of one epoch is no accident any more."""
        self._journal("warning", f"samples {microbatch} are dropped: {reason}")
        share, total = self._train.max_dropped, self.plan.num_samples
        dropped, most = self.ledger.samples_given_up(microbatch.epoch), int(share * total)
        if dropped > most:
            self.failure = (
                f"{dropped} of the {total} samples of epoch {microbatch.epoch} had to be dropped, and train.max_dropped "
                f"({share:g}) allows {most}; the last ones are {microbatch}: {reason}"
            )

    def _end_round(self, now: float) -> list[Effect]:
        assert self.round is not None
        evaluation = Evaluation(version=self.round.version, seconds=now - self.round.began, means=self.round.result())
        self.evaluations.append(evaluation)
        self._evaluated = evaluation.version
        self.clock.pause(evaluation.seconds)
        means = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.means.items())
        level = "info" if all(map(math.isfinite, evaluation.means.values())) else "warning"
        self._journal(level, f"evaluation of version {evaluation.version}: {means}", **evaluation.to_json())
        self.round = None
        return []

    def _release(self) -> list[Effect]:
        """Let the shards free the copies that no evaluation needs."""
        wanted = [*self._due, *([self.round.version] if self.round is not None else [])]
        free = [version for version in self._taken if not wanted or version < min(wanted)]
        newest = max(free, default=0)
        if newest <= self._released:
            return []
        self._released = newest
        self._taken = [newest, *(version for version in self._taken if version > newest)]
        return [Send(shard, ReleaseCut(job=self._job, version=newest)) for shard in self._shards]

    def _is_due(self, version: int) -> bool:
        if not self._num_validation or (self.stopping and self.final < self.plan.num_updates):
            return False
        if version <= self._evaluated:
            return False
        if version == self.plan.num_updates:
            return True
        before = max([self._evaluated, *self._due, self.round.version if self.round is not None else 0])
        return self._every is not None and version // self._every > before // self._every

    def _look_at_last_cut(self) -> None:
        """Without it the run has not ended well, though all is applied."""
        if self.ledger.complete and (reason := self.cuts.given_up(self.final)) is not None:
            self.failure = f"the last cut, at version {self.final}, is not durable: {reason}; {self.commits.newest()}"

    def _all_reported(self) -> bool:
        return len(self.reports) == len(self._shards) and all(layer.version >= self.final for layer in self.layers())
