"""The simulated shells of shards and workers around their real roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from layerwise.applied import AppliedSet
from layerwise.errors import CorruptError
from layerwise.event_log import LogHeader
from layerwise.job import parse_job
from layerwise.messages import (
    Assignment,
    BlockClosed,
    BlockPlace,
    CommitCut,
    CutCommitted,
    Failure,
    Hosting,
    LayerFile,
    LayerState,
    Message,
    NamedTensors,
    Outcome,
    Probe,
    Probed,
    PushGradient,
    Reroute,
    StandbyHeld,
    StandbyOffer,
    StandbyPart,
    StandbyRequest,
    TaskFinished,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Effect, Send
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.shard_role import ShardRole
from layerwise.server.standby_copy import StandbyCopy
from layerwise.server.standby_role import StandbyRole
from layerwise.server.task_queue import TaskQueue
from layerwise.settings import ResolvedSettings
from layerwise.tasks import (
    ApplyTask,
    BackwardTask,
    DetachTask,
    DropTask,
    EvaluateTask,
    FindResult,
    FindTask,
    ForwardTask,
    Steps,
    Task,
    TaskResult,
)
from layerwise.worker.backward_role import BackwardRole, Build, Execute
from layerwise.worker.forward_requests import Load, LoadEvaluation, Prepare
from layerwise.worker.forward_role import ForwardRole
from layerwise.worker.lease_room import MAX_AHEAD
from tests.simulation.counting_block import CountingBlock, FlushedLog, LayerCopy, activation, expect, gradient, target
from tests.simulation.disk import Disk
from tests.simulation.scenario import BadSamples, FakeDivergence
from tests.simulation.world import Process


@dataclass(slots=True, eq=False)
class Work:
    """One block of one job on one shard process."""

    assignment: Assignment
    plan: Any
    log: FlushedLog
    header: LogHeader
    block: CountingBlock
    queue: TaskQueue
    role: ShardRole
    left: bool = False
    busy: int = 0
    saving: dict[int, dict[int, LayerCopy]] = field(default_factory=dict)

    @property
    def place(self) -> BlockPlace:
        return self.assignment.route[self.assignment.block]


@dataclass(frozen=True, slots=True)
class LayerToken:
    """A layer of a standby copy."""

    copy: LayerCopy

    def part(self, offset: int) -> Tensors:
        if offset != 0:
            raise ValueError(f"a token has no offset {offset}")
        return Tensors((self.copy,))


@dataclass(slots=True)
class ArrivingToken:
    """A layer of a standby copy that is being fetched."""

    file: LayerFile
    copy: LayerCopy | None = None

    @property
    def num_received(self) -> int:
        return 0 if self.copy is None else 1

    def add(self, part: Tensors) -> None:
        (self.copy,) = part.items

    def finish(self) -> LayerToken:
        assert self.copy is not None
        assert self.copy.state.digest == self.file.digest
        return LayerToken(self.copy)


@dataclass(slots=True, eq=False)
class SimulatedShard(Process):
    """A shard process: probes, restores from the simulated disk, runs slots, saves cuts."""

    disk: Disk = field(kw_only=True)
    profile_json: str = field(kw_only=True)
    slots: int = 1
    step_seconds: float = 0.001
    hiccups: float = 0.0
    frozen_below: int = 0
    not_finite: tuple[int, int] | None = None
    bad: BadSamples = field(default_factory=lambda: BadSamples())
    divergence: FakeDivergence | None = None
    history: list[Work] = field(default_factory=list)
    memory_ends: bool = False
    """The next pass finds no memory."""
    _committed_at: float = 0.0
    _works: dict[str, Work] = field(default_factory=dict)
    _standby: dict[str, StandbyRole] = field(default_factory=dict)
    _wanted: dict[str, Assignment] = field(default_factory=dict)

    def on_message(self, peer: str, message: Message) -> list[Effect]:
        now = self.world.now
        match message:
            case Probe():
                probed = Probed(job=message.job, profile_json=self.profile_json)
                self.after(0.01, lambda: self.send("coordinator", probed))
                return []
            case Assignment():
                self._wanted[message.job] = message
                work = self._works.pop(message.job, None)
                if work is not None:
                    self._leave(work)
                return self._take_assignment(message)
            case Reroute() if message.job in self._standby:
                self._standby[message.job].take_route(message.route)
            case StandbyOffer() | StandbyRequest() | StandbyPart() | StandbyHeld():
                standby = self._standby.get(message.job)
                return standby.on_message(peer, message, now) if standby is not None else []
            case Unassign():
                self._standby.pop(message.job, None)
                self._wanted.pop(message.job, None)
                work = self._works.pop(message.job, None)
                if work is not None:
                    self._leave(work)
                return [Send("coordinator", Unassigned(job=message.job))]
            case CommitCut():
                # One thread commits, in the order of the commands.
                self._committed_at = max(self._committed_at, now) + self.disk.seconds()
                self.after(self._committed_at - now, lambda: self._commit(message))
                return []
        work = self._works.get(getattr(message, "job", ""))
        if work is None:
            return []
        effects = work.role.on_message(peer, message, now)
        self._fill_slots(work)
        return effects

    def hosting(self) -> tuple[Hosting, ...]:
        return tuple(work.role.hosting for work in self._works.values())

    def on_welcome(self) -> list[Effect]:
        return [effect for standby in self._standby.values() for effect in standby.tell_held()]

    def on_lost(self, peer: str) -> list[Effect]:
        effects = [
            effect
            for work in self._works.values()
            for effect in self._and_fill(work, work.role.on_lost(peer, self.world.now))
        ]
        return effects + [effect for standby in self._standby.values() for effect in standby.on_lost(peer)]

    def on_tick(self) -> list[Effect]:
        effects = [
            effect
            for work in self._works.values()
            for effect in self._and_fill(work, work.role.on_tick(self.world.now))
        ]
        return effects + [effect for standby in self._standby.values() for effect in standby.on_tick(self.world.now)]

    def on_killed(self) -> None:
        for work in self._works.values():
            for version, copies in work.saving.items():
                self.disk.tear(work.assignment.directory, version, work.place.life, copies)
            self._leave(work, flush=False)

    def before_send(self, peer: str, message: Message) -> None:
        work = self._works.get(getattr(message, "job", ""))
        if work is None:
            return
        work.log.flush(work.plan)
        if (
            isinstance(message, BlockClosed)
            and message.block == work.assignment.block
            and message.outcome is Outcome.APPLIED
        ):
            index = work.plan.index(message.attempt.microbatch)
            for layer, (ledger, _) in work.block.layers.items():
                assert (layer, index) in work.log.accumulated or not ledger.lacks(index)
                assert not ledger.lacks(index), f"{message.attempt} is reported applied and layer {layer} lacks it"

    def describe(self) -> str:
        return "; ".join(f"{job}: {work.role.describe()}" for job, work in self._works.items()) or "no job"

    def _take_assignment(self, message: Assignment) -> list[Effect]:
        """As a shard's process does: build at once, or fetch the layers from another shard first."""
        delay = self.world.random.uniform(0.001, 0.05)
        settings, source = ResolvedSettings.from_json(message.settings_json), message.standby
        if not settings.standby_every:
            self.after(delay, lambda: self._build(message))
            return []
        standby = self._standby.get(message.job)
        if standby is None:
            standby = self._standby[message.job] = StandbyRole(
                job=message.job,
                block=message.block,
                route=message.route,
                sink=ArrivingToken,
                limits=[place.stop - place.start for place in message.route],
            )
        standby.assign(message.block, message.route)
        if not source.holder:
            self.after(delay, lambda: self._build(message))
            return []

        def fetched(layers: Mapping[int, Any] | str) -> list[Effect]:
            if self._wanted.get(message.job) is not message:
                return []
            if isinstance(layers, str):
                return [Send("coordinator", Failure(job=message.job, message=layers, standby=message.cut))]
            copies = {layer: one.copy for layer, one in layers.items()}
            assert all(copy.state.version == message.cut for copy in copies.values())
            self.after(delay, lambda: self._build(message, copies))
            return []

        return standby.restore(source, message.cut, fetched, patience=4.0, now=self.world.now)

    def _build(self, message: Assignment, copies: dict[int, LayerCopy] | None = None) -> None:
        if self._wanted.get(message.job) is not message:
            return
        settings = ResolvedSettings.from_json(message.settings_json)
        spec = parse_job(message.spec_json)
        place = message.route[message.block]
        num_layers = message.route[-1].stop
        plan = settings.plan
        log = FlushedLog()
        layers = range(place.start, place.stop)
        try:
            restored = copies or (self.disk.load(message.directory, message.cut, layers) if message.cut else {})
        except CorruptError as error:
            self.send("coordinator", Failure(job=message.job, message=str(error), cut=message.cut))
            return
        self.disk.begin_life(message.directory, message.cut, place.life, layers)
        header = LogHeader(
            job=message.job,
            num_layers=num_layers,
            start=place.start,
            stop=place.stop,
            life=place.life,
            hash_algorithm="hash",
            plan=plan,
            window=settings.window,
            max_staleness=settings.max_staleness,
            position_order=settings.mode == "synchronous",
            backward_weights=settings.backward_weights,
            layer_names=tuple(f"layer-{layer}" for layer in range(place.start, place.stop)),
            rate_factor=message.course.rate_factor,
            synchronous_until=message.course.synchronous_until,
            moments_forgotten=message.cut == message.course.version,
        )
        block = CountingBlock(
            start=place.start,
            stop=place.stop,
            num_layers=num_layers,
            life=place.life,
            plan=plan,
            log=log,
            position_order=header.position_order,
            frozen_below=self.frozen_below,
            restored=restored,
            in_order=self.slots == 1 and (header.position_order or settings.window == 1) and not message.cut,
            updates_last=self.slots == 1,
            on_cut=lambda version, copies: self.after(0.0005, lambda: self._on_cut(work, version, copies)),
            learning_rate=0.1 * message.course.rate_factor,
            from_cut=copies is None,
            copied_every=settings.standby_every,
            on_copy=lambda version, made: self.after(
                self.world.random.uniform(0.0005, 0.01), lambda: self._offer(work, version, made)
            ),
        )
        block.not_finite = self.not_finite
        if self.divergence is not None:
            block.loss = self.divergence.loss(message.course.rate_factor)
        block.spoilt = lambda index: self.bad.spoils(index, self.world.random)
        queue = TaskQueue(window=settings.window, num_layers=place.stop - place.start, attached=spec.cluster.attached)
        role = ShardRole(
            job=message.job,
            block=message.block,
            route=message.route,
            plan=plan,
            window=settings.window,
            synchronous=settings.mode == "synchronous",
            compute=block,
            queue=queue,
            schedule=CutSchedule(final=plan.num_updates, intervals=settings.cut_intervals),
            version=message.cut,
            layer_names=[f"layer-{layer}" for layer in range(num_layers)],
            generation=message.generation,
            task_seconds=spec.timeouts.task,
            drops_bad_samples=spec.train.on_bad_sample == "drop",
            synchronous_until=message.course.synchronous_until,
            from_cut=copies is None,
        )
        work = Work(message, plan, log, header, block, queue, role)
        self._works[message.job] = work
        self.history.append(work)
        applied: list[AppliedSet] = [ledger.applied for ledger, _ in block.layers.values()]
        self.perform(role.begin(applied, self.world.now))

    def _leave(self, work: Work, *, flush: bool = True) -> None:
        work.left = True
        work.queue.close()
        if flush:
            work.log.flush(work.plan)
        # What was not written down is gone with the process.
        del work.log.log.records[work.log.num_flushed :]

    def _act(self, work: Work, act: Callable[[], list[Effect]]) -> None:
        if not work.left:
            self.perform(act())
            self._fill_slots(work)

    def _and_fill(self, work: Work, effects: list[Effect]) -> list[Effect]:
        self._fill_slots(work)
        return effects

    def _fill_slots(self, work: Work) -> None:
        while work.busy < self.slots and (task := work.queue.try_pop()) is not None:
            work.busy += 1
            self._run(work, task, _steps(work.block, task))

    def _run(self, work: Work, task: Task, steps: Steps[TaskResult]) -> None:
        """One step of a pass, then others may have their turn."""
        if work.left:
            return
        now = self.world.now
        try:
            if self.memory_ends:
                raise MemoryError
            early = next(steps)
            if early is not None:
                self.after(0.0002, lambda: self._act(work, lambda: work.role.on_task_done(task, early, self.world.now)))
        except StopIteration as end:
            result = end.value
            work.busy -= 1
            self.after(0.0002, lambda: self._act(work, lambda: work.role.on_task_done(task, result, self.world.now)))
            self._fill_slots(work)
            return
        except AssertionError:
            raise
        except Exception as error:
            failed = error
            work.busy -= 1
            self._act(work, lambda: work.role.on_task_failed(task, failed, now))
            return
        slow = 10 if self.hiccups and self.world.random.random() < self.hiccups else 1
        seconds = slow * self.step_seconds * self.world.random.uniform(0.5, 1.5)
        self.after(seconds, lambda: self._run(work, task, steps))

    def _on_cut(self, work: Work, version: int, copies: dict[int, LayerCopy]) -> None:
        self._act(work, lambda: work.role.on_cut_taken(version, self.world.now))
        directory, life = work.assignment.directory, work.place.life
        work.saving[version] = copies

        def saved() -> None:
            del work.saving[version]
            error = self.disk.save(directory, version, life, copies)
            work.block.cut_saved(version)
            files = tuple(
                LayerFile(layer=layer, life=life, name=f"{layer}", num_bytes=1, digest=copy.state.digest)
                for layer, copy in sorted(copies.items())
            )
            self._act(work, lambda: work.role.on_cut_saved(version, () if error else files, error, self.world.now))

        self.after(self.disk.seconds(), saved)

    def _offer(self, work: Work, version: int, copies: dict[int, LayerCopy]) -> None:
        life = work.place.life
        files = tuple(
            LayerFile(layer=layer, life=life, name=f"{layer}", num_bytes=1, digest=copy.state.digest)
            for layer, copy in sorted(copies.items())
        )
        made = StandbyCopy(
            block=work.assignment.block,
            life=life,
            version=version,
            files=files,
            layers={layer: LayerToken(copy) for layer, copy in copies.items()},
        )
        self._act(work, lambda: self._standby[work.assignment.job].offer(made))

    def _commit(self, message: CommitCut) -> None:
        work = self._works.get(message.job)
        if work is not None:
            directory, text = work.assignment.directory, message.manifest_json
            error = self.disk.commit(directory, message.version, text, message.files, message.keep)
            self.send("coordinator", CutCommitted(job=message.job, version=message.version, error=error))


