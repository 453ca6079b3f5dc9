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

At most ``window + prefetch`` microbatches are loaded or on their way. Beyond them leases are held for the next seconds of training,
so that it goes on while the coordinator is started again. The worker keeps nothing that can't be lost.

    leased ── loading ──► ready ── Offer ──► offered ── Grant ──► sent ── Closed ──► (gone)
                           ▲                   │
                           └── a lower index ──┴── Decline ──► LeaseReturn, (gone)
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from layerwise.ids import COORDINATOR, Attempt, Microbatch
from layerwise.messages import (
    MAX_OFFERED_BYTES,
    Assignment,
    Closed,
    Decline,
    Evaluated,
    EvaluateForward,
    Failure,
    Forward,
    Grant,
    Hosting,
    Lease,
    LeaseKind,
    LeaseRequest,
    LeaseReturn,
    Message,
    Offer,
    Ready,
    Recall,
    Reroute,
    Samples,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Connect, Disconnect, Effect, Send

PREFETCH = 8
"""Leases beyond the window: they cover the coordinator's answer and the loading."""
MAX_EVALUATIONS = 2
"""Evaluation microbatches on the way through the route."""
LEASE_SECONDS = 5.0
"""Leases are held for so many seconds of training ahead: the time that a coordinator may be away unnoticed."""
MAX_AHEAD = 1024
"""Leases that are held and not loaded, at most."""
ASK_SECONDS = 1.0
ASK_AGAIN_SECONDS = 0.1
RATE_SECONDS = 0.5
"""The rate of training is measured over this time."""
RETRY_SECONDS = 1.0
"""How long after a lost link to a first shard a new one is tried."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Get the job's data ready."""

    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load the samples of ``attempt``."""

    job: str
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEvaluation:
    """Load validation samples ``[samples.start, samples.stop)``."""

    job: str
    version: int
    samples: Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """The job is over for this worker."""

    job: str


Request = Prepare | Load | LoadEvaluation | Forget
_Turn = tuple[bool, Attempt]
"""Whether it may wait for what is urgent, and which it is: the lowest comes first."""


class _State(Enum):
    LOADING = auto()
    READY = auto()
    OFFERED = auto()
    SENT = auto()


@dataclass(slots=True)
class _Lease:
    urgent: bool
    state: _State = _State.LOADING
    samples: Samples | None = None
    """There while it is ready or offered."""
    granted: Grant | None = None
    """Came while the samples were loading: they follow as soon as they are there."""


@dataclass(slots=True)
class _Job:
    assignment: Assignment
    capacity: int = 0
    ahead: bool = False
    rate: float = 0.0
    closed: int = 0
    counted_at: float = 0.0
    connected: bool = True
    retry_at: float = 0.0
    stopping: bool = False
    asked_at: float = 0.0
    leases: dict[Attempt, _Lease] = field(default_factory=dict)
    held: list[_Turn] = field(default_factory=list)
    """A heap of leases for later: nothing of them is loaded."""
    drops: dict[Attempt, str] = field(default_factory=dict)
    """Leases of microbatches that are given up, and why: there is nothing to load."""
    evaluation: int = 0
    to_evaluate: deque[Microbatch] = field(default_factory=deque)
    evaluating: set[Microbatch] = field(default_factory=set)

    @property
    def job(self) -> str:
        return self.assignment.job

    @property
    def first_shard(self) -> str:
        return self.assignment.route[0].shard

    @property
    def life(self) -> int:
        return self.assignment.route[0].life

    def begin_anew(self, message: Reroute) -> None:
        """Nothing of the route before counts any more; the data stay."""
        self.assignment = replace(self.assignment, route=message.route, generation=message.generation)
        self.connected = True
        self.stopping = False
        self.leases.clear()
        self.held.clear()
        self.drops.clear()
        self.evaluation = 0
        self.to_evaluate.clear()
        self.evaluating.clear()

    @property
    def num_leases(self) -> int:
        """Leases held, for now and for later."""
        return len(self.leases) + len(self.held)

    @property
    def room(self) -> int:
        """How many leases to hold."""
        return self.capacity + (min(int(self.rate * LEASE_SECONDS), MAX_AHEAD) if self.ahead else 0)

    def count(self, now: float) -> None:
        """Another microbatch has closed: how many do so in a second?"""
        self.closed += 1
        if not self.counted_at:
            self.closed, self.counted_at = 0, now
        elif now - self.counted_at >= RATE_SECONDS:
            self.rate = self.closed / (now - self.counted_at)
            self.closed, self.counted_at = 0, now

    def turns(self, *states: _State) -> list[_Turn]:
        """Whose turn it is among the leases in these states; the first is the lowest."""
        return [(not lease.urgent, attempt) for attempt, lease in self.leases.items() if lease.state in states]

    def best_ready(self) -> Attempt | None:
        """The first microbatch that is loaded or offered."""
        return min(self.turns(_State.READY, _State.OFFERED), default=(False, None))[1]

    def offered(self) -> Attempt | None:
        """The attempt whose offer waits."""
        return next((attempt for attempt, lease in self.leases.items() if lease.state is _State.OFFERED), None)


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
        self._jobs: dict[str, _Job] = {}
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
        requests, self._requests = self._requests, []
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
                    return self._on_lease(job, message, now)
                case Recall():
                    return self._on_recall(job)
        elif peer == job.first_shard:
            if getattr(message, "life", job.life) != job.life:
                log.warning("%s from %s refused: it is not from life %d", type(message).__name__, peer, job.life)
                return []
            match message:
                case Grant():
                    return self._on_grant(job, message)
                case Decline():
                    return self._on_decline(job, message, now)
                case Closed():
                    job.count(now)
                    if job.leases.pop(message.attempt, None) is None:
                        return []
                    job.drops.pop(message.attempt, None)
                    self._load_next(job)
                    return [*self._offer(job), *self._ask(job, now)]
                case Evaluated():
                    return self._on_evaluated(job, message)
        log.warning("%s from %s refused: it has no business with this worker", type(message).__name__, peer)
        return []

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """A link is gone for good.

        If the first shard lives, it has aborted what had not arrived and goes on with the rest; the coordinator hears of both. If it does
        not, the coordinator sends a new route. Until then a new link is tried from time to time.
        """
        effects: list[Effect] = []
        for job in self._jobs.values():
            if job.first_shard != peer:
                continue
            job.connected, job.retry_at = False, now + RETRY_SECONDS
            for attempt, lease in list(job.leases.items()):
                lease.granted = None  # the number is aborted: it was given to this link
                if lease.state is _State.OFFERED:
                    lease.state = _State.READY
                elif lease.state is _State.SENT:
                    del job.leases[attempt]
                    job.drops.pop(attempt, None)
                    returned = LeaseReturn(job=job.job, attempt=attempt, reason="open")
                    effects.append(Send(self._coordinator, returned))
            job.to_evaluate.extendleft(sorted(job.evaluating, reverse=True))
            job.evaluating.clear()
        return effects

    def on_tick(self, now: float) -> list[Effect]:
        """Try a new link where one was lost; ask again for leases where there is room for more."""
        effects: list[Effect] = []
        for job in self._jobs.values():
            if not job.connected and now >= job.retry_at:
                job.connected = True
                effects += [Connect(job.first_shard, job.assignment.route[0].address), *self._offer(job)]
                self._load_evaluations(job)
            if now - job.asked_at >= ASK_SECONDS:
                effects += self._ask(job, now)
        return effects

    def on_prepared(self, job: str, window: int, now: float, *, ordered: bool = False) -> list[Effect]:
        """The job's data is there; at most ``window`` microbatches of the job are in flight.

        ``ordered``: they are admitted in position order, so none are leased ahead: another worker's might come first.
        """
        state = self._jobs.get(job)
        if state is None or state.capacity:
            return []
        state.capacity = window + self._prefetch
        state.ahead = not ordered
        first = state.assignment.route[0]
        self._load_next(state)
        self._load_evaluations(state)
        return [Connect(first.shard, first.address), self._ready(state), *self._ask(state, now)]

    def on_prepare_failed(self, job: str, sentence: str, now: float) -> list[Effect]:
        """The job's data can't be had."""
        return [Send(self._coordinator, Failure(job=job, message=sentence))] if job in self._jobs else []

    def on_loaded(self, job: str, attempt: Attempt, inputs: Tensors, targets: Tensors, now: float) -> list[Effect]:
        """The samples of ``attempt`` are there."""
        state = self._jobs.get(job)
        lease = state.leases.get(attempt) if state else None
        if state is None or lease is None or lease.state is not _State.LOADING:
            return []
        lease.state, lease.samples = _State.READY, Samples(inputs=inputs, targets=targets)
        effects = self._offer(state) if lease.granted is None else self._on_grant(state, lease.granted)
        self._load_next(state)
        return effects

    def on_load_failed(self, job: str, attempt: Attempt, sentence: str, now: float) -> list[Effect]:
        """The samples of ``attempt`` can't be loaded."""
        state = self._jobs.get(job)
        if state is None or state.leases.pop(attempt, None) is None:
            return []
        self._load_next(state)
        returned = LeaseReturn(job=job, attempt=attempt, reason=f"load-failed: {sentence}")
        return [Send(self._coordinator, returned), *self._offer(state)]

    def on_evaluation_loaded(
        self, job: str, version: int, samples: Microbatch, inputs: Tensors, targets: Tensors, now: float
    ) -> list[Effect]:
        """Validation samples are there: send them through the cut."""
        state = self._jobs.get(job)
        if state is None or version != state.evaluation or samples not in state.evaluating or not state.connected:
            return []
        forward = EvaluateForward(
            job=job,
            version=version,
            start=samples.start,
            stop=samples.stop,
            life=state.life,
            inputs=inputs,
            targets=targets,
        )
        return [Send(state.first_shard, forward)]

    def on_evaluation_load_failed(self, job: str, sentence: str, now: float) -> list[Effect]:
        """Validation samples can't be loaded: the job can't be evaluated."""
        return [Send(self._coordinator, Failure(job=job, message=sentence))] if job in self._jobs else []

    def describe(self) -> str:
        """The state in one line, for logs and for the simulated world's watchdog."""
        jobs = []
        for job in self._jobs.values():
            leases = ", ".join(f"{attempt} {lease.state.name.lower()}" for attempt, lease in job.leases.items())
            jobs.append(
                f"{job.job}: [{leases}] and {len(job.held)} for later of {job.room}, evaluating {sorted(job.evaluating)}"
            )
        return "; ".join(jobs) or "idle"

    # Inside ----------------------------------------------------------------------------------------------------------

    def _on_assignment(self, message: Assignment) -> list[Effect]:
        effects = self._leave(message.job)
        self._jobs[message.job] = _Job(assignment=message)
        self._requests.append(Prepare(assignment=message))
        return effects

    def _leave(self, job: str) -> list[Effect]:
        """Forget a job, and let go of its first shard: with the link ends what was offered on it."""
        state = self._jobs.pop(job, None)
        if state is None:
            return []
        self._requests.append(Forget(job=job))
        first = state.first_shard
        return [] if any(one.first_shard == first for one in self._jobs.values()) else [Disconnect(first)]

    def _on_reroute(self, message: Reroute, now: float) -> list[Effect]:
        job = self._jobs.get(message.job)
        if job is None or message.generation <= job.assignment.generation:
            return []
        if len(message.route) != len(job.assignment.route):
            log.warning("a route over %d blocks refused: there are %d", len(message.route), len(job.assignment.route))
            return []
        before = job.assignment.route[0]
        job.begin_anew(message)
        first = job.assignment.route[0]
        effects: list[Effect] = [Disconnect(before.shard)] if before.shard != first.shard else []
        if job.capacity:  # else it says so once its data are there
            effects += [Connect(first.shard, first.address), self._ready(job), *self._ask(job, now)]
        return effects

    def _ready(self, job: _Job) -> Send:
        return Send(self._coordinator, Ready(job=job.job, block=-1, generation=job.assignment.generation))

    def _on_unassign(self, message: Unassign) -> list[Effect]:
        return [*self._leave(message.job), Send(self._coordinator, Unassigned(job=message.job))]

    def _on_lease(self, job: _Job, message: Lease, now: float) -> list[Effect]:
        if message.kind is LeaseKind.EVALUATE:
            if message.version != job.evaluation:
                # The coordinator is done with the version before, whatever became of its last samples.
                job.evaluation = message.version
                job.to_evaluate.clear()
                job.evaluating.clear()
            job.to_evaluate.extend(message.ranges)
            self._load_evaluations(job)
            return []
        job.drops.update((one.attempt, one.reason) for one in message.drops)
        for attempt in (*message.attempts, *(one.attempt for one in message.drops)):
            if attempt not in job.leases:
                heapq.heappush(job.held, (not message.urgent, attempt))
        self._load_next(job)
        return self._offer(job)

    def _on_recall(self, job: _Job) -> list[Effect]:
        """Give back what is not even being loaded: the coordinator waits for what is leased to close."""
        held, job.held = [attempt for _, attempt in sorted(job.held)], []
        for attempt in held:
            job.drops.pop(attempt, None)
        return [
            Send(self._coordinator, LeaseReturn(job=job.job, attempt=attempt, reason="recalled")) for attempt in held
        ]

    def _load_next(self, job: _Job) -> None:
        """Load the first microbatches that are held, as far as there is room.

        A loaded one that comes later makes room: in position order it might wait for ever for one that is not even loaded.
        """
        while job.held:
            if len(job.leases) >= job.capacity:
                last = max(job.turns(_State.READY), default=job.held[0])
                if last <= job.held[0]:
                    return
                del job.leases[last[1]]
                heapq.heappush(job.held, last)
            self._load(job, heapq.heappop(job.held))

    def _load(self, job: _Job, turn: _Turn) -> None:
        late, attempt = turn
        if attempt in job.drops:
            samples = Samples(inputs=Tensors.none(), targets=Tensors.none(), dropped=job.drops[attempt])
            job.leases[attempt] = _Lease(not late, _State.READY, samples)
            return
        job.leases[attempt] = _Lease(not late)
        self._requests.append(Load(job=job.job, attempt=attempt))

    def _on_grant(self, job: _Job, message: Grant) -> list[Effect]:
        held = next((turn for turn in job.held if turn[1] == message.attempt), None)
        if held is not None:  # its offer was replaced, then it made room, and all the while this was on its way
            job.held.remove(held)
            heapq.heapify(job.held)
            if message.arrived:
                job.leases[message.attempt] = _Lease(not held[0])
            else:
                self._load(job, held)
        lease = job.leases.get(message.attempt)
        if message.arrived:
            if lease is not None:
                lease.state, lease.samples = _State.SENT, None
            return self._offer(job)
        if lease is not None and lease.state is _State.LOADING:
            lease.granted = message
            return []
        if lease is None or lease.samples is None:
            # Left to the shard's time limit: it aborts what does not arrive.
            log.warning("grant of %s refused: it is not leased here, or was sent already", message.attempt)
            return []
        forward = Forward(
            job=job.job,
            attempt=message.attempt,
            number=message.number,
            life=job.life,
            needed_from=job.assignment.route[-1].stop,
            inputs=lease.samples.inputs,
            targets=lease.samples.targets,
            dropped=lease.samples.dropped,
        )
        lease.state, lease.samples = _State.SENT, None
        return [Send(job.first_shard, forward), *self._offer(job)]

    def _on_decline(self, job: _Job, message: Decline, now: float) -> list[Effect]:
        if job.leases.pop(message.attempt, None) is None:
            return []
        job.drops.pop(message.attempt, None)
        job.stopping = job.stopping or message.reason == "stopping"
        returned = LeaseReturn(job=job.job, attempt=message.attempt, reason=message.reason)
        self._load_next(job)
        return [Send(self._coordinator, returned), *self._offer(job), *self._ask(job, now)]

    def _offer(self, job: _Job) -> list[Effect]:
        """Offer the first microbatch; it replaces a later one whose offer waits.

        In position order the shard might wait for the first one for ever otherwise.
        """
        if not job.connected:
            return []
        best, offered = job.best_ready(), job.offered()
        if best is None or best == offered:
            return []
        if offered is not None:
            job.leases[offered].state = _State.READY
        lease = job.leases[best]
        lease.state = _State.OFFERED
        samples = lease.samples
        small = samples is not None and samples.num_bytes <= self._offered_bytes
        offer = Offer(job=job.job, attempt=best, life=job.life, samples=samples if small else None)
        return [Send(job.first_shard, offer)]

    def _ask(self, job: _Job, now: float) -> list[Effect]:
        if not job.capacity or job.stopping or job.num_leases >= job.room:
            return []
        if job.held and now - job.asked_at < ASK_AGAIN_SECONDS:
            return []  # there is plenty: one question is enough for many leases
        job.asked_at = now
        return [Send(self._coordinator, LeaseRequest(job=job.job, count=job.room))]

    def _load_evaluations(self, job: _Job) -> None:
        if not job.capacity:
            return  # the data are not there yet
        while job.connected and job.to_evaluate and len(job.evaluating) < MAX_EVALUATIONS:
            samples = job.to_evaluate.popleft()
            job.evaluating.add(samples)
            self._requests.append(LoadEvaluation(job=job.job, version=job.evaluation, samples=samples))

    def _on_evaluated(self, job: _Job, message: Evaluated) -> list[Effect]:
        if message.version != job.evaluation:
            return []
        done = {samples for samples in job.evaluating if samples.start == message.start}
        job.evaluating -= done
        self._load_evaluations(job)
        return [Send(self._coordinator, message)]
