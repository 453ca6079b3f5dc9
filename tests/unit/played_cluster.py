"""A cluster for tests of the coordinator's role: processes that play by the book, without layers, network or clock."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt
from layerwise.messages import (
    Assignment,
    AttemptClosed,
    AttemptsClosed,
    BlockReport,
    CommitCut,
    CutCommitted,
    CutDurable,
    CutSaved,
    CutTaken,
    Evaluated,
    Hello,
    LayerFile,
    LayerReport,
    Lease,
    LeaseKind,
    LeaseRequest,
    Message,
    Metric,
    Outcome,
    Probe,
    Probed,
    Ready,
    Role,
    StartTraining,
    Stop,
    Stopping,
    Unassign,
    Unassigned,
)
from layerwise.plan import TrainingPlan
from layerwise.profile import LayerProfile, Profile
from layerwise.roles import Disconnect, Effect, Send
from layerwise.server.coordinator_role import CoordinatorRole
from layerwise.server.memory_store import JobStore, MemoryJobStore
from layerwise.settings import ResolvedSettings

NUM_LAYERS = 4
TRAIN_SAMPLES, VALIDATION_SAMPLES = 40, 10


def profile() -> Profile:
    layers = tuple(
        LayerProfile(
            index=index,
            name=f"layer-{index}",
            parameters=10,
            trainable=10,
            parameter_bytes=40,
            state_bytes=80,
            forward_seconds=0.001,
            backward_seconds=0.002,
            activation_bytes=64,
            output_bytes=32,
            output_shapes=((4, 2),),
        )
        for index in range(NUM_LAYERS)
    )
    return Profile(
        layers=layers,
        num_train_samples=TRAIN_SAMPLES,
        num_validation_samples=VALIDATION_SAMPLES,
        microbatch_samples=2,
        input_bytes=16,
    )


def spec(**changes: Any) -> str:
    """A job of 10 updates, a cut every 4."""
    job: dict[str, Any] = {
        "name": "toy",
        "model": "mlp",
        "data": {"name": "digits", "batch": 8},
        "train": {"steps": 10},
        "cluster": {"shards": 2, "forward": 1},
        "checkpoint": {"every": 4, "keep": 2, "path": "runs/toy"},
    }
    for key, value in changes.items():
        known = job.get(key)
        job[key] = {**known, **value} if isinstance(value, Mapping) and isinstance(known, Mapping) else value
    return json.dumps(job)


@dataclass
class PlayedJob:
    """What the shards of a job know."""

    assignment: Assignment
    plan: TrainingPlan
    every: int | None
    done: AppliedSet = field(default_factory=AppliedSet)
    version: int = 0
    final: int = 0
    cut: set[int] = field(default_factory=set)
    number: int = 0


class PlayedCluster:
    """Carries out the role's effects at once and in order.

    ``hold`` keeps back leases that it says yes to; `play_held` lets them go on. ``refuse_save`` names the error of a
    block's cut.
    """

    def __init__(self, store: JobStore | None = None) -> None:
        self.now = 1000.0
        self.store = store if store is not None else MemoryJobStore()
        self.role = CoordinatorRole(self.store, now=self.now)
        self.roles: dict[str, Role] = {}
        self.jobs: dict[str, PlayedJob] = {}
        self.sent: list[tuple[str, Message]] = []
        self.leases: list[tuple[str, Attempt]] = []
        self.hold: Callable[[str, Lease], bool] = lambda worker, lease: False
        self.held: list[tuple[str, Lease]] = []
        self.refuse_save: Callable[[int, int], str] = lambda block, version: ""
        self.probe_error = ""
        self.silent: set[str] = set()
        self._inbox: deque[tuple[str, Message]] = deque()
        self._saved: dict[str, dict[int, AppliedSet]] = {}

    def add(self, role: Role, *names: str, device: str = "cpu", imports: tuple[str, ...] = ()) -> None:
        for name in names:
            self.roles[name] = role
            hello = Hello(
                role=role,
                name=name,
                address=f"unix:/{name}",
                device=device,
                host="here",
                pid=1,
                version="1",
                allowed_imports=imports,
            )
            self.say(name, hello)

    def submit(self, text: str | None = None) -> str:
        document, effects = self.role.submit(text or spec(), self.now)
        self.perform(effects)
        self.run()
        return str(document["job"])

    def resume(self, job: str) -> None:
        _, effects = self.role.resume(job, self.now)
        self.perform(effects)
        self.run()

    def cancel(self, job: str) -> None:
        _, effects = self.role.cancel(job, self.now)
        self.perform(effects)
        self.run()

    def say(self, name: str, message: Message) -> None:
        self._inbox.append((name, message))
        self.run()

    def kill(self, name: str) -> None:
        del self.roles[name]
        self.held = [(worker, lease) for worker, lease in self.held if worker != name]
        self.perform(self.role.on_lost(name, self.now))
        self.run()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.role.on_tick(self.now))
        self.run()

    def play_held(self) -> None:
        held, self.held = self.held, []
        for worker, lease in held:
            self._on_lease(worker, lease)
        self.run()

    def run(self) -> None:
        while self._inbox:
            name, message = self._inbox.popleft()
            if name in self.roles:
                self.perform(self.role.on_message(name, message, self.now))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and effect.peer in self.roles:
                self.sent.append((effect.peer, effect.message))
                if effect.peer not in self.silent:
                    self._play(effect.peer, effect.message)
            elif isinstance(effect, Disconnect):
                self.roles.pop(effect.peer, None)

    def state(self, job: str) -> str:
        return str(self.role.job(job)["state"])

    # What the processes do -------------------------------------------------------------------------------------------

    def _answer(self, name: str, message: Message) -> None:
        self._inbox.append((name, message))

    def _play(self, name: str, message: Message) -> None:
        match message:
            case Probe():
                text = "" if self.probe_error else profile().to_json()
                self._answer(name, Probed(job=message.job, profile_json=text, error=self.probe_error))
            case Assignment():
                self._on_assignment(name, message)
            case StartTraining():
                self.jobs[message.job].done = AppliedSet.from_json(json.loads(message.done_json))
            case Lease():
                if self.hold(name, message):
                    self.held.append((name, message))
                else:
                    self._on_lease(name, message)
            case CommitCut():
                self._answer(name, CutCommitted(job=message.job, version=message.version))
            case Stop():
                self._on_stop(name, message.job)
            case Unassign():
                self._answer(name, Unassigned(job=message.job))
            case CutDurable():
                pass

    def _on_assignment(self, name: str, message: Assignment) -> None:
        settings = ResolvedSettings.from_json(message.settings_json)
        if self.roles[name] is Role.FORWARD:
            self._answer(name, Ready(job=message.job, block=-1, generation=message.generation))
            self._answer(name, LeaseRequest(job=message.job, count=3))
            return
        if self.roles[name] is Role.BACKWARD:
            self._answer(name, Ready(job=message.job, block=message.block, generation=message.generation))
            return
        if message.block == 0:
            every = json.loads(message.spec_json)["checkpoint"]["every"]
            self.jobs[message.job] = PlayedJob(
                message, settings.plan, every, version=message.cut, final=settings.plan.num_updates
            )
        place = message.route[message.block]
        saved = self._saved.get(message.job, {}).get(message.cut, AppliedSet())
        applied = tuple(json.dumps(saved.to_json()) for _ in range(place.start, place.stop))
        self._answer(name, Ready(job=message.job, block=message.block, generation=message.generation, applied_json=applied, version=message.cut))

    def _on_lease(self, worker: str, lease: Lease) -> None:
        if lease.kind is LeaseKind.EVALUATE:
            for one in lease.ranges:
                metrics = (Metric(name="accuracy", total=one.num_samples / 2, count=one.num_samples),)
                loss = Metric(name="loss", total=0.25 * one.num_samples, count=one.num_samples)
                answer = Evaluated(
                    job=lease.job,
                    version=lease.version,
                    start=one.start,
                    stop=one.stop,
                    life=1,
                    loss=loss,
                    metrics=metrics,
                )
                self._answer(worker, answer)
            return
        for attempt in lease.attempts:
            self.leases.append((worker, attempt))
            self.close(lease.job, attempt)

    def close(self, job_id: str, attempt: Attempt, outcome: Outcome = Outcome.APPLIED) -> None:
        job = self.jobs[job_id]
        job.number += 1
        if outcome is not Outcome.ABORTED:
            job.done.add(job.plan.index(attempt.microbatch), dropped=outcome is Outcome.DROPPED)
        closed = AttemptClosed(attempt=attempt, number=job.number, outcome=outcome, loss=1.0)
        report = AttemptsClosed(job=job_id, closed=(closed,), active_seconds=float(job.number))
        self._answer(job.assignment.route[0].shard, report)
        while job.version < job.final and len(job.done) >= job.plan.gradients_before(job.version + 1):
            job.version += 1
            if job.version == job.final or (job.every and job.version % job.every == 0):
                self._cut(job_id, job)

    def _on_stop(self, name: str, job_id: str) -> None:
        job = self.jobs[job_id]
        job.final = min(job.plan.update_of(len(job.done)) + 1, job.final)
        self._answer(name, Stopping(job=job_id, version=job.final))

    def _cut(self, job_id: str, job: PlayedJob) -> None:
        version = job.version
        self._saved.setdefault(job_id, {})[version] = job.done.copy()
        for block, place in enumerate(job.assignment.route):
            self._answer(place.shard, CutTaken(job=job_id, block=block, version=version))
            error = self.refuse_save(block, version)
            files = tuple(
                LayerFile(layer=layer, life=place.life, name=f"layer-{layer}", num_bytes=100, digest="d")
                for layer in range(place.start, place.stop)
            )
            saved = CutSaved(job=job_id, block=block, version=version, files=() if error else files, error=error)
            self._answer(place.shard, saved)
            layers = tuple(
                LayerReport(
                    layer=layer,
                    life=place.life,
                    version=version,
                    revision=version,
                    staleness=(3, 1),
                    misalignment=(4,),
                    learning_rate=0.5,
                )
                for layer in range(place.start, place.stop)
            )
            self._answer(
                place.shard,
                BlockReport(
                    job=job_id,
                    block=block,
                    layers=layers,
                    open_attempts=0,
                    store_bytes=7,
                    forward_queue=1,
                    backward_queue=2,
                    compute_seconds=0.5,
                    log_bytes=9,
                ),
            )
