"""The ordered queue between a shard's role and its compute slots."""

from __future__ import annotations

import heapq
import threading
from itertools import count

from layerwise.errors import BusyError
from layerwise.tasks import ApplyTask, BackwardTask, DetachTask, DropTask, EvaluateTask, FindTask, ForwardTask, Task

MAX_EVALUATIONS = 256
"""Evaluation microbatches that may wait at one block; forward workers keep at most two each on the way."""

_RANKS: dict[type, int] = {
    ApplyTask: 0,
    DropTask: 0,
    DetachTask: 0,
    FindTask: 0,
    BackwardTask: 1,
    ForwardTask: 2,
    EvaluateTask: 3,
}


class TaskQueue:
    """Pushed gradients, drops and what detached workers wait for first, then backward, forward and evaluation passes; inside each kind the lowest number first.

    Gradients come first because they make weights fresher at little cost; backward passes before forward passes because they free what
    is kept. The bounds are reservations made at admission (`window` numbers are open at most), so a full queue is a bug of ours or of a
    peer, not a state to wait in. Thread-safe: one condition guards everything.

    ``attached`` false leaves backward passes to `take_backward`, that is to detached workers.
    """

    def __init__(self, *, window: int, num_layers: int, attached: bool = True) -> None:
        self.attached = attached
        self._limits = (window * (num_layers + 2), window, window, MAX_EVALUATIONS)
        self._heaps: tuple[list[tuple[int, int, Task]], ...] = ([], [], [], [])
        self._arrivals = count()
        self._changed = threading.Condition()
        self._closed = False
        self._held = 0
        self._running = 0
        self._paused = False

    @property
    def forward_depth(self) -> int:
        """Forward passes that wait."""
        return len(self._heaps[2])

    @property
    def backward_depth(self) -> int:
        """Backward passes that wait."""
        return len(self._heaps[1])

    @property
    def num_running(self) -> int:
        """Tasks that slots have taken and whose end the role has not heard of (`finish`)."""
        return self._running

    def __len__(self) -> int:
        return sum(len(heap) for heap in self._heaps)

    def push(self, task: Task) -> None:
        """Add ``task``; wakes one slot.

        Raises:
            BusyError: its kind's bound is reached; nothing was added.
        """
        rank = _RANKS[type(task)]
        with self._changed:
            if len(self._heaps[rank]) >= self._limits[rank]:
                raise BusyError(
                    f"{type(task).__name__} refused: {self._limits[rank]} of its kind wait already, which is the bound; "
                    f"a peer has sent more than it was granted"
                )
            heapq.heappush(self._heaps[rank], (_order(task), next(self._arrivals), task))
            self._changed.notify()

    def pop(self, timeout_seconds: float | None = None) -> Task | None:
        """Take the first task, waiting for one; ``None`` when the queue is closed or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._first() is not None, timeout_seconds)
            if self._closed:
                return None
            return self._hand_out()

    def try_pop(self) -> Task | None:
        """Take the first task if there is one."""
        with self._changed:
            return None if self._closed else self._hand_out()

    def finish(self) -> None:
        """The role has heard how a task that a slot took has ended."""
        with self._changed:
            self._running -= 1

    def purge(self) -> None:
        """Forget all that waits: the route has changed, and with it everything under way is aborted."""
        with self._changed:
            for heap in self._heaps:
                heap.clear()

    def take_backward(self) -> BackwardTask | None:
        """Take the first backward pass if one waits: for a detached worker."""
        with self._changed:
            if self._closed or self._paused or not self._heaps[1]:
                return None
            task = heapq.heappop(self._heaps[1])[2]
            assert isinstance(task, BackwardTask)
            return task

    def hold_forward(self) -> None:
        """Give out no more forward passes until `release_forward`: a backward pass is about to be pushed.

        A slot that has run the last block's forward pass calls this, because the loss's backward pass comes from the role, on
        another thread, a moment later. Without it the slot would find only forward passes and run them first; then no gradient
        leaves this block for as long, and with few microbatches in flight the blocks before it run dry.
        """
        with self._changed:
            self._held += 1

    def release_forward(self) -> None:
        """The role has heard of the pass; what follows from it is in the queue."""
        with self._changed:
            self._held -= 1
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        """Nothing that has to be written down is given out."""
        return self._paused

    def pause(self, paused: bool) -> None:
        """Give out nothing but evaluation passes until this is called with False.

        What waits stays within its bounds: its places were reserved, and admission ends with the window.
        """
        with self._changed:
            if self._paused != paused:
                self._paused = paused
                self._changed.notify_all()

    def close(self) -> None:
        """Wake every slot with nothing; what waits is forgotten."""
        with self._changed:
            self._closed = True
            for heap in self._heaps:
                heap.clear()
            self._changed.notify_all()

    def _first(self) -> list[tuple[int, int, Task]] | None:
        if self._paused:
            return self._heaps[3] or None
        for rank, heap in enumerate(self._heaps[:2] if self._held else self._heaps):
            if heap and (rank != 1 or self.attached):
                return heap
        return None

    def _hand_out(self) -> Task | None:
        heap = self._first()
        if heap is None:
            return None
        self._running += 1
        return heapq.heappop(heap)[2]


def _order(task: Task) -> int:
    match task:
        case ApplyTask(push=push):
            return push.number
        case DetachTask(backward=backward):
            return backward.number
        case EvaluateTask(start=start):
            return start
        case _:
            return task.number
