"""The role of one block of one job: which message or finished pass leads to what.

The shell (real or simulated) builds it when an `Assignment` has been carried out and then, always from one thread:

    effects = role.begin(applied, now)                 # links to the next shard, says Ready
    effects = role.on_message(peer, message, now)      # everything but Assignment, CommitCut and Unassign, which are the shell's
    effects = role.on_lost(peer, now) / role.on_tick(now)
    effects = role.on_task_done(task, result, now)     # a slot has run a task taken from ``queue`` (ForwardTask -> ForwardResult, ...)
    effects = role.on_task_failed(task, error, now)
    effects = role.on_cut_taken(version, now)          # every layer of the block is copied at ``version`` (in memory)
    effects = role.on_cut_saved(version, files, error, now)   # after `on_cut_taken` of that version

Tasks go into ``queue``; slots take them out with `TaskQueue.pop`. ``compute`` is called here only for what is quick; passes are run by slots.
Before each `on_tick` the shell may set ``compute_seconds`` and ``log_bytes`` for the report. Nothing of an older life is ever acted on.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.applied import AppliedSet
from layerwise.errors import BusyError, NotFoundError, WrongLifeError
from layerwise.ids import Attempt
from layerwise.messages import (
    Abort,
    BlockClosed,
    BlockPlace,
    BlockReport,
    BoundaryGradient,
    CutDurable,
    CutSaved,
    CutTaken,
    Evaluated,
    EvaluateForward,
    Failure,
    Forward,
    HoldCut,
    LayerFile,
    Message,
    Metric,
    NotFinite,
    Offer,
    Outcome,
    PushGradient,
    Ready,
    ReleaseCut,
    StartTraining,
    Stop,
    StopAt,
    TaskFinished,
    TaskRequest,
    Tensors,
)
from layerwise.plan import TrainingPlan
from layerwise.roles import Connect, Effect, Send
from layerwise.server.admission import MAX_PENDING_CUTS
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.detached_tasks import DetachedTasks
from layerwise.server.first_shard import FirstShard
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import (
    ApplyTask,
    BackwardResult,
    BackwardTask,
    BlockCompute,
    EvaluateResult,
    EvaluateTask,
    ForwardResult,
    ForwardTask,
    Task,
    TaskResult,
)

COORDINATOR = "coordinator"
REPORT_SECONDS = 1.0
LOST_PEER_SECONDS = 5.0
"""How long the coordinator has to say what a lost neighbour means, before this shard says that it can't go on."""
NO_GRADIENT = Tensors((None,))

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pass:
    """What is known of one open attempt between its arrival at this block and the block's report."""

    attempt: Attempt
    number: int
    index: int
    targets: Tensors
    needed_from: int
    """The lowest layer up to the end of this block that lacks it."""
    lacking: tuple[int, ...]
    keep: bool
    input_gradient: bool
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()


