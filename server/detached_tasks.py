"""The backward passes that a shard gives to detached workers.

worker                       shard
  TaskRequest ─────────────►   take the first backward pass off the queue
                               DetachTask to a slot
              ◄─────────────   DetachedTask (input, boundary gradient, buffers, states that moved)
  PushGradient (each layer) ►  ApplyTask to a slot
  TaskFinished ────────────►   counts once its last ApplyTask is done: the block has closed the attempt
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from layerwise.ids import Attempt
from layerwise.messages import DetachedTask, LayerRevision, PushGradient, TaskFinished, TaskRequest, Tensors
from layerwise.roles import TICK_SECONDS, Effect, Send
from layerwise.server.block_context import BlockContext
from layerwise.tasks import ApplyTask, BackwardTask, DetachTask

MAX_UNFIT = 8
"""Tasks in a row that workers do badly before the job fails."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Given:
    """One backward pass in a worker's hands. ``peer`` is ``None`` once the worker is lost and only its last gradients are awaited."""

    peer: str | None
    task: BackwardTask
    index: int
    since: float
    making: DetachTask | None
    """A slot makes it whole for the worker, who has nothing of it yet."""
    num_applying: int = 0
    finished: TaskFinished | None = None

    def is_with(self, peer: str, attempt: Attempt) -> bool:
        """Whether ``peer`` has it, whole, to work on."""
        return self.peer == peer and self.making is None and self.task.attempt == attempt


