"""The queue between a role and its slots against a sorted list."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerwise.errors import BusyError
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import ApplyTask, BackwardTask, EvaluateTask, ForwardTask, Task
from tests.unit.test_task_queue import apply, backward, evaluate, forward

MAKERS: dict[str, Callable[[int], Task]] = {
    "apply": apply,
    "backward": backward,
    "forward": forward,
    "evaluate": evaluate,
}
ORDER = (ApplyTask, BackwardTask, ForwardTask, EvaluateTask)
WINDOW, NUM_LAYERS = 2, 2


class TaskQueueMachine(RuleBasedStateMachine):
    """Tasks are pushed, taken by slots and detached workers, held back, finished and purged."""

    @initialize(attached=st.booleans())
    def begin(self, attached: bool) -> None:
        self.attached = attached
        self.queue = TaskQueue(window=WINDOW, num_layers=NUM_LAYERS, attached=attached)
        self.waiting: list[tuple[int, int, int, Task]] = []
        self.pushed = 0
        self.running = 0
        self.held = 0

    def takeable(self) -> list[tuple[int, int, int, Task]]:
        kinds = {0, 1} if self.held else {0, 1, 2, 3}
        if not self.attached:
            kinds.discard(1)
        return sorted((one for one in self.waiting if one[0] in kinds), key=lambda one: one[:3])

    @rule(kind=st.sampled_from(sorted(MAKERS)), number=st.integers(0, 5))
    def push(self, kind: str, number: int) -> None:
        task = MAKERS[kind](number)
        rank = ORDER.index(type(task))
        limit = (WINDOW * (NUM_LAYERS + 2), WINDOW, WINDOW, 256)[rank]
        if sum(one[0] == rank for one in self.waiting) >= limit:
            with pytest.raises(BusyError):
                self.queue.push(task)
            return
        self.queue.push(task)
        self.pushed += 1
        self.waiting.append((rank, number, self.pushed, task))

    @rule()
    def take(self) -> None:
        wanted = self.takeable()
        task = self.queue.try_pop()
        if not wanted:
            assert task is None
            return
        assert task is wanted[0][3]
        self.waiting.remove(wanted[0])
        self.running += 1

    @rule()
    def take_for_a_detached_worker(self) -> None:
        backwards = sorted((one for one in self.waiting if one[0] == 1), key=lambda one: one[:3])
        task = self.queue.take_backward()
        assert task is (backwards[0][3] if backwards else None)
        if backwards:
            self.waiting.remove(backwards[0])

    @precondition(lambda self: self.running > 0)
    @rule()
    def finish(self) -> None:
        self.queue.finish()
        self.running -= 1

    @rule()
    def purge(self) -> None:
        self.queue.purge()
        self.waiting.clear()

    @rule()
    def hold(self) -> None:
        self.queue.hold_forward()
        self.held += 1

    @precondition(lambda self: self.held > 0)
    @rule()
    def release(self) -> None:
        self.queue.release_forward()
        self.held -= 1

    @invariant()
    def it_counts_what_the_model_counts(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_running == self.running
        assert self.queue.backward_depth == sum(one[0] == 1 for one in self.waiting)
        assert self.queue.forward_depth == sum(one[0] == 2 for one in self.waiting)


TestTaskQueue = TaskQueueMachine.TestCase
TestTaskQueue.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
