"""The role of one block of one job: which message or finished pass leads to what.

The shell (real or simulated) builds it when an `Assignment` has been carried out and then, always from one thread:

    effects = role.begin(applied, now)                 # links to the next shard, says Ready
    effects = role.on_message(peer, message, now)      # everything but Assignment, CommitCut and Unassign, which are the shell's
    effects = role.on_lost(peer, now) / role.on_tick(now)
    effects = role.on_task_done(task, result, now)     # a slot has run a task taken from ``queue`` (ForwardTask -> ForwardResult, ...)
    effects = role.on_task_failed(task, error, now)
    effects = role.on_cut_taken(version, now)          # every layer of the block is copied at ``version`` (in memory)
    effects = role.on_cut_saved(version, files, error, now)   # after `on_cut_taken` of that version

The role finds out which of its parts each of these is for: `BlockPasses`, `DetachedTasks`, `BlockEvaluations`, `BlockCuts`, `BlockRoute`,
`FailedTasks`, `BlockReports`, and `FirstShard` in block 0. They decide what follows.

Tasks go into ``queue``; slots take them out with `TaskQueue.pop`. ``compute`` is called here only for what is quick; passes are run by slots.
Before each `on_tick` the shell may set in ``reports`` what only it knows. Nothing of an older life is ever acted on.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.applied import AppliedSet
from layerwise.errors import BusyError, RejectedError
from layerwise.ids import COORDINATOR
from layerwise.messages import (
    Abort,
    BlockClosed,
    BlockPlace,
    BoundaryGradient,
    CutDurable,
    DetachedTask,
    Evaluated,
    EvaluateForward,
    Forward,
    Hosting,
    LayerFile,
    Message,
    NotFinite,
    Offer,
    PushGradient,
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
from layerwise.roles import Effect
from layerwise.server.admission import GENERATION_BITS
from layerwise.server.block_context import BlockContext
from layerwise.server.block_cuts import BlockCuts
from layerwise.server.block_evaluations import BlockEvaluations
from layerwise.server.block_passes import BlockPasses
from layerwise.server.block_reports import BlockReports
from layerwise.server.block_route import BlockRoute
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.detached_tasks import DetachedTasks
from layerwise.server.failed_tasks import FailedTasks
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
        self._coordinator = coordinator
        self.reports = BlockReports(self._context)
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
        self._cuts = BlockCuts(self._context, schedule, version=version, from_cut=from_cut)
        self._route = BlockRoute(
            self._context,
            version=version,
            first=self.first,
            passes=self._passes,
            detached=self._detached,
            evaluations=self._evaluations,
            cuts=self._cuts,
        )
        self._failed_tasks = FailedTasks(
            self._context, route=self._route, detached=self._detached, evaluations=self._evaluations
        )

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
        return self._route.begin(applied)

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message of this job arrived from ``peer``."""
        if isinstance(message, Reroute):
            return self._route.on_reroute(message) if peer == self._coordinator else []
        if self.failed:
            return []
        if self._route.changing and not isinstance(message, CutDurable | ReleaseCut | Workers):
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
        if isinstance(message, Offer) and self.first is not None and not self._route.changing:
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
        """The link to ``peer`` is gone for good."""
        if self.failed:
            return []
        context = self._context
        if context.is_upstream(peer) or context.is_downstream(peer):
            return self._route.on_neighbour_lost(peer)
        self._evaluations.on_lost(peer)
        effects = self.first.on_lost(peer, now) if self.first else []
        return effects + self._detached.on_lost(peer, now)

    def on_tick(self, now: float) -> list[Effect]:
        """Deadlines and reports."""
        if self.failed or self._route.changing:
            return []
        effects = self.first.on_tick(now) if self.first else []
        effects += self._detached.on_tick(now)
        return effects + self.reports.on_tick(self.num_open, now)

    def on_task_done(self, task: Task, result: TaskResult, now: float) -> list[Effect]:
        """A slot has run ``task``; its effects on the layers are visible to every reader. An `InputGradient` comes before that."""
        if isinstance(result, InputGradient):
            if self.failed or self._route.changing or not isinstance(task, BackwardTask):
                return []
            return self._passes.hand_down(task.number, result.gradients)
        self.queue.finish()
        if self.failed:
            return []
        if self._route.changing:
            return self._route.rest()
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
        return [] if self.failed else self._failed_tasks.on_failed(task, error, now)

    def on_cut_taken(self, version: int, now: float) -> list[Effect]:
        """Every layer of the block is copied at ``version``."""
        effects = self._cuts.on_taken(version)
        if self._cuts.is_final(version) and not self.failed:
            effects += self.reports.report(self.num_open, now)
        return effects

    def on_cut_saved(self, version: int, files: Sequence[LayerFile], error: str, now: float) -> list[Effect]:
        """The block's files of the cut are on disk, or ``error`` says why not."""
        effects = self.first.on_cut_saved(version, now) if self.first is not None and not self.failed else []
        return effects + self._cuts.on_saved(version, files, error)

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
                return self._cuts.on_stop_at(message)
            case TaskRequest():
                return self._detached.on_request(peer, message, now)
            case PushGradient():
                self._detached.on_gradient(peer, message)
                return []
            case TaskFinished():
                return self._detached.on_finished(peer, message, now)
            case Workers() if peer == self._coordinator:
                return self._on_workers(message, now)
            case ReleaseCut() if peer == self._coordinator:
                self._cuts.release(message.version)
                return []
            case _:
                return self._dispatch_first(peer, message, now)

    def _enter(self, peer: str, forward: Forward, now: float) -> list[Effect]:
        """A microbatch came with its offer, and is granted. What is admitted before a new route is given up with the rest."""
        return [] if self._route.changing else self._passes.on_forward(peer, forward, now)

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

    def _finish(self, number: int, gradients: Tensors | None, now: float) -> list[Effect]:
        return self._passes.finish(number, gradients, now)
