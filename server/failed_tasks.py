"""What it costs when a slot could not run a task: the task, the block or the process."""

from __future__ import annotations

import logging

from layerwise.errors import NotFiniteError, NotFoundError, RejectedError, sentence
from layerwise.memory import is_out_of_memory
from layerwise.roles import Effect
from layerwise.server.block_context import BlockContext
from layerwise.server.block_evaluations import BlockEvaluations
from layerwise.server.block_route import BlockRoute
from layerwise.server.detached_tasks import DetachedTasks
from layerwise.tasks import ApplyTask, DetachTask, DropTask, EvaluateTask, FindTask, ForwardTask, Task

log = logging.getLogger(__name__)


class FailedTasks:
    """Finds out what can go on after an error. Called by `ShardRole` only."""

    def __init__(
        self,
        context: BlockContext,
        *,
        route: BlockRoute,
        detached: DetachedTasks,
        evaluations: BlockEvaluations,
    ) -> None:
        self._context = context
        self._route = route
        self._detached = detached
        self._evaluations = evaluations

    def on_failed(self, task: Task, error: Exception, now: float) -> list[Effect]:
        """``task`` raised ``error`` on its slot, which is free again."""
        if is_out_of_memory(error):
            where = self._context.describe()
            return self._context.run_out(f"{_name(task)} failed in {where}: memory ran out ({sentence(error)})")
        if isinstance(error, NotFiniteError):
            # Also while a new route waits: the layer is stuck before that update, whoever asks it again.
            return self._context.fail(sentence(error), diverged=True)
        if self._route.changing:
            # A gradient of what is given up may well be refused; a fault of the layers themselves comes again.
            log.info("%s of the generation before ended with: %s", type(task).__name__, error)
            return self._route.rest()
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