def _steps(block: CountingBlock, task: Task) -> Steps[TaskResult]:
    match task:
        case ForwardTask():
            return (yield from block.forward(task))
        case BackwardTask():
            return (yield from block.backward(task))
        case DetachTask(backward=backward, job=job, life=life, have=have):
            yield
            return block.detach(backward, job, life, have)
        case FindTask(attempt=attempt):
            yield
            return FindResult(layer=block.first_not_finite(attempt))
        case ApplyTask():
            return (yield from block.apply(task))
        case DropTask(attempt=attempt, reason=reason):
            yield
            return block.drop(attempt, reason)
        case EvaluateTask():
            return (yield from block.evaluate(task))


@dataclass(slots=True, eq=False)
class SimulatedForward(Process):
    """A forward worker process whose samples are tokens."""

    load_seconds: float = 0.001
    bad: BadSamples = field(default_factory=lambda: BadSamples())
    role: ForwardRole = field(default_factory=lambda: ForwardRole(prefetch=3))
    _plans: dict[str, Any] = field(default_factory=dict)
    _room: int = 0

    def on_message(self, peer: str, message: Message) -> list[Effect]:
        return self._with_requests(self.role.on_message(peer, message, self.world.now))

    def hosting(self) -> tuple[Hosting, ...]:
        return self.role.hosting

    def on_lost(self, peer: str) -> list[Effect]:
        return self._with_requests(self.role.on_lost(peer, self.world.now))

    def on_tick(self) -> list[Effect]:
        return self._with_requests(self.role.on_tick(self.world.now))

    def describe(self) -> str:
        return self.role.describe()

    def _with_requests(self, effects: list[Effect]) -> list[Effect]:
        # Closed numbers may be told to the coordinator before they are told to the worker, whose room is then leased again.
        assert self.role.num_leases <= 2 * (self._room + MAX_AHEAD), (
            f"{self.role.num_leases} leases are held, {self._room} were asked for"
        )
        for request in self.role.take_requests():
            delay = self.load_seconds * self.world.random.uniform(0.2, 3.0)
            match request:
                case Prepare(assignment=assignment):
                    settings = ResolvedSettings.from_json(assignment.settings_json)
                    self._plans[assignment.job] = settings.plan
                    self._room = settings.window + 3
                    ordered = settings.mode == "synchronous" or settings.window == 1
                    self._answer(
                        delay, partial(self.role.on_prepared, ordered=ordered), assignment.job, settings.window
                    )
                case Load(job=job, attempt=attempt):
                    index = self._plans[job].index(attempt.microbatch)
                    if self.bad.tears(index, self.world.random):
                        self._answer(delay, self.role.on_load_failed, job, attempt, f"file {index} is torn")
                        continue
                    self._answer(delay, self.role.on_loaded, job, attempt, activation(index, -1), target(index))
                case LoadEvaluation(job=job, version=version, samples=samples):
                    inputs, targets = activation(samples.start, -1), target(samples.start)
                    self._answer(delay, self.role.on_evaluation_loaded, job, version, samples, inputs, targets)
        return effects

    def _answer(self, delay: float, act: Callable[..., list[Effect]], *arguments: Any) -> None:
        self.after(delay, lambda: self.perform(self._with_requests(act(*arguments, self.world.now))))