class ShardRole:
    """Block ``block`` of ``route`` in one job. ``version`` is the one restored (0: the initial weights).

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
        task_seconds: float = 60.0,
        coordinator: str = COORDINATOR,
    ) -> None:
        self.job = job
        self.block = block
        self.queue = queue
        self.failed = False
        self.compute_seconds = 0.0
        self.log_bytes = 0
        self.num_refused = 0
        """Frames that were not acted on: an older life, an attempt that is not open, a peer that has no business here."""
        self._place = route[block]
        self._life = self._place.life
        self._upstream = route[block - 1] if block > 0 else None
        self._downstream = route[block + 1] if block + 1 < len(route) else None
        self._num_layers = route[-1].stop
        self._plan = plan
        self._window = window
        self._compute = compute
        self._schedule = schedule
        self._version = version
        self._layer_names = tuple(layer_names)
        self._coordinator = coordinator
        self._passes: dict[int, _Pass] = {}
        self._evaluations: dict[tuple[int, int, int], str] = {}
        self._lost_neighbour: tuple[str, float] | None = None
        self._routed = False
        self._reported_at = -math.inf
        self._detached = DetachedTasks(
            job=job,
            life=self._life,
            compute=compute,
            queue=queue,
            index_of=lambda task: self._plan.index(task.attempt.microbatch),
            complete=self._finish_backward,
            fail=self._fail,
            task_seconds=task_seconds,
        )
        self.first: FirstShard | None = None
        if block == 0:
            self.first = FirstShard(
                job=job,
                life=self._life,
                next_shard=(self._downstream.shard, self._downstream.life) if self._downstream else None,
                plan=plan,
                window=window,
                synchronous=synchronous,
                num_blocks=len(route),
                schedule=schedule,
                version=version,
                compute=compute,
                coordinator=coordinator,
                task_seconds=task_seconds,
            )

    # Calls of the shell -----------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Attempts that hold a place here: admitted ones at the first shard, those under way at the others."""
        return self.first.admission.num_open if self.first else len(self._passes)

    @property
    def final_version(self) -> int:
        """Where training ends: the plan's end, or the version of a stop."""
        return self._schedule.final

    def begin(self, applied: Sequence[AppliedSet], now: float) -> list[Effect]:
        """The block's state is built or restored; ``applied`` has each layer's set."""
        self._schedule_cuts(self._version)
        effects = self._connect()
        sets = tuple(json.dumps(one.to_json()) for one in applied)
        ready = Ready(job=self.job, block=self.block, applied_json=sets, version=self._version)
        return [*effects, Send(self._coordinator, ready)]

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message of this job arrived from ``peer``."""
        if self.failed:
            return []
        life = getattr(message, "life", self._life)
        if life != self._life and not isinstance(message, Offer):
            return self._refuse(peer, message, f"it is for life {life}, the block is in life {self._life}")
        self._routed = self._routed or isinstance(message, Forward | EvaluateForward | StopAt | Stop | Abort)
        try:
            return self._dispatch(peer, message, now)
        except (ValueError, BusyError) as error:
            return self._refuse(peer, message, str(error))

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """The link to ``peer`` is gone for good."""
        if self.failed:
            return []
        if peer in (place.shard for place in (self._upstream, self._downstream) if place is not None):
            if self._routed:
                self._lost_neighbour = (peer, now)
                return []
            # Nothing has gone over it in this life: it was the link to an earlier incarnation of that shard.
            return self._connect() if self._downstream is not None and self._downstream.shard == peer else []
        for key in [key for key, worker in self._evaluations.items() if worker == peer]:
            del self._evaluations[key]
        effects = self.first.on_lost(peer, now) if self.first else []
        return effects + self._detached.on_lost(peer, now)

    def on_tick(self, now: float) -> list[Effect]:
        """Deadlines and reports."""
        if self.failed:
            return []
        if self._lost_neighbour is not None and now - self._lost_neighbour[1] >= LOST_PEER_SECONDS:
            return self._fail(
                f"shard {self._place.shard} lost its link to shard {self._lost_neighbour[0]} and it did not come back"
            )
        effects = self.first.on_tick(now) if self.first else []
        effects += self._detached.on_tick(now)
        if now - self._reported_at >= REPORT_SECONDS:
            effects += self._report(now)
        return effects

    def on_task_done(self, task: Task, result: TaskResult, now: float) -> list[Effect]:
        """A slot has run ``task``; its effects on the layers are visible to every reader."""
        if self.failed:
            return []
        match task, result:
            case ForwardTask(), ForwardResult():
                return self._on_forward_done(task, result, now)
            case BackwardTask(), BackwardResult():
                return self._finish_backward(task.number, result.gradients, now)
            case ApplyTask(), _:
                return self._detached.on_applied(task, now)
            case EvaluateTask(), EvaluateResult():
                return self._on_evaluate_done(task, result)
            case _:
                raise AssertionError(f"{type(task).__name__} can't give {result!r}")

    def on_task_failed(self, task: Task, error: Exception, now: float) -> list[Effect]:
        """``task`` raised ``error`` on its slot."""
        if self.failed:
            return []
        match task:
            case ApplyTask() if isinstance(error, WrongLifeError):
                log.warning("%s", error)
                return self._detached.on_applied(task, now)
            case EvaluateTask() if isinstance(error, NotFoundError):
                log.warning("evaluation of version %d given up: %s", task.version, error)
                return []
            case EvaluateTask():
                what = f"evaluation of samples {task.start}-{task.stop} at version {task.version}"
            case ApplyTask():
                what = f"gradient of layer {task.push.layer} for {task.push.attempt.microbatch}"
            case _:
                what = f"{'forward' if isinstance(task, ForwardTask) else 'backward'} pass of {task.attempt.microbatch}"
        return self._fail(f"{what} failed in {self._block_name()}: {error or type(error).__name__}")

    def on_cut_taken(self, version: int, now: float) -> list[Effect]:
        """Every layer of the block is copied at ``version``."""
        self._schedule_cuts(version)
        effects: list[Effect] = [Send(self._coordinator, CutTaken(job=self.job, block=self.block, version=version))]
        if version == self._schedule.final and not self.failed:
            effects += self._report(now)
        return effects

    def on_cut_saved(self, version: int, files: Sequence[LayerFile], error: str, now: float) -> list[Effect]:
        """The block's files of the cut are on disk, or ``error`` says why not."""
        saved = CutSaved(job=self.job, block=self.block, version=version, files=tuple(files), error=error)
        return [Send(self._coordinator, saved)]

    def describe(self) -> str:
        """The state in one line, for logs and for the simulated world's watchdog."""
        passes = ", ".join(f"{one.number}:{one.attempt} lacking {one.lacking}" for one in self._passes.values())
        text = f"block {self.block}: passes [{passes}], queued {len(self.queue)}, detached {self._detached.num_given}"
        if self.first is None:
            return text
        admission = self.first.admission
        numbers = ", ".join(
            f"{one.number}:{one.attempt}{'' if one.arrived else ' awaited'}{' aborting' if one.aborting else ''} {one.reports}"
            for one in admission.open_numbers()
        )
        return f"{text}; open [{numbers}], waiting {admission.num_waiting}, done {len(admission.done)}, stop {admission.stop_version}"

    # Messages ---------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: str, message: Message, now: float) -> list[Effect]:
        match message:
            case Forward():
                return self._on_forward(peer, message, now)
            case BoundaryGradient() if self._from(peer, self._downstream):
                return self._on_boundary_gradient(peer, message, now)
            case BlockClosed() if self._from(peer, self._downstream):
                return self._close(message, now)
            case EvaluateForward():
                return self._on_evaluate_forward(peer, message)
            case Evaluated() if self._from(peer, self._downstream):
                return self._relay_evaluated(message)
            case NotFinite() if self._from(peer, self._downstream):
                return self._find_not_finite(message.number, None)
            case Abort() if self._from(peer, self._upstream):
                return self._on_abort(message, now)
            case StopAt() if self._from(peer, self._upstream):
                return self._on_stop_at(message)
            case TaskRequest():
                return self._detached.on_request(peer, message, now)
            case PushGradient():
                self._detached.on_gradient(peer, message)
                return []
            case TaskFinished():
                return self._detached.on_finished(peer, message, now)
            case HoldCut() if peer == self._coordinator:
                self._compute.hold_cut(message.version)
                return []
            case ReleaseCut() if peer == self._coordinator:
                self._compute.release_cut(message.version)
                return []
            case _:
                return self._dispatch_first(peer, message, now)

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
        return self._refuse(peer, message, "it is not for this block, or not from this peer")

    def _on_forward(self, peer: str, message: Forward, now: float) -> list[Effect]:
        effects: list[Effect] = []
        needed_from = message.needed_from
        if self.first is not None:
            needed_from = self._num_layers
            arrived = self.first.on_tensors(message.number, message.attempt, now)
            if arrived is None:
                return self._refuse(peer, message, f"number {message.number} does not wait for it")
            effects = arrived
        elif not self._from(peer, self._upstream) or message.number in self._passes:
            return self._refuse(peer, message, f"number {message.number} is here already, or {peer} is not upstream")
        elif len(self._passes) >= self._window:
            return self._refuse(peer, message, f"{self._window} microbatches are here, which is the window")
        index = self._plan.index(message.attempt.microbatch)
        lacking = self._compute.lacking(index)
        below = needed_from < self._place.start
        one = _Pass(
            attempt=message.attempt,
            number=message.number,
            index=index,
            targets=message.targets,
            needed_from=min([needed_from, *lacking]),
            lacking=lacking,
            keep=below or bool(lacking),
            input_gradient=below,
        )
        self._passes[one.number] = one
        self.queue.push(
            ForwardTask(
                attempt=one.attempt,
                number=one.number,
                inputs=message.inputs,
                targets=message.targets,
                keep=one.keep,
                input_gradient=below,
            )
        )
        return effects

    def _on_forward_done(self, task: ForwardTask, result: ForwardResult, now: float) -> list[Effect]:
        one = self._passes[task.number]
        effects: list[Effect] = []
        if self._downstream is not None:
            assert result.outputs is not None
            effects.append(
                Send(
                    self._downstream.shard,
                    Forward(
                        job=self.job,
                        attempt=one.attempt,
                        number=one.number,
                        life=self._downstream.life,
                        needed_from=one.needed_from,
                        inputs=result.outputs,
                        targets=one.targets,
                    ),
                )
            )
        elif one.lacking:
            # A block that has the microbatch already has had its loss counted.
            one.loss, one.metrics = result.loss, result.metrics
            if result.loss is not None and not math.isfinite(result.loss):
                return self._find_not_finite(one.number, result.loss)
        if not one.keep:
            effects += self._report_closed(one, now)
        elif self._downstream is None:
            effects += self._push_backward(BackwardTask(attempt=one.attempt, number=one.number, gradients=None), now)
        one.targets = NO_GRADIENT
        return effects

    def _on_boundary_gradient(self, peer: str, message: BoundaryGradient, now: float) -> list[Effect]:
        one = self._passes.get(message.number)
        if one is None or one.attempt != message.attempt or not one.keep:
            return self._refuse(peer, message, f"number {message.number} does not wait for it")
        return self._push_backward(
            BackwardTask(attempt=one.attempt, number=one.number, gradients=message.gradients), now
        )

    def _push_backward(self, task: BackwardTask, now: float) -> list[Effect]:
        self.queue.push(task)
        return self._detached.feed(now)

    def _finish_backward(self, number: int, gradients: Tensors | None, now: float) -> list[Effect]:
        one = self._passes[number]
        effects: list[Effect] = []
        if one.input_gradient:
            assert self._upstream is not None
            effects.append(
                Send(
                    self._upstream.shard,
                    BoundaryGradient(
                        job=self.job,
                        attempt=one.attempt,
                        number=number,
                        life=self._upstream.life,
                        gradients=NO_GRADIENT if gradients is None else gradients,
                    ),
                )
            )
        return effects + self._report_closed(one, now)

    def _report_closed(self, one: _Pass, now: float) -> list[Effect]:
        del self._passes[one.number]
        return self._close(
            BlockClosed(
                job=self.job,
                attempt=one.attempt,
                number=one.number,
                life=self._life,
                block=self.block,
                outcome=Outcome.APPLIED,
                loss=one.loss,
                metrics=one.metrics,
            ),
            now,
        )

    def _close(self, report: BlockClosed, now: float) -> list[Effect]:
        """Hand a report on upstream, to the first shard's admission in the end."""
        if self.first is not None:
            return self.first.on_block_closed(report, now)
        assert self._upstream is not None
        return [Send(self._upstream.shard, replace(report, life=self._upstream.life))]

    def _on_abort(self, message: Abort, now: float) -> list[Effect]:
        # Only an attempt whose tensors never reached the first shard is aborted, so there is nothing in the queue here.
        self._compute.abort(message.attempt)
        self._passes.pop(message.number, None)
        effects: list[Effect] = []
        if self._downstream is not None:
            relayed = Abort(job=self.job, attempt=message.attempt, number=message.number, life=self._downstream.life)
            effects.append(Send(self._downstream.shard, relayed))
        report = BlockClosed(
            job=self.job,
            attempt=message.attempt,
            number=message.number,
            life=self._life,
            block=self.block,
            outcome=Outcome.ABORTED,
        )
        return effects + self._close(report, now)

    # Stop and cuts ----------------------------------------------------------------------------------------------------

    def _on_stop_at(self, message: StopAt) -> list[Effect]:
        self._schedule.stop_at(message.version)
        self._cut_at(message.version)
        if self._downstream is None:
            return []
        relayed = StopAt(job=self.job, version=message.version, life=self._downstream.life)
        return [Send(self._downstream.shard, relayed)]

    def _schedule_cuts(self, version: int) -> None:
        # Admission stays within MAX_PENDING_CUTS of the durable one, and nothing is durable before it is taken here.
        for cut in self._schedule.following(version, MAX_PENDING_CUTS + 1):
            self._cut_at(cut)

    def _cut_at(self, version: int) -> None:
        # The copy stays until the coordinator releases it: only it knows whether the version is to be evaluated.
        self._compute.hold_cut(version)
        self._compute.cut_at(version)

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _on_evaluate_forward(self, peer: str, message: EvaluateForward) -> list[Effect]:
        if self.first is None and not self._from(peer, self._upstream):
            return self._refuse(peer, message, f"{peer} is not upstream")
        self.queue.push(
            EvaluateTask(
                version=message.version,
                start=message.start,
                stop=message.stop,
                inputs=message.inputs,
                targets=message.targets,
            )
        )
        if self.first is not None:
            self._evaluations[message.version, message.start, message.stop] = peer
        return []

    def _on_evaluate_done(self, task: EvaluateTask, result: EvaluateResult) -> list[Effect]:
        if self._downstream is not None:
            assert result.outputs is not None
            return [
                Send(
                    self._downstream.shard,
                    EvaluateForward(
                        job=self.job,
                        version=task.version,
                        start=task.start,
                        stop=task.stop,
                        life=self._downstream.life,
                        inputs=result.outputs,
                        targets=task.targets,
                    ),
                )
            ]
        assert result.loss is not None
        return self._relay_evaluated(
            Evaluated(
                job=self.job,
                version=task.version,
                start=task.start,
                stop=task.stop,
                life=self._life,
                loss=result.loss,
                metrics=result.metrics,
            )
        )

    def _relay_evaluated(self, message: Evaluated) -> list[Effect]:
        if self._upstream is not None:
            return [Send(self._upstream.shard, replace(message, life=self._upstream.life))]
        worker = self._evaluations.pop((message.version, message.start, message.stop), None)
        return [Send(worker, message)] if worker is not None else []

    # Failure ----------------------------------------------------------------------------------------------------------

    def _find_not_finite(self, number: int, loss: float | None) -> list[Effect]:
        one = self._passes.get(number)
        if one is None:
            return []
        first = self._compute.first_not_finite(one.attempt)
        if first == -1 and self._upstream is not None:
            found = NotFinite(job=self.job, attempt=one.attempt, number=number, life=self._upstream.life)
            return [Send(self._upstream.shard, found)]
        if first == -1:
            where = "its input samples are not finite already"
        elif first is not None:
            where = f"layer {first} ({self._layer_names[first]}) is the first whose output is not finite"
        elif self._downstream is not None:
            after = self._downstream.start
            where = f"the outputs are finite up to layer {after - 1} ({self._layer_names[after - 1]}) and not after it"
        else:
            where = "all layers' outputs are finite, the loss function's result is not"
        said = "" if loss is None else f" ({loss})"
        return self._fail(
            f"the loss of microbatch {one.attempt.microbatch} is not finite{said}: {where}; "
            f"lower the learning rate or the window, or resume from the last cut with other settings"
        )

    def _fail(self, sentence: str) -> list[Effect]:
        self.failed = True
        return [Send(self._coordinator, Failure(job=self.job, message=sentence))]

    # Small things -----------------------------------------------------------------------------------------------------

    def _connect(self) -> list[Effect]:
        return [] if self._downstream is None else [Connect(self._downstream.shard, self._downstream.address)]

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
        )
        return [Send(self._coordinator, report)]

    @staticmethod
    def _from(peer: str, place: BlockPlace | None) -> bool:
        return place is not None and place.shard == peer

    def _block_name(self) -> str:
        return f"layers {self._place.start}-{self._place.stop - 1} on shard {self._place.shard}"

    def _refuse(self, peer: str, message: Message, why: str) -> list[Effect]:
        self.num_refused += 1
        log.warning("%s from %s refused by %s: %s", type(message).__name__, peer, self._block_name(), why)
        return []
