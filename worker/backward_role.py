"""The role of a detached backward worker: pulls one backward pass at a time, pushes a gradient for every layer.

The shell (real or simulated) calls, always from one thread:

    effects = role.on_message(peer, message, now)       # everything but Welcome
    effects = role.on_lost(peer, now) / role.on_tick(now)
    for request in role.take_requests(): ...            # after every call above: work for the shell
        Build(assignment)           -> on_built(job, now) or on_build_failed(job, sentence, now)
        Execute(job, task)          -> on_gradient(job, push, now) for each lacking layer, last to first, as soon as it exists;
                                       then on_executed(job, finished, now); or on_execute_failed(job, task, sentence, now)
        Leave(job)                  # the job is left: drop its layers; answers that still come are ignored

The shell keeps the tensors of the states that came with tasks (the newest of each layer); the role only names them when it asks for the next.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from layerwise.ids import COORDINATOR
from layerwise.messages import (
    Assignment,
    BlockPlace,
    DetachedTask,
    Failure,
    Hosting,
    LayerRevision,
    Message,
    PushGradient,
    Ready,
    Reroute,
    TaskFinished,
    TaskRequest,
    Unassign,
    Unassigned,
)
from layerwise.roles import Connect, Disconnect, Effect, Send

ASK_SECONDS = 1.0
"""How often an idle worker asks again: its shard may not have known the job yet. A repeat changes nothing there."""
RETRY_SECONDS = 1.0
"""How long after a lost link to its shard a new one is tried."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Build the block's layers."""

    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Execute:
    """Recompute the block's forward pass and walk it back."""

    job: str
    task: DetachedTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The job is over for this worker."""

    job: str


Request = Build | Execute | Leave


@dataclass(slots=True)
class _Job:
    assignment: Assignment
    connected: bool = True
    retry_at: float = 0.0
    built: bool = False
    asked_at: float = 0.0
    task: DetachedTask | None = None
    have: dict[int, LayerRevision] = field(default_factory=dict)

    @property
    def place(self) -> BlockPlace:
        return self.assignment.route[self.assignment.block]


class BackwardRole:
    """One detached backward worker, for any number of jobs. Pure: see the module's docstring for who calls what."""

    def __init__(self, *, coordinator: str = COORDINATOR) -> None:
        self._coordinator = coordinator
        self._jobs: dict[str, _Job] = {}
        self._requests: list[Request] = []

    @property
    def hosting(self) -> tuple[Hosting, ...]:
        """The jobs that this worker works for, and goes on with should the coordinator be away for a while."""
        return tuple(
            Hosting(
                job=job.assignment.job,
                block=job.assignment.block,
                life=job.place.life,
                generation=job.assignment.generation,
            )
            for job in self._jobs.values()
        )

    def take_requests(self) -> list[Request]:
        """What the shell has to do since the last call."""
        requests, self._requests = self._requests, []
        return requests

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message arrived from the coordinator or from the shard that the worker works for."""
        match message:
            case Assignment() if peer == self._coordinator:
                effects = self._leave(message.job)
                self._jobs[message.job] = _Job(assignment=message)
                self._requests.append(Build(assignment=message))
                return effects
            case Unassign() if peer == self._coordinator:
                return [*self._leave(message.job), Send(self._coordinator, Unassigned(job=message.job))]
            case Reroute() if peer == self._coordinator:
                return self._on_reroute(message, now)
            case DetachedTask():
                return self._on_task(peer, message)
        log.warning("%s from %s refused: it has no business with this worker", type(message).__name__, peer)
        return []

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """A link is gone for good. If the shard lives, its task is for the next worker; a new link is tried a little later."""
        for job in self._jobs.values():
            if job.place.shard == peer:
                job.connected, job.retry_at, job.task = False, now + RETRY_SECONDS, None
        return []

    def on_tick(self, now: float) -> list[Effect]:
        """Try a new link where one was lost; ask again where there is nothing to do."""
        effects: list[Effect] = []
        for state in self._jobs.values():
            if not state.connected and now >= state.retry_at:
                state.connected = True
                effects.append(Connect(state.place.shard, state.place.address))
            idle = state.built and state.connected and state.task is None
            if idle and now - state.asked_at >= ASK_SECONDS:
                effects += self._request(state, now)
        return effects

    def on_built(self, job: str, now: float) -> list[Effect]:
        """The block's layers are there."""
        state = self._jobs.get(job)
        if state is None:
            return []
        state.built = True
        return [
            Connect(state.place.shard, state.place.address),
            self._ready(state),
            *self._request(state, now),
        ]

    def on_build_failed(self, job: str, sentence: str, now: float) -> list[Effect]:
        """The block's layers can't be built."""
        return [Send(self._coordinator, Failure(job=job, message=sentence))] if job in self._jobs else []

    def on_gradient(self, job: str, push: PushGradient, now: float) -> list[Effect]:
        """One layer's gradient exists."""
        state = self._current(job, push)
        return [] if state is None else [Send(state.place.shard, push)]

    def on_executed(self, job: str, finished: TaskFinished, now: float) -> list[Effect]:
        """Every lacking layer's gradient has been given to `on_gradient`."""
        state = self._current(job, finished)
        if state is None:
            return []
        state.task = None
        return [Send(state.place.shard, finished), *self._request(state, now)]

    def on_execute_failed(self, job: str, task: DetachedTask, sentence: str, now: float) -> list[Effect]:
        """The pass raised an error; it would raise it elsewhere too."""
        if self._current(job, task) is None:
            return []
        return [Send(self._coordinator, Failure(job=job, message=sentence))]

    def describe(self) -> str:
        """The state in one line, for logs and for the simulated world's watchdog."""
        works = (f"{job.assignment.job}: {job.task.attempt if job.task else 'idle'}" for job in self._jobs.values())
        return "; ".join(works) or "no job"

    def _leave(self, job: str) -> list[Effect]:
        """Forget a job, and let go of its shard: with the link ends what the shard thinks that this worker has."""
        state = self._jobs.pop(job, None)
        if state is None:
            return []
        self._requests.append(Leave(job=job))
        shard = state.place.shard
        return [] if any(one.place.shard == shard for one in self._jobs.values()) else [Disconnect(shard)]

    def _on_reroute(self, message: Reroute, now: float) -> list[Effect]:
        state = self._jobs.get(message.job)
        if state is None or message.generation <= state.assignment.generation:
            return []
        if len(message.route) != len(state.assignment.route):
            log.warning("a route over %d blocks refused: there are %d", len(message.route), len(state.assignment.route))
            return []
        before = state.place
        state.assignment = replace(state.assignment, route=message.route, generation=message.generation)
        state.task, state.connected = None, True
        effects: list[Effect] = []
        if state.place.life != before.life:
            state.have.clear()
        if state.place.shard != before.shard:
            effects.append(Disconnect(before.shard))
        if state.built:  # else it says so once its layers are there
            effects += [Connect(state.place.shard, state.place.address), self._ready(state)]
            effects += self._request(state, now)
        return effects

    def _ready(self, state: _Job) -> Send:
        assignment = state.assignment
        ready = Ready(job=assignment.job, block=assignment.block, generation=assignment.generation)
        return Send(self._coordinator, ready)

    def _on_task(self, peer: str, task: DetachedTask) -> list[Effect]:
        job = self._jobs.get(task.job)
        if job is None or peer != job.place.shard or task.life != job.place.life:
            log.warning("task %s from %s refused: this worker does not work for that shard", task.attempt, peer)
            return []
        # A task that is still here was taken back from this worker, while it was paused: the shard wants no answer to it.
        job.task = task
        for state in task.states:
            job.have[state.layer] = LayerRevision(layer=state.layer, life=state.life, revision=state.revision)
        self._requests.append(Execute(job=task.job, task=task))
        return []

    def _current(self, job: str, message: DetachedTask | PushGradient | TaskFinished) -> _Job | None:
        """The job, if ``message`` is about the task that it works on now."""
        state = self._jobs.get(job)
        if state is None or state.task is None or not state.connected:
            return None
        same = state.task.number == message.number and state.task.life == message.life
        return state if same else None

    def _request(self, state: _Job, now: float) -> list[Effect]:
        state.asked_at = now
        have = tuple(state.have[layer] for layer in sorted(state.have))
        request = TaskRequest(job=state.assignment.job, life=state.place.life, have=have)
        return [Send(state.place.shard, request)]