@dataclass(slots=True, eq=False)
class SimulatedBackward(Process):
    """A detached backward worker process: it checks that it has been given every state that moved."""

    step_seconds: float = 0.001
    frozen_below: int = 0
    role: BackwardRole = field(default_factory=BackwardRole)
    _states: dict[str, dict[int, LayerState]] = field(default_factory=dict)
    _places: dict[str, BlockPlace] = field(default_factory=dict)

    def on_message(self, peer: str, message: Message) -> list[Effect]:
        return self._with_requests(self.role.on_message(peer, message, self.world.now))

    def hosting(self) -> tuple[Hosting, ...]:
        return self.role.hosting

    def on_lost(self, peer: str) -> list[Effect]:
        return self._with_requests(self.role.on_lost(peer, self.world.now))

    def on_tick(self) -> list[Effect]:
        return self._with_requests(self.role.on_tick(self.world.now))

    def describe(self) -> str:
        return self.role.describe()

    def _with_requests(self, effects: list[Effect]) -> list[Effect]:
        for request in self.role.take_requests():
            match request:
                case Build(assignment=assignment):
                    self._states[assignment.job] = {}
                    self._places[assignment.job] = assignment.route[assignment.block]
                    self.after(0.005, lambda job=assignment.job: self.perform(self.role.on_built(job, self.world.now)))
                case Execute():
                    self._execute(request)
        return effects

    def _execute(self, request: Execute) -> None:
        task, place, states = request.task, self._places[request.job], self._states[request.job]
        states.update({state.layer: state for state in task.states})
        life = task.life
        assert sorted(states) == list(range(place.start, place.stop)), "a layer's state was never sent"
        assert all(state.life == life for state in states.values())
        kept = task.inputs.items[0]
        index = kept[1]
        expect(task.inputs, activation(index, place.start - 1))
        delay = 0.0
        for layer in sorted(task.lacking, reverse=True):
            delay += self.step_seconds * self.world.random.uniform(0.5, 1.5)
            state = states[layer]
            push = PushGradient(
                job=request.job,
                attempt=task.attempt,
                number=task.number,
                layer=layer,
                life=state.life,
                revision=state.revision,
                read=state.version,
                gradients=NamedTensors((), ()),
            )
            self.after(delay, lambda push=push: self.perform(self.role.on_gradient(request.job, push, self.world.now)))
        wanted = task.input_gradient and place.start - 1 >= self.frozen_below
        finished = TaskFinished(
            job=request.job,
            attempt=task.attempt,
            number=task.number,
            life=task.life,
            gradients=gradient(index, place.start - 1) if wanted else None,
        )
        self.after(
            delay + self.step_seconds,
            lambda: self.perform(self._with_requests(self.role.on_executed(request.job, finished, self.world.now))),
        )
