"""The role of a forward worker: leases microbatches, has them loaded, streams them through the first shard.

The shell (real or simulated) calls, always from one thread:

    effects = role.on_message(peer, message, now)       # everything but Welcome
    effects = role.on_lost(peer, now) / role.on_tick(now)
    for request in role.take_requests(): ...            # after every call above: work for the shell
        Prepare(assignment)         -> on_prepared(job, window, now) or on_prepare_failed(job, sentence, now)
        Load(job, attempt)          -> on_loaded(job, attempt, inputs, targets, now) or on_load_failed(job, attempt, sentence, now)
        LoadEvaluation(job, version, samples)
                                    -> on_evaluation_loaded(job, version, samples, inputs, targets, now)
                                       or on_evaluation_load_failed(job, sentence, now)
        Forget(job)                 # the job is left: drop its data; answers that still come are ignored

The worker keeps nothing that can't be lost.
"""

from __future__ import annotations

import logging

from layerwise.ids import COORDINATOR, Attempt, Microbatch
from layerwise.messages import (
    MAX_OFFERED_BYTES,
    Assignment,
    Closed,
    Decline,
    Evaluated,
    Failure,
    Grant,
    Hosting,
    Lease,
    Message,
    Recall,
    Reroute,
    Samples,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Disconnect, Effect, Send
from layerwise.worker.forward_job import ForwardJob
from layerwise.worker.forward_requests import Forget, Prepare, Request
from layerwise.worker.lease_room import PREFETCH

log = logging.getLogger(__name__)


class ForwardRole:
    """One forward worker, for any number of jobs. Pure: see the module's docstring for who calls what.

    Tensors of up to ``offered_bytes`` go along with the offer (-1: none ever do).
    """

    def __init__(
        self, *, coordinator: str = COORDINATOR, prefetch: int = PREFETCH, offered_bytes: int = MAX_OFFERED_BYTES
    ) -> None:
        self._coordinator = coordinator
        self._prefetch = prefetch
        self._offered_bytes = offered_bytes
        self._jobs: dict[str, ForwardJob] = {}
        self._requests: list[Request] = []

    @property
    def hosting(self) -> tuple[Hosting, ...]:
        """The jobs that this worker works for, and goes on with should the coordinator be away for a while."""
        return tuple(
            Hosting(job=job.job, block=-1, life=0, generation=job.assignment.generation) for job in self._jobs.values()
        )

    @property
    def num_leases(self) -> int:
        """Leases held, in all jobs."""
        return sum(job.num_leases for job in self._jobs.values())

    def take_requests(self) -> list[Request]:
        """What the shell has to do since the last call."""
        requests = self._requests.copy()
        self._requests.clear()
        return requests

    # Events ----------------------------------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message arrived from the coordinator or from a job's first shard."""
        if isinstance(message, Assignment) and peer == self._coordinator:
            return self._on_assignment(message)
        job = self._jobs.get(getattr(message, "job", ""))
        if isinstance(message, Unassign) and peer == self._coordinator:
            return self._on_unassign(message)
        if isinstance(message, Reroute) and peer == self._coordinator:
            return self._on_reroute(message, now)
        if job is None:
            return []
        if peer == self._coordinator:
            match message:
                case Lease():
                    return job.on_lease(message)
                case Recall():
                    return job.on_recall()
        elif peer == job.first.shard:
            life = job.first.life
            if getattr(message, "life", life) != life:
                log.warning("%s from %s refused: it is not from life %d", type(message).__name__, peer, life)
                return []
            match message:
                case Grant():
                    return job.on_grant(message)
                case Decline():
                    return job.on_decline(message, now)
                case Closed():
                    return job.on_closed(message, now)
                case Evaluated():
                    return job.on_evaluated(message)
        log.warning("%s from %s refused: it has no business with this worker", type(message).__name__, peer)
        return []

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """A link is gone for good.

        If the first shard lives, it has aborted what had not arrived and goes on with the rest; the coordinator hears of both. If it does
        not, the coordinator sends a new route. Until then a new link is tried from time to time.
        """
        lost = [job for job in self._jobs.values() if job.first.shard == peer]
        return [effect for job in lost for effect in job.on_lost(now)]

    def on_tick(self, now: float) -> list[Effect]:
        """Try a new link where one was lost; ask again for leases where there is room for more."""
        return [effect for job in self._jobs.values() for effect in job.on_tick(now)]

    def on_prepared(self, job: str, window: int, now: float, *, ordered: bool = False) -> list[Effect]:
        """The job's data is there; at most ``window`` microbatches of the job are in flight.

        ``ordered``: they are admitted in position order, so none are leased ahead: another worker's might come first.
        """
        state = self._jobs.get(job)
        return [] if state is None else state.on_prepared(window, now, ordered=ordered)

    def on_prepare_failed(self, job: str, sentence: str, now: float) -> list[Effect]:
        """The job's data can't be had."""
        return [Send(self._coordinator, Failure(job=job, message=sentence))] if job in self._jobs else []

    def on_loaded(self, job: str, attempt: Attempt, inputs: Tensors, targets: Tensors, now: float) -> list[Effect]:
        """The samples of ``attempt`` are there."""
        state = self._jobs.get(job)
        return [] if state is None else state.on_loaded(attempt, Samples(inputs=inputs, targets=targets))

    def on_load_failed(self, job: str, attempt: Attempt, sentence: str, now: float) -> list[Effect]:
        """The samples of ``attempt`` can't be loaded."""
        state = self._jobs.get(job)
        return [] if state is None else state.on_load_failed(attempt, sentence)

    def on_evaluation_loaded(
        self, job: str, version: int, samples: Microbatch, inputs: Tensors, targets: Tensors, now: float
    ) -> list[Effect]:
        """Validation samples are there: send them through the cut."""
        state = self._jobs.get(job)
        return [] if state is None else state.on_evaluation_loaded(version, samples, inputs, targets)

    def on_evaluation_load_failed(self, job: str, sentence: str, now: float) -> list[Effect]:
        """Validation samples can't be loaded: the job can't be evaluated."""
        return [Send(self._coordinator, Failure(job=job, message=sentence))] if job in self._jobs else []

    def describe(self) -> str:
        """The state in one line, for logs and for the simulated world's watchdog."""
        return "; ".join(job.describe() for job in self._jobs.values()) or "idle"

    # Inside ----------------------------------------------------------------------------------------------------------

    def _on_assignment(self, message: Assignment) -> list[Effect]:
        effects = self._leave(message.job)
        self._jobs[message.job] = ForwardJob(
            message,
            coordinator=self._coordinator,
            prefetch=self._prefetch,
            offered_bytes=self._offered_bytes,
            request=self._requests.append,
        )
        self._requests.append(Prepare(assignment=message))
        return effects

    def _leave(self, job: str) -> list[Effect]:
        """Forget a job, and let go of its first shard: with the link ends what was offered on it."""
        state = self._jobs.pop(job, None)
        if state is None:
            return []
        self._requests.append(Forget(job=job))
        shard = state.first.shard
        return [] if any(one.first.shard == shard for one in self._jobs.values()) else [Disconnect(shard)]

    def _on_reroute(self, message: Reroute, now: float) -> list[Effect]:
        job = self._jobs.get(message.job)
        if job is None or message.generation <= job.assignment.generation:
            return []
        if len(message.route) != len(job.assignment.route):
            log.warning("a route over %d blocks refused: there are %d", len(message.route), len(job.assignment.route))
            return []
        before = job.first.shard
        effects = job.begin_anew(message, now)
        return [Disconnect(before), *effects] if before != job.first.shard else effects

    def _on_unassign(self, message: Unassign) -> list[Effect]:
        return [*self._leave(message.job), Send(self._coordinator, Unassigned(job=message.job))]
