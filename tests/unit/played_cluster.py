"""A cluster for tests of the coordinator's role: processes that play by the book, without layers, network or clock."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt
from layerwise.messages import (
    Assignment,
    AttemptClosed,
    AttemptsClosed,
    BlockPlace,
    BlockReport,
    CommitCut,
    CutCommitted,
    CutDurable,
    CutSaved,
    CutTaken,
    Evaluated,
    Failure,
    Hello,
    Hosting,
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
    Reroute,
    Role,
    StandbyHeld,
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
    """What the first shard of a job knows: what was closed, what some layers have, where training ends."""

    assignment: Assignment
    plan: TrainingPlan
    every: int | None
    route: tuple[BlockPlace, ...]
    done: AppliedSet = field(default_factory=AppliedSet)
    held: AppliedSet = field(default_factory=AppliedSet)
    final: int = 0
    number: int = 0


@dataclass
class PlayedBlock:
    """What one shard process has of a job: its layers in one life, and what it has told of its cuts."""

    job: str
    block: int
    place: BlockPlace
    generation: int
    applied: AppliedSet
    version: int
    cuts: dict[int, list[Message]] = field(default_factory=dict)


class PlayedCluster:
    """Carries out the role's effects at once and in order.

    ``hold`` keeps back leases that it says yes to; `play_held` lets them go on. ``refuse_save`` names the error of a
    block's cut; shards can't restore the versions in ``damaged``. Processes in ``silent`` do nothing with what they
    are sent until `wake`.
    """

    def __init__(self, store: JobStore | None = None) -> None:
        self.now = 1000.0
        self.store = store if store is not None else MemoryJobStore()
        self.role = CoordinatorRole(self.store, now=self.now)
        self.roles: dict[str, Role] = {}
        self.jobs: dict[str, PlayedJob] = {}
        self.blocks: dict[str, PlayedBlock] = {}
        self.workers: dict[str, Hosting] = {}
        self.joins: dict[str, str | None] = {}
        self.sent: list[tuple[str, Message]] = []
        self.leases: list[tuple[str, Attempt]] = []
        self.hold: Callable[[str, Lease], bool] = lambda worker, lease: False
        self.held: list[tuple[str, Lease]] = []
        self.refuse_save: Callable[[int, int], str] = lambda block, version: ""
        self.damaged: set[int] = set()
        self.probe_error = ""
        self.silent: set[str] = set()
        self._unheard: list[tuple[str, Message]] = []
        self._inbox: deque[tuple[str, Message]] = deque()
        self._saved: dict[tuple[str, int, int], AppliedSet] = {}

    def add(
        self,
        role: Role,
        *names: str,
        device: str = "cpu",
        imports: tuple[str, ...] = (),
        join: str | None = None,
    ) -> None:
        """New processes, or new incarnations, with nothing in them."""
        for name in names:
            self._forget(name)
            self.joins[name] = join
            self._hello(role, name, device=device, imports=imports)

    def come_back(self, *names: str) -> None:
        """Processes that never ended find the coordinator (a new one, perhaps) and say what they hold."""
        for name in names:
            self._hello(self.roles[name], name, hosting=self.hosting(name))

    def hosting(self, name: str) -> tuple[Hosting, ...]:
        if (worker := self.workers.get(name)) is not None:
            return (worker,)
        if (one := self.blocks.get(name)) is not None:
            return (Hosting(job=one.job, block=one.block, life=one.place.life, generation=one.generation),)
        return ()

    def _hello(self, role: Role, name: str, **more: Any) -> None:
        # Its new link ends the one before.
        self.perform(self.role.on_lost(name, self.now))
        self.roles[name] = role
        known: dict[str, Any] = {"device": "cpu", "imports": (), "hosting": (), **more}
        hello = Hello(
            role=role,
            name=name,
            address=f"unix:/{name}",
            device=known["device"],
            host="here",
            pid=1,
            version="1",
            allowed_imports=known["imports"],
            hosting=known["hosting"],
            join=self.joins[name],
        )
        self.say(name, hello)

    def _forget(self, name: str) -> None:
        self.blocks.pop(name, None)
        self.workers.pop(name, None)
        self.held = [(worker, lease) for worker, lease in self.held if worker != name]
        self._unheard = [(peer, message) for peer, message in self._unheard if peer != name]

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
        self._forget(name)
        self.perform(self.role.on_lost(name, self.now))
        self.run()

    def wake(self, *names: str) -> None:
        """Silent processes act on what they have been sent meanwhile."""
        self.silent.difference_update(names)
        unheard, self._unheard = self._unheard, []
        for name, message in unheard:
            if name in names:
                self._play(name, message)
            else:
                self._unheard.append((name, message))
        self.run()

    def restart_coordinator(self) -> None:
        """The coordinator ends and is started again from its store. The processes go on; none has found it yet."""
        self._inbox.clear()
        self.role = CoordinatorRole(self.store, now=self.now)

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
                if effect.peer in self.silent:
                    self._unheard.append((effect.peer, effect.message))
                else:
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
            case Reroute():
                self._on_reroute(name, message)
            case StartTraining():
                job = self.jobs[message.job]
                job.done = AppliedSet.from_json(json.loads(message.done_json))
                job.held = AppliedSet.from_json(json.loads(message.held_json))
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
                self._forget(name)
                self._answer(name, Unassigned(job=message.job))
            case CutDurable():
                pass

    def _on_assignment(self, name: str, message: Assignment) -> None:
        self._forget(name)
        if self.roles[name] is not Role.SHARD:
            life = message.route[message.block].life if self.roles[name] is Role.BACKWARD else 0
            self.workers[name] = Hosting(job=message.job, block=message.block, life=life, generation=message.generation)
            self._ready_to_work(name)
            return
        if message.cut in self.damaged:
            sentence = f"the file of a layer in the cut at version {message.cut} is torn."
            self._answer(name, Failure(job=message.job, message=sentence, cut=message.cut))
            return
        if message.block == 0:
            plan = ResolvedSettings.from_json(message.settings_json).plan
            every = json.loads(message.spec_json)["checkpoint"]["every"]
            self.jobs[message.job] = PlayedJob(message, plan, every, message.route, final=plan.num_updates)
        saved = self._saved.get((message.job, message.cut, message.block), AppliedSet())
        self.blocks[name] = PlayedBlock(
            job=message.job,
            block=message.block,
            place=message.route[message.block],
            generation=message.generation,
            applied=saved.copy(),
            version=message.cut,
        )
        if message.cut:
            taken = CutTaken(job=message.job, block=message.block, version=message.cut)
            self.blocks[name].cuts[message.cut] = [taken]
            self._answer(name, taken)
        self._say_ready(name, message.cut)

    def _on_reroute(self, name: str, message: Reroute) -> None:
        if name in self.workers:
            self.held = [(worker, lease) for worker, lease in self.held if worker != name]
            self.workers[name] = replace(self.workers[name], generation=message.generation)
            self._ready_to_work(name)
            return
        one = self.blocks[name]
        one.generation = message.generation
        if one.block == 0:
            self.jobs[message.job].route = message.route
        for version in sorted(one.cuts):
            if version >= message.durable:
                for told in one.cuts[version]:
                    self._answer(name, told)
        self._say_ready(name, 0)

    def _ready_to_work(self, name: str) -> None:
        worker = self.workers[name]
        self._answer(name, Ready(job=worker.job, block=worker.block, generation=worker.generation))
        if self.roles[name] is Role.FORWARD:
            self._answer(name, LeaseRequest(job=worker.job, count=3))

    def _say_ready(self, name: str, version: int) -> None:
        one = self.blocks[name]
        applied = tuple(json.dumps(one.applied.to_json()) for _ in range(one.place.start, one.place.stop))
        ready = Ready(job=one.job, block=one.block, generation=one.generation, applied_json=applied, version=version)
        self._answer(name, ready)

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
        """A microbatch goes through all blocks; through none while one of them is gone."""
        job = self.jobs[job_id]
        index = job.plan.index(attempt.microbatch)
        if any(place.shard not in self.blocks for place in job.route):
            return
        job.number += 1
        dropped = outcome is Outcome.DROPPED
        if outcome is not Outcome.ABORTED:
            job.done.add(index, dropped=dropped)
            job.held.add(index, dropped=dropped)
        closed = AttemptClosed(attempt=attempt, number=job.number, outcome=outcome, loss=1.0)
        report = AttemptsClosed(job=job_id, closed=(closed,), active_seconds=float(job.number))
        self._answer(job.route[0].shard, report)
        if outcome is not Outcome.ABORTED:
            for place in job.route:
                self.apply(place.shard, attempt, dropped=dropped)

    def apply(self, name: str, attempt: Attempt, *, dropped: bool = False) -> None:
        """The layers of one block take a microbatch in; those that have it already do not."""
        one = self.blocks[name]
        job = self.jobs[one.job]
        one.applied.add(job.plan.index(attempt.microbatch), dropped=dropped)
        while one.version < job.final and len(one.applied) >= job.plan.gradients_before(one.version + 1):
            one.version += 1
            if one.version == job.final or (job.every and one.version % job.every == 0):
                self._cut(name, one)
                self._answer(name, self._report(one))

    def stand_by(self, name: str, holder: str) -> int:
        """Shard ``holder`` has a copy of the block of ``name`` as it is now, which must be at an update; gives its version."""
        one = self.blocks[name]
        assert len(one.applied) == self.jobs[one.job].plan.gradients_before(one.version)
        self._saved[one.job, one.version, one.block] = one.applied.copy()
        files = tuple(
            LayerFile(layer=layer, life=one.place.life, name=f"layer-{layer}", num_bytes=100, digest="d")
            for layer in range(one.place.start, one.place.stop)
        )
        self.say(
            holder,
            StandbyHeld(job=one.job, block=one.block, life=one.place.life, version=one.version, files=files),
        )
        return one.version

    def report(self, *names: str) -> None:
        """Shards say how far they are; they do so by themselves at every cut."""
        for name in names:
            self.say(name, self._report(self.blocks[name]))

    def _on_stop(self, name: str, job_id: str) -> None:
        job = self.jobs[job_id]
        job.final = min(job.plan.update_of(len(job.held)) + 1, job.final)
        self._answer(name, Stopping(job=job_id, version=job.final))

    def _cut(self, name: str, one: PlayedBlock) -> None:
        self._saved[one.job, one.version, one.block] = one.applied.copy()
        error = self.refuse_save(one.block, one.version)
        layers = range(one.place.start, one.place.stop)
        files = tuple(
            LayerFile(layer=layer, life=one.place.life, name=f"layer-{layer}", num_bytes=100, digest="d")
            for layer in layers
        )
        taken = CutTaken(job=one.job, block=one.block, version=one.version)
        saved = CutSaved(job=one.job, block=one.block, version=one.version, files=() if error else files, error=error)
        one.cuts[one.version] = [taken, saved]
        for message in one.cuts[one.version]:
            self._answer(name, message)

    def _report(self, one: PlayedBlock) -> BlockReport:
        layers = tuple(
            LayerReport(
                layer=layer,
                life=one.place.life,
                version=one.version,
                revision=one.version,
                staleness=(3, 1),
                misalignment=(4,),
                learning_rate=0.5,
            )
            for layer in range(one.place.start, one.place.stop)
        )
        return BlockReport(
            job=one.job,
            block=one.block,
            layers=layers,
            open_attempts=0,
            store_bytes=7,
            forward_queue=1,
            backward_queue=2,
            compute_seconds=0.5,
            log_bytes=9,
        )
