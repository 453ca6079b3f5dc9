"""Compute slots: the threads of a shard that do arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable

from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import (
    ApplyTask,
    BackwardTask,
    BlockCompute,
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
from layerwise.threads import VitalThread


class Slots:
    """``num_slots`` threads, each with one loop: take the next task from ``queue``, run it on ``block``, report.

    ``backward_follows``: the role answers a forward pass with its backward pass (in the last block), so `TaskQueue.hold_forward` is
    called before the report; who is reported to calls `TaskQueue.release_forward`.

    ``report(task, result or exception)`` is called on the slot's thread and must not block; an `InputGradient` is reported before the pass is
    over. A slot never sends and never waits for a peer.
    """

    def __init__(
        self,
        block: BlockCompute,
        queue: TaskQueue,
        *,
        num_slots: int,
        name: str,
        report: Callable[[Task, TaskResult | Exception], None],
        backward_follows: bool = False,
    ) -> None:
        self._block = block
        self._queue = queue
        self._report = report
        self._backward_follows = backward_follows
        self._busy_seconds = [0.0] * num_slots
        self._threads = [
            VitalThread(target=self._work, args=(index,), name=f"slot-{index}-{name}") for index in range(num_slots)
        ]

    @property
    def num_slots(self) -> int:
        """How many threads there are."""
        return len(self._threads)

    @property
    def compute_seconds(self) -> float:
        """Seconds that slots have spent inside tasks."""
        return sum(self._busy_seconds)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the queue and wait for the tasks under way (a task is finite: it waits for nobody)."""
        self._queue.close()
        for thread in self._threads:
            if thread.ident is not None:  # a block that was left before it began has none to wait for
                thread.join()

    def _work(self, index: int) -> None:
        while (task := self._queue.pop()) is not None:
            began = time.perf_counter()
            outcome: TaskResult | Exception
            try:
                outcome = self._run(task)
            except Exception as error:  # handed to the role, which decides
                outcome = error
            self._busy_seconds[index] += time.perf_counter() - began
            if self._backward_follows and isinstance(task, ForwardTask):
                self._queue.hold_forward()
            self._report(task, outcome)

    def _run(self, task: Task) -> TaskResult:
        steps = self._steps(task)
        while True:
            try:
                early = next(steps)
            except StopIteration as end:
                result: TaskResult = end.value
                return result
            if early is not None:
                self._report(task, early)

    def _steps(self, task: Task) -> Steps[TaskResult]:
        match task:
            case ForwardTask():
                return (yield from self._block.forward(task))
            case BackwardTask():
                return (yield from self._block.backward(task))
            case DetachTask(backward=backward, job=job, life=life, have=have):
                return self._block.detach(backward, job, life, have)
            case FindTask(attempt=attempt):
                return FindResult(layer=self._block.first_not_finite(attempt))
            case ApplyTask():
                yield from self._block.apply(task)
                return None
            case DropTask(attempt=attempt, reason=reason):
                return self._block.drop(attempt, reason)
            case EvaluateTask():
                return (yield from self._block.evaluate(task))