class DetachedTasks:
    """Who works on what. Called by `ShardRole` and its parts only, on its thread.

    ``complete(number, gradients)`` is told when a pass is whole: every layer has the gradient, ``gradients`` go upstream.
    """

    def __init__(
        self,
        context: BlockContext,
        *,
        complete: Callable[[int, Tensors | None, float], list[Effect]],
        task_seconds: float,
    ) -> None:
        self._context = context
        self._complete = complete
        self._patience = task_seconds - TICK_SECONDS if task_seconds >= 5 * TICK_SECONDS else task_seconds
        self._idle: dict[str, tuple[LayerRevision, ...]] = {}
        self._given: dict[int, _Given] = {}
        self._num_unfit = 0

    @property
    def num_given(self) -> int:
        """Backward passes in workers' hands."""
        return len(self._given)

    def on_request(self, peer: str, request: TaskRequest, now: float) -> list[Effect]:
        """``peer`` has nothing to do. A repeat that crossed the task on its way changes nothing."""
        if not self._context.is_worker(peer):
            return self._context.refuse(peer, request, "the coordinator has not named it among the block's workers")
        if any(given.peer == peer and given.finished is None for given in self._given.values()):
            return []
        self._idle[peer] = request.have
        return self.feed(now)

    def feed(self, now: float) -> list[Effect]:
        """Give waiting backward passes to idle workers, the longest idle first."""
        context = self._context
        while self._idle and (task := context.queue.take_backward()) is not None:
            peer, have = next(iter(self._idle.items()))
            del self._idle[peer]
            index = context.plan.index(task.attempt.microbatch)
            making = DetachTask(worker=peer, backward=task, job=context.job, life=context.life, have=have)
            self._given[task.number] = _Given(peer=peer, task=task, index=index, since=now, making=making)
            context.queue.push(making)
        return []

    def on_made(self, task: DetachTask, made: DetachedTask | None, now: float) -> list[Effect]:
        """A slot has made a task whole (``None``: in vain); if its worker is gone by now it is for the next one."""
        given = self._given.get(task.backward.number)
        if given is None or given.making is not task:
            return []
        given.making = None
        if given.peer is None or made is None:
            return self._settle(given, now)
        given.since = now
        return [Send(given.peer, made)]

    def is_awaited(self, task: DetachTask) -> bool:
        """Whether a worker still waits for what a slot makes of ``task``."""
        given = self._given.get(task.backward.number)
        return given is not None and given.making is task and given.peer is not None

    def on_gradient(self, peer: str, push: PushGradient) -> None:
        """A layer's gradient: to a slot with it."""
        given = self._given.get(push.number)
        if given is None or not given.is_with(peer, push.attempt) or given.finished is not None:
            log.warning(
                "gradient of layer %d for %s refused: %s does not work on it any more", push.layer, push.attempt, peer
            )
            return
        self._context.queue.push(ApplyTask(worker=peer, push=push))
        given.num_applying += 1

    def on_applied(self, task: ApplyTask, now: float) -> list[Effect]:
        """A slot has taken a pushed gradient in (or refused it as one from another life)."""
        given = self._given.get(task.push.number)
        if given is None:
            return []
        given.num_applying -= 1
        return self._settle(given, now)

    def on_finished(self, peer: str, message: TaskFinished, now: float) -> list[Effect]:
        """The worker has pushed every layer."""
        given = self._given.get(message.number)
        if given is None or not given.is_with(peer, message.attempt):
            log.warning("end of the task for %s refused: %s does not work on it any more", message.attempt, peer)
            return []
        given.finished = message
        return self._settle(given, now)

    def on_unfit(self, peer: str, number: int, why: str, now: float) -> list[Effect]:
        """What the worker sent can't be used: its task is for another one."""
        given = self._given.get(number)
        if given is None or given.peer != peer or given.finished is not None:
            return []
        return self._take_from(given, why) or self._settle(given, now)

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """The worker is gone: what it had not finished is for the next one."""
        self._idle.pop(peer, None)
        effects: list[Effect] = []
        for given in [one for one in self._given.values() if one.peer == peer]:
            given.peer = None
            effects += self._settle(given, now)
        return effects

    def on_workers(self, now: float) -> list[Effect]:
        """Who works for the block has changed: what others have is for the next one."""
        others = {given.peer for given in self._given.values() if given.peer is not None} | self._idle.keys()
        return [effect for peer in others if not self._context.is_worker(peer) for effect in self.on_lost(peer, now)]

    def on_tick(self, now: float) -> list[Effect]:
        """Take back what a worker, paused perhaps, has had for too long, or will have had before the next tick."""
        effects: list[Effect] = []
        for given in list(self._given.values()):
            if given.peer is not None and given.finished is None and now - given.since >= self._patience:
                log.warning("%s is taken back from %s after %.1f s", given.task.attempt, given.peer, now - given.since)
                given.peer = None
                effects += self._settle(given, now)
        return effects

    def abort_all(self) -> None:
        """Forget who works on what; what the workers still send of it is refused."""
        self._given.clear()
        self._idle.clear()

    def _take_from(self, given: _Given, why: str) -> list[Effect]:
        """Let another worker do it; the job fails when nobody does it well."""
        self._num_unfit += 1
        if self._num_unfit >= MAX_UNFIT:
            return self._context.fail(
                f"detached backward worker {given.peer} did not do {given.task.attempt} well ({why}), nor were the "
                f"{MAX_UNFIT - 1} tasks before; its version differs from the shard's, or it has a bug"
            )
        log.warning("%s is taken back from %s: %s", given.task.attempt, given.peer, why)
        given.peer = None
        return []

    def _settle(self, given: _Given, now: float) -> list[Effect]:
        if given.num_applying or given.making is not None:
            return []
        if given.finished is not None:
            lacking = self._context.compute.lacking(given.index)
            if lacking:
                given.finished = None
                why = f"it ended the task without a gradient for layer {lacking[-1]}"
                return self._take_from(given, why) or self._settle(given, now)
            del self._given[given.task.number]
            self._num_unfit = 0
            self._context.compute.release(given.task.attempt)
            return self._complete(given.task.number, given.finished.gradients, now)
        if given.peer is None:
            # Layers that have its gradient are not in the next worker's ``lacking``.
            del self._given[given.task.number]
            self._context.queue.push(given.task)
            return self.feed(now)
        return []
