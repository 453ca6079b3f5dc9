"""What a forward worker has of one job: its leases and evaluations, its link to the first shard, and what each event means for them.

At most ``window + prefetch`` microbatches are loaded or on their way. Beyond them leases are held for the next seconds of training,
so that it goes on while the coordinator is started again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Assignment,
    BlockPlace,
    Closed,
    Decline,
    Evaluated,
    EvaluateForward,
    Forward,
    Grant,
    Lease,
    LeaseKind,
    LeaseRequest,
    LeaseReturn,
    Offer,
    Ready,
    Reroute,
    Samples,
    Tensors,
)
from layerwise.roles import Connect, Effect, Send
from layerwise.worker.forward_evaluations import ForwardEvaluations
from layerwise.worker.forward_leases import ForwardLeases
from layerwise.worker.forward_requests import Load, LoadEvaluation
from layerwise.worker.lease_room import LeaseRoom

ASK_SECONDS = 1.0
ASK_AGAIN_SECONDS = 0.1
RETRY_SECONDS = 1.0
"""How long after a lost link to a first shard a new one is tried."""

log = logging.getLogger(__name__)


class ForwardJob:
    """One forward worker's part in one job. Events in, effects out; called by `ForwardRole` only.

    Tensors of up to ``offered_bytes`` go along with the offer (-1: none ever do). ``request`` takes what the shell has to load.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        coordinator: str,
        prefetch: int,
        offered_bytes: int,
        request: Callable[[Load | LoadEvaluation], None],
    ) -> None:
        self.job = assignment.job
        self.assignment = assignment
        """With the newest route."""
        self._coordinator = coordinator
        self._offered_bytes = offered_bytes
        self._request = request
        self._room = LeaseRoom(prefetch)
        self._connected = True
        self._retry_at = 0.0
        self._stopping = False
        self._asked_at = 0.0
        self._leases = ForwardLeases()
        self._evaluations = ForwardEvaluations()

    @property
    def first(self) -> BlockPlace:
        """The route's first shard, its address and its life."""
        return self.assignment.route[0]

    @property
    def num_leases(self) -> int:
        """Leases held, for now and for later."""
        return len(self._leases)

    def describe(self) -> str:
        """What is held and what is evaluated, in one line."""
        leases, evaluating = self._leases.describe(), self._evaluations.under_way
        return f"{self.job}: {leases} of {self._room.size}, evaluating {evaluating}"

    # The route -------------------------------------------------------------------------------------------------------

    def on_prepared(self, window: int, now: float, *, ordered: bool) -> list[Effect]:
        """The job's data are there; see `ForwardRole.on_prepared`. A repeat changes nothing."""
        if self._room.capacity:
            return []
        self._room.open(window, ordered=ordered)
        self._load_next()
        self._load_evaluations()
        return self._present(now)

    def begin_anew(self, message: Reroute, now: float) -> list[Effect]:
        """The route has changed: nothing of the one before counts any more; the data stay."""
        self.assignment = replace(self.assignment, route=message.route, generation=message.generation)
        self._connected = True
        self._stopping = False
        self._leases = ForwardLeases()
        self._evaluations = ForwardEvaluations()
        return self._present(now) if self._room.capacity else []  # it says so once its data are there

    def _present(self, now: float) -> list[Effect]:
        ready = Ready(job=self.job, block=-1, generation=self.assignment.generation)
        return [Connect(self.first.shard, self.first.address), Send(self._coordinator, ready), *self._ask(now)]

    def on_lost(self, now: float) -> list[Effect]:
        """The link to the first shard is gone for good: what was sent is left to the shard, the rest waits for the next link."""
        self._connected, self._retry_at = False, now + RETRY_SECONDS
        self._evaluations.begin_again()
        return [self._give_back(attempt, "open") for attempt in self._leases.lose_link()]

    def on_tick(self, now: float) -> list[Effect]:
        """Try a new link where it was lost; ask again for leases where there is room for more."""
        effects: list[Effect] = []
        if not self._connected and now >= self._retry_at:
            self._connected = True
            effects += [Connect(self.first.shard, self.first.address), *self._offer()]
            self._load_evaluations()
        if now - self._asked_at >= ASK_SECONDS:
            effects += self._ask(now)
        return effects

    # Leases ----------------------------------------------------------------------------------------------------------

    def on_lease(self, message: Lease) -> list[Effect]:
        """The coordinator leases microbatches, or ranges of validation samples."""
        if message.kind is LeaseKind.EVALUATE:
            self._evaluations.lease(message.version, message.ranges)
            self._load_evaluations()
            return []
        self._leases.add(message)
        self._load_next()
        return self._offer()

    def on_recall(self) -> list[Effect]:
        """Give back what is not even being loaded: the coordinator waits for what is leased to close."""
        return [self._give_back(attempt, "recalled") for attempt in self._leases.recall()]

    def on_loaded(self, attempt: Attempt, samples: Samples) -> list[Effect]:
        """The samples of ``attempt`` are there."""
        if not self._leases.loaded(attempt, samples):
            return []
        grant = self._leases.grant_of(attempt)
        effects = self._offer() if grant is None else self.on_grant(grant)
        self._load_next()
        return effects

    def on_load_failed(self, attempt: Attempt, sentence: str) -> list[Effect]:
        """The samples of ``attempt`` can't be loaded."""
        if not self._leases.end(attempt):
            return []
        self._load_next()
        return [self._give_back(attempt, f"load-failed: {sentence}"), *self._offer()]

    def on_grant(self, message: Grant) -> list[Effect]:
        """The first shard takes a microbatch: its samples follow, unless they came with the offer."""
        if message.arrived:
            self._leases.arrive(message.attempt)
            return self._offer()
        if self._leases.reclaim(message.attempt):
            self._load(message.attempt)
        if self._leases.await_samples(message):
            return []
        samples = self._leases.send(message.attempt)
        if samples is None:
            # Left to the shard's time limit: it aborts what does not arrive.
            log.warning("grant of %s refused: it is not leased here, or was sent already", message.attempt)
            return []
        forward = Forward(
            job=self.job,
            attempt=message.attempt,
            number=message.number,
            life=self.first.life,
            needed_from=self.assignment.route[-1].stop,
            inputs=samples.inputs,
            targets=samples.targets,
            dropped=samples.dropped,
        )
        return [Send(self.first.shard, forward), *self._offer()]

    def on_decline(self, message: Decline, now: float) -> list[Effect]:
        """The first shard does not take a microbatch."""
        if not self._leases.end(message.attempt):
            return []
        self._stopping = self._stopping or message.reason == "stopping"
        self._load_next()
        return [self._give_back(message.attempt, message.reason), *self._offer(), *self._ask(now)]

    def on_closed(self, message: Closed, now: float) -> list[Effect]:
        """A microbatch is through, or given up."""
        self._room.count(now)
        if not self._leases.end(message.attempt):
            return []
        self._load_next()
        return [*self._offer(), *self._ask(now)]

    def _give_back(self, attempt: Attempt, reason: str) -> Send:
        return Send(self._coordinator, LeaseReturn(job=self.job, attempt=attempt, reason=reason))

    def _load_next(self) -> None:
        for attempt in self._leases.load(self._room.capacity):
            self._load(attempt)

    def _load(self, attempt: Attempt) -> None:
        self._request(Load(job=self.job, attempt=attempt))

    def _offer(self) -> list[Effect]:
        turn = self._leases.offer() if self._connected else None
        if turn is None:
            return []
        attempt, samples = turn
        small = samples.num_bytes <= self._offered_bytes
        offer = Offer(job=self.job, attempt=attempt, life=self.first.life, samples=samples if small else None)
        return [Send(self.first.shard, offer)]

    def _ask(self, now: float) -> list[Effect]:
        room = self._room.size
        if not self._room.capacity or self._stopping or len(self._leases) >= room:
            return []
        if self._leases.num_later and now - self._asked_at < ASK_AGAIN_SECONDS:
            return []  # there is plenty: one question is enough for many leases
        self._asked_at = now
        return [Send(self._coordinator, LeaseRequest(job=self.job, count=room))]

    # Evaluations -----------------------------------------------------------------------------------------------------

    def on_evaluation_loaded(
        self, version: int, samples: Microbatch, inputs: Tensors, targets: Tensors
    ) -> list[Effect]:
        """Validation samples are there: send them through the cut."""
        if not self._connected or not self._evaluations.is_wanted(version, samples):
            return []
        forward = EvaluateForward(
            job=self.job,
            version=version,
            start=samples.start,
            stop=samples.stop,
            life=self.first.life,
            inputs=inputs,
            targets=targets,
        )
        return [Send(self.first.shard, forward)]

    def on_evaluated(self, message: Evaluated) -> list[Effect]:
        """Validation samples are through: hand the answer on to the coordinator."""
        if not self._evaluations.end(message.version, message.start):
            return []
        self._load_evaluations()
        return [Send(self._coordinator, message)]

    def _load_evaluations(self) -> None:
        if not self._room.capacity or not self._connected:
            return  # the data are not there yet, or nothing can be sent
        for samples in self._evaluations.begin():
            self._request(LoadEvaluation(job=self.job, version=self._evaluations.version, samples=samples))
