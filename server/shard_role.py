"""The role of one block of one job: which message or finished pass leads to what.

The shell (real or simulated) builds it when an `Assignment` has been carried out and then, always from one thread:

    effects = role.begin(applied, now)                 # links to the next shard, says Ready
    effects = role.on_message(peer, message, now)      # everything but Assignment, CommitCut and Unassign, which are the shell's
    effects = role.on_lost(peer, now) / role.on_tick(now)
    effects = role.on_task_done(task, result, now)     # a slot has run a task taken from ``queue`` (ForwardTask -> ForwardResult, ...)
    effects = role.on_task_failed(task, error, now)
    effects = role.on_cut_taken(version, now)          # every layer of the block is copied at ``version`` (in memory)
    effects = role.on_cut_saved(version, files, error, now)   # after `on_cut_taken` of that version

A `Reroute` keeps the layers and begins everything else anew: what waits is forgotten, what slots compute is waited for, what is open is aborted;
then the role says Ready, and the coordinator starts the new generation.

Tasks go into ``queue``; slots take them out with `TaskQueue.pop`. ``compute`` is called here only for what is quick; passes are run by slots.
Before each `on_tick` the shell may set ``compute_seconds``, ``log_bytes`` and ``shortage`` for the report. Nothing of an older life is ever acted on.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from layerwise.applied import AppliedSet
from layerwise.errors import BusyError, NotFiniteError, NotFoundError, RejectedError, sentence
from layerwise.ids import COORDINATOR
from layerwise.memory import is_out_of_memory
from layerwise.messages import (
    Abort,
    BlockClosed,
    BlockPlace,
    BlockReport,
    BoundaryGradient,
    CutDurable,
    CutSaved,
    CutTaken,
    DetachedTask,
    Evaluated,
    EvaluateForward,
    Forward,
    HoldCut,
    Hosting,
    LayerFile,
    LinkDown,
    Message,
    NotFinite,
    Offer,
    PushGradient,
    Ready,
    ReleaseCut,
    Reroute,
    StartTraining,
    Stop,
    StopAt,
    TaskFinished,
    TaskRequest,
    Tensors,
    Workers,
)
from layerwise.plan import TrainingPlan
from layerwise.roles import Connect, Disconnect, Effect, Send
from layerwise.server.admission import GENERATION_BITS, MAX_PENDING_CUTS
from layerwise.server.block_context import BlockContext
from layerwise.server.block_evaluations import BlockEvaluations
from layerwise.server.block_passes import BlockPasses
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.detached_tasks import DetachedTasks
from layerwise.server.first_shard import FirstShard
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import (
    ApplyTask,
    BackwardResult,
    BackwardTask,
    BlockCompute,
    DetachTask,
    DropResult,
    DropTask,
    EvaluateResult,
    EvaluateTask,
    FindResult,
    FindTask,
    ForwardResult,
    ForwardTask,
    InputGradient,
    Task,
    TaskResult,
)

REPORT_SECONDS = 1.0

log = logging.getLogger(__name__)


class ShardRole:
    """Block ``block`` of ``route`` in one job. ``version`` is the one restored (0: the initial weights), ``from_cut`` or from a standby copy.

    ``schedule`` says where cuts are; it must be this object's own. ``layer_names`` has a name for every layer of the model.
    ``task_seconds`` limits how long granted tensors and detached passes may take.
    """

    def __init__(
        self,
        *,
        job: str,
        block: int,
        route: Sequence[BlockPlace],
        plan: TrainingPlan,
        window: int,
        synchronous: bool,
        compute: BlockCompute,
        queue: TaskQueue,
        schedule: CutSchedule,
        version: int,
        layer_names: Sequence[str],
        generation: int = 0,
        task_seconds: float = 60.0,
        drops_bad_samples: bool = False,
        synchronous_until: int = 0,
        from_cut: bool = True,
        coordinator: str = COORDINATOR,
    ) -> None:
        self.job = job
        self.block = block
        self.queue = queue
        self.compute_seconds = 0.0
        self.log_bytes = 0
        self.shortage = ""
        self._context = BlockContext(
            job=job,
            block=block,
            route=route,
            plan=plan,
            window=window,
            compute=compute,
            queue=queue,
            layer_names=layer_names,
            coordinator=coordinator,
            generation=generation,
            drops_bad_samples=drops_bad_samples,
        )
        self._compute = compute
        self._schedule = schedule
        self._version = version
        self._from_cut = from_cut
        self._coordinator = coordinator
        self._reroute: Reroute | None = None
        self._cuts: dict[int, CutSaved | None] = {}
        self._reported_at = -math.inf
        self.first: FirstShard | None = None
        if block == 0:
            self.first = FirstShard(
                self._context,
                self._enter,
                synchronous=synchronous,
                schedule=schedule,
                version=version,
                task_seconds=task_seconds,
                synchronous_until=synchronous_until,
            )
        self._detached = DetachedTasks(self._context, complete=self._finish, task_seconds=task_seconds)
        self._passes = BlockPasses(self._context, self.first, self._detached.feed)
        self._evaluations = BlockEvaluations(self._context)

    # Calls of the shell -----------------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """The role has told the coordinator that the job can't go on; it acts on nothing more."""
        return self._context.failed

    @property
    def hosting(self) -> Hosting:
        """What a coordinator has to know that finds this block at work."""
        context = self._context
        return Hosting(job=self.job, block=self.block, life=context.life, generation=context.generation)

    @property
    def num_refused(self) -> int:
        """Frames not acted on: of an older life, for a number that does not wait for them, of a peer without business here."""
        return self._context.num_refused

    @property
    def num_open(self) -> int:
        """Attempts that hold a place here: admitted ones at the first shard, those under way at the others."""
        return self.first.admission.num_open if self.first else len(self._passes)

    def begin(self, applied: Sequence[AppliedSet], now: float) -> list[Effect]:
        """The block's state is built or restored; ``applied`` has each layer's set."""
        self._schedule_cuts(self._version)
        effects = self._connect()
        if not self._from_cut:
            # Cuts of which there are copies only are not durable yet: this one may become so, those before it can't any more.
            if self._version in self._schedule:
                self._cut_at(self._version)
        elif self._version:
            # The copy that was restored is here still, in case the version has not been evaluated.
            taken = CutTaken(job=self.job, block=self.block, version=self._version)
            effects.append(Send(self._coordinator, taken))
            self._cuts[self._version] = None
        return [*effects, self._ready(applied)]

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message of this job arrived from ``peer``."""
        if isinstance(message, Reroute):
            return self._on_reroute(message, now) if peer == self._coordinator else []
        if self.failed:
            return []
        if self._reroute is not None and not isinstance(message, CutDurable | HoldCut | ReleaseCut | Workers):
            # Whatever it is, it belongs to what is being given up.
            return []
        context = self._context
        life = getattr(message, "life", context.life)
        if life != context.life and not isinstance(message, Offer):
            return context.refuse(peer, message, f"it is for life {life}, the block is in life {context.life}")
        number = getattr(message, "number", None)
        if number is not None and number >> GENERATION_BITS != context.generation:
            return context.refuse(peer, message, f"number {number} is not of generation {context.generation}")
        context.routed = context.routed or isinstance(message, Forward | EvaluateForward | StopAt | Stop | Abort)
        try:
            return self._dispatch(peer, message, now)
        except (ValueError, BusyError, RejectedError) as error:
            return context.refuse(peer, message, str(error))

    def on_unfit(self, peer: str, message: Message, why: str, now: float) -> list[Effect]:
        """A message whose tensors do not fit the block: nothing is done with them, and whoever waits for better ones is told.

        A worker that was given the microbatch, or the task, loses it to another one.
        """
        if self.failed:
            return []
        effects = self._context.refuse(peer, message, why)
        try:
            return effects + self._give_up_unfit(peer, message, why, now)
        except (ValueError, BusyError, RejectedError) as error:
            return effects + self._context.refuse(peer, message, str(error))

    def _give_up_unfit(self, peer: str, message: Message, why: str, now: float) -> list[Effect]:
        if isinstance(message, Offer) and self.first is not None and self._reroute is None:
            # It is granted as any other, and then given up, so that a worker whose samples never fit is noticed.
            return self.first.on_offer(peer, message, now, unfit=why)
        if getattr(message, "life", None) != self._context.life:
            return []
        match message:
            case Forward() if self.first is not None:
                return self.first.on_unfit(peer, message.number, message.attempt, why, now)
            case PushGradient() | TaskFinished():
                return self._detached.on_unfit(peer, message.number, why, now)
        return []

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """The link to ``peer`` is gone for good. If that was a neighbour, the coordinator finds out what it means."""
        if self.failed:
            return []
        context = self._context
        if context.is_upstream(peer) or context.is_downstream(peer):
            if context.routed:
                return [Send(self._coordinator, LinkDown(job=self.job, peer=peer, generation=context.generation))]
            # Nothing has gone over it in this generation: it was the link to an earlier incarnation of that shard.
            return self._connect() if context.is_downstream(peer) else []
        self._evaluations.on_lost(peer)
        effects = self.first.on_lost(peer, now) if self.first else []
        return effects + self._detached.on_lost(peer, now)

    def on_tick(self, now: float) -> list[Effect]:
        """Deadlines and reports."""
        if self.failed or self._reroute is not None:
            return []
        effects = self.first.on_tick(now) if self.first else []
        effects += self._detached.on_tick(now)
        if now - self._reported_at >= REPORT_SECONDS:
            effects += self._report(now)
        return effects

    def on_task_done(self, task: Task, result: TaskResult, now: float) -> list[Effect]:
        """A slot has run ``task``; its effects on the layers are visible to every reader. An `InputGradient` comes before that."""
        if isinstance(result, InputGradient):
            if self.failed or self._reroute is not None or not isinstance(task, BackwardTask):
                return []
            return self._passes.hand_down(task.number, result.gradients)
        self.queue.finish()
        if self.failed:
            return []
        if self._reroute is not None:
            return self._rest()
        match task, result:
            case ForwardTask(), ForwardResult():
                return self._passes.on_forward_done(task, result, now)
            case BackwardTask(), BackwardResult():
                return self._passes.finish(task.number, result.gradients, now)
            case DropTask(), DropResult():
                return self._passes.on_dropped(task, result, now)
            case DetachTask(), DetachedTask():
                return self._detached.on_made(task, result, now)
            case FindTask(), FindResult():
                return self._passes.on_found(task, result.layer)
            case ApplyTask(), _:
                return self._detached.on_applied(task, now)
            case EvaluateTask(), EvaluateResult():
                return self._evaluations.on_done(task, result)
            case _:
                raise AssertionError(f"{type(task).__name__} can't give {result!r}")

    def on_task_failed(self, task: Task, error: Exception, now: float) -> list[Effect]:
        """``task`` raised ``error`` on its slot."""
        self.queue.finish()
        if self.failed:
            return []
        if is_out_of_memory(error):
            where = self._context.describe()
            return self._context.run_out(f"{_name(task)} failed in {where}: memory ran out ({sentence(error)})")
        if isinstance(error, NotFiniteError):
            # Also while a new route waits: the layer is stuck before that update, whoever asks it again.
            return self._context.fail(sentence(error), diverged=True)
        if self._reroute is not None:
            # A gradient of what is given up may well be refused; a fault of the layers themselves comes again.
            log.info("%s of the generation before ended with: %s", type(task).__name__, error)
            return self._rest()
        match task:
            case ApplyTask() if isinstance(error, RejectedError):
                log.warning("%s", error)
                return self._detached.on_applied(task, now)
            case DetachTask() if not self._detached.is_awaited(task):
                return self._detached.on_made(task, None, now)
            case EvaluateTask() if isinstance(error, NotFoundError):
                log.warning("evaluation of version %d given up: %s", task.version, error)
                self._evaluations.on_failed(task)
                return []
        return self._context.fail(f"{_name(task)} failed in {self._context.describe()}: {sentence(error)}")

    def on_cut_taken(self, version: int, now: float) -> list[Effect]:
        """Every layer of the block is copied at ``version``."""
        self._cuts.setdefault(version, None)
        self._schedule_cuts(version)
        effects: list[Effect] = [Send(self._coordinator, CutTaken(job=self.job, block=self.block, version=version))]
        if version == self._schedule.final and not self.failed:
            effects += self._report(now)
        return effects

    def on_cut_saved(self, version: int, files: Sequence[LayerFile], error: str, now: float) -> list[Effect]:
        """The block's files of the cut are on disk, or ``error`` says why not."""
        saved = CutSaved(job=self.job, block=self.block, version=version, files=tuple(files), error=error)
        self._cuts[version] = saved
        for old in sorted(self._cuts)[: -2 * (MAX_PENDING_CUTS + 1)]:
            del self._cuts[old]
        # What has closed by then comes first: the coordinator commits no cut before it knows of that.
        effects = self.first.report(now) if self.first is not None and not self.failed else []
        return [*effects, Send(self._coordinator, saved)]

    def describe(self) -> str:
        """The state in one line, for logs and for the simulated world's watchdog."""
        queued, given = len(self.queue), self._detached.num_given
        text = f"block {self.block}: passes [{self._passes.describe()}], queued {queued}, detached {given}"
        return text if self.first is None else f"{text}; {self.first.describe()}"

    # Messages ---------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: str, message: Message, now: float) -> list[Effect]:
        match message:
            case Forward():
                return self._passes.on_forward(peer, message, now)
            case BoundaryGradient() if self._context.is_downstream(peer):
                return self._passes.on_boundary_gradient(peer, message, now)
            case BlockClosed() if self._context.is_downstream(peer):
                return self._passes.close(message, now)
            case EvaluateForward():
                return self._evaluations.on_forward(peer, message)
            case Evaluated() if self._context.is_downstream(peer):
                return self._evaluations.relay(message)
            case NotFinite() if self._context.is_downstream(peer):
                return self._passes.find_not_finite(message.number, None)
            case Abort() if self._context.is_upstream(peer):
                return self._passes.on_abort(message, now)
            case StopAt() if self._context.is_upstream(peer):
                return self._on_stop_at(message)
            case TaskRequest():
                return self._detached.on_request(peer, message, now)
            case PushGradient():
                self._detached.on_gradient(peer, message)
                return []
            case TaskFinished():
                return self._detached.on_finished(peer, message, now)
            case Workers() if peer == self._coordinator:
                return self._on_workers(message, now)
            case HoldCut() if peer == self._coordinator:
                self._compute.hold_cut(message.version)
                return []
            case ReleaseCut() if peer == self._coordinator:
                self._compute.release_cut(message.version)
                return []
            case _:
                return self._dispatch_first(peer, message, now)

    def _enter(self, peer: str, forward: Forward, now: float) -> list[Effect]:
        """A microbatch came with its offer, and is granted. What is admitted before a new route is given up with the rest."""
        return [] if self._reroute is not None else self._passes.on_forward(peer, forward, now)

    def _dispatch_first(self, peer: str, message: Message, now: float) -> list[Effect]:
        if self.first is not None:
            match message:
                case Offer():
                    return self.first.on_offer(peer, message, now)
                case StartTraining() if peer == self._coordinator:
                    return self.first.on_start(message, now)
                case CutDurable() if peer == self._coordinator:
                    return self.first.on_cut_durable(message.version, now)
                case Stop() if peer == self._coordinator:
                    return self.first.on_stop(now)
        return self._context.refuse(peer, message, "it is not for this block, or not from this peer")

    def _on_workers(self, message: Workers, now: float) -> list[Effect]:
        self._context.workers = frozenset(message.names)
        effects = self.first.on_workers(now) if self.first is not None else []
        return effects + self._detached.on_workers(now)

    # A new route ------------------------------------------------------------------------------------------------------

    def _on_reroute(self, message: Reroute, now: float) -> list[Effect]:
        context = self._context
        if context.failure is not None:
            return [Send(self._coordinator, context.failure)]  # who asks for more has not heard of it
        if message.generation <= context.generation:
            return []
        place = message.route[self.block] if len(message.route) == context.num_blocks else None
        if message.block != self.block or place is None or place.life != context.life:
            return context.refuse(self._coordinator, message, f"it does not lead over block {self.block}")
        self._context.generation = message.generation
        self._reroute = message
        self.queue.purge()
        return self._rest()

    def _rest(self) -> list[Effect]:
        """Once no slot computes any more: abort what is open, take the new route, say so."""
        message = self._reroute
        if message is None or self.queue.num_running:
            return []
        self._reroute = None
        context = self._context
        before = context.downstream
        context.take_route(message.route, message.generation)
        self._passes.abort_all()
        self._detached.abort_all()
        self._evaluations.forget_all()
        effects: list[Effect] = self.first.begin_anew(message.durable) if self.first is not None else []
        after = context.downstream
        if before is not None and after is not None and before.shard != after.shard:
            effects.append(Disconnect(before.shard))
        effects += self._connect()
        for version, saved in sorted(self._cuts.items()):
            if version >= message.durable:
                effects.append(Send(self._coordinator, CutTaken(job=self.job, block=self.block, version=version)))
                effects += [Send(self._coordinator, saved)] if saved is not None else []
        # Last: with the last one that is ready training begins, and must know of the cuts.
        return [*effects, self._ready(self._compute.applied())]

    def _ready(self, applied: Sequence[AppliedSet]) -> Send:
        sets = tuple(json.dumps(one.to_json()) for one in applied)
        generation = self._context.generation
        ready = Ready(
            job=self.job,
            block=self.block,
            generation=generation,
            applied_json=sets,
            version=self._version,
            drops=self._passes.drops,
        )
        return Send(self._coordinator, ready)

    # Stop and cuts ----------------------------------------------------------------------------------------------------

    def _on_stop_at(self, message: StopAt) -> list[Effect]:
        reached = max(layer.version for layer in self._compute.report())
        if message.version < reached:
            raise ValueError(f"training can't stop at version {message.version}, the block is at version {reached}")
        self._schedule.stop_at(message.version)
        self._cut_at(message.version)
        downstream = self._context.downstream
        return [] if downstream is None else [Send(downstream.shard, replace(message, life=downstream.life))]

    def _schedule_cuts(self, version: int) -> None:
        # Admission stays within MAX_PENDING_CUTS of the durable one, and nothing is durable before it is taken here.
        for cut in self._schedule.following(version, MAX_PENDING_CUTS + 1):
            self._cut_at(cut)

    def _cut_at(self, version: int) -> None:
        # The copy stays until the coordinator releases it: only it knows whether the version is to be evaluated.
        self._compute.hold_cut(version)
        self._compute.cut_at(version)

    # Small things ----------------------------------------------------------------------------------------------------

    def _finish(self, number: int, gradients: Tensors | None, now: float) -> list[Effect]:
        return self._passes.finish(number, gradients, now)

    def _connect(self) -> list[Effect]:
        downstream = self._context.downstream
        return [] if downstream is None else [Connect(downstream.shard, downstream.address)]

    def _report(self, now: float) -> list[Effect]:
        self._reported_at = now
        report = BlockReport(
            job=self.job,
            block=self.block,
            layers=self._compute.report(),
            open_attempts=self.num_open,
            store_bytes=self._compute.store_bytes,
            forward_queue=self.queue.forward_depth,
            backward_queue=self.queue.backward_depth,
            compute_seconds=self.compute_seconds,
            log_bytes=self.log_bytes,
            shortage=self.shortage,
        )
        return [Send(self._coordinator, report)]


def _name(task: Task) -> str:
    """What a task was, for sentences."""
    match task:
        case EvaluateTask():
            return f"evaluation of samples {task.start}-{task.stop} at version {task.version}"
        case ApplyTask():
            return f"gradient of layer {task.push.layer} for {task.push.attempt.microbatch}"
        case DropTask():
            return f"drop of {task.attempt.microbatch}"
        case DetachTask():
            return f"backward pass of {task.backward.attempt.microbatch} for {task.worker}"
        case FindTask():
            return f"search for what is not finite of {task.attempt.microbatch}"
        case ForwardTask():
            return f"forward pass of {task.attempt.microbatch}"
        case _:
            return f"backward pass of {task.attempt.microbatch}"
