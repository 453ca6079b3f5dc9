from __future__ import annotations

import threading

import pytest

from layerwise.errors import BusyError
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import NamedTensors, PushGradient, Tensors
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import ApplyTask, BackwardTask, EvaluateTask, ForwardTask

NOTHING = Tensors(())


def attempt(number: int) -> Attempt:
    return Attempt(Microbatch(0, number, number + 1))


def forward(number: int) -> ForwardTask:
    return ForwardTask(
        attempt=attempt(number), number=number, inputs=NOTHING, targets=NOTHING, keep=True, input_gradient=False
    )


def backward(number: int) -> BackwardTask:
    return BackwardTask(attempt=attempt(number), number=number, gradients=None)


def apply(number: int, layer: int = 0) -> ApplyTask:
    push = PushGradient(
        job="job",
        attempt=attempt(number),
        number=number,
        layer=layer,
        life=1,
        revision=1,
        read=0,
        gradients=NamedTensors((), ()),
    )
    return ApplyTask(worker="backward-0", push=push)


def evaluate(start: int) -> EvaluateTask:
    return EvaluateTask(version=1, start=start, stop=start + 1, inputs=NOTHING, targets=NOTHING)


def test_gradients_come_before_backward_before_forward_before_evaluation() -> None:
    queue = TaskQueue(window=2, num_layers=2)
    tasks = [evaluate(0), forward(3), backward(2), apply(5)]
    for task in tasks:
        queue.push(task)
    assert [queue.try_pop() for _ in range(5)] == [*reversed(tasks), None]


def test_the_lowest_number_of_a_kind_comes_first_and_equals_keep_their_order() -> None:
    queue = TaskQueue(window=3, num_layers=3)
    tasks = [apply(4, layer=2), apply(3, layer=1), apply(4, layer=1), forward(9), forward(7)]
    for task in tasks:
        queue.push(task)
    assert [queue.try_pop() for _ in tasks] == [tasks[1], tasks[0], tasks[2], tasks[4], tasks[3]]


def test_backward_passes_are_left_to_detached_workers_where_nothing_is_attached() -> None:
    queue = TaskQueue(window=2, num_layers=1, attached=False)
    queue.push(backward(0))
    queue.push(forward(1))
    assert queue.try_pop() == forward(1)
    assert queue.try_pop() is None
    assert queue.take_backward() == backward(0)
    assert queue.take_backward() is None


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    queue = TaskQueue(window=2, num_layers=2)
    queue.push(forward(0))
    queue.push(forward(1))
    with pytest.raises(BusyError, match="2 of its kind wait already"):
        queue.push(forward(2))
    queue.push(backward(0))
    assert (queue.forward_depth, queue.backward_depth, len(queue)) == (2, 1, 3)


def test_closing_wakes_every_slot_with_nothing() -> None:
    queue = TaskQueue(window=1, num_layers=1)
    taken: list[object] = []
    slots = [threading.Thread(target=lambda: taken.append(queue.pop())) for _ in range(2)]
    for slot in slots:
        slot.start()
    queue.push(forward(0))
    queue.close()
    for slot in slots:
        slot.join(timeout=10)
    assert all(not slot.is_alive() for slot in slots)
    assert None in taken
    assert queue.try_pop() is None


def test_a_wait_has_an_end() -> None:
    assert TaskQueue(window=1, num_layers=1).pop(timeout_seconds=0.0) is None


def test_after_a_forward_pass_of_the_last_block_its_backward_pass_goes_before_the_next_forward_pass() -> None:
    # With two microbatches in flight, a slot that took the second forward pass first left the block before without work.
    queue = TaskQueue(window=2, num_layers=1)
    queue.push(forward(2))
    queue.hold_forward()
    assert queue.try_pop() is None
    queue.push(backward(1))
    queue.release_forward()
    assert [type(queue.try_pop()).__name__ for _ in range(2)] == ["BackwardTask", "ForwardTask"]


def test_a_held_forward_pass_is_given_out_when_no_backward_pass_follows() -> None:
    queue = TaskQueue(window=2, num_layers=1)
    queue.push(forward(2))
    queue.hold_forward()
    queue.release_forward()
    assert isinstance(queue.try_pop(), ForwardTask)


def test_what_slots_run_is_counted_until_the_role_has_heard_of_its_end() -> None:
    queue = TaskQueue(window=3, num_layers=1)
    for number in range(3):
        queue.push(forward(number))
    assert queue.num_running == 0
    queue.try_pop()
    queue.pop(timeout_seconds=0.0)
    assert queue.num_running == 2
    queue.finish()
    assert queue.num_running == 1
    assert queue.pop(timeout_seconds=0.0) is not None
    assert queue.try_pop() is None
    assert queue.num_running == 2


def test_what_a_detached_worker_takes_is_not_run_by_a_slot() -> None:
    queue = TaskQueue(window=1, num_layers=1, attached=False)
    queue.push(backward(0))
    assert queue.take_backward() == backward(0)
    assert queue.num_running == 0


def test_a_purge_forgets_what_waits_and_not_what_runs() -> None:
    queue = TaskQueue(window=2, num_layers=1)
    for task in (forward(0), forward(1), backward(2), apply(3), evaluate(4)):
        queue.push(task)
    assert queue.try_pop() == apply(3)
    queue.purge()
    assert (len(queue), queue.num_running) == (0, 1)
    assert queue.try_pop() is None
    queue.push(forward(7))
    queue.push(forward(8))  # the places of what was purged are free again
    assert queue.try_pop() == forward(7)


def test_a_slot_that_waits_goes_on_waiting_over_a_purge_and_gets_what_comes_after_it() -> None:
    queue = TaskQueue(window=1, num_layers=1)
    taken: list[object] = []
    slot = threading.Thread(target=lambda: taken.append(queue.pop(timeout_seconds=10.0)))
    slot.start()
    queue.purge()
    queue.push(forward(5))
    slot.join(timeout=10)
    assert taken == [forward(5)]


def test_what_was_handed_out_and_never_ends_keeps_being_counted_by_a_closed_queue() -> None:
    queue = TaskQueue(window=1, num_layers=1)
    queue.push(forward(0))
    queue.try_pop()
    queue.close()
    assert queue.num_running == 1
    queue.finish()
    assert queue.num_running == 0


def test_a_paused_queue_gives_out_evaluations_only_and_goes_on_where_it_was() -> None:
    queue = TaskQueue(window=4, num_layers=2)
    for task in (forward(1), backward(0), apply(0), evaluate(0)):
        queue.push(task)
    queue.pause(True)
    assert queue.try_pop() == evaluate(0)
    assert queue.try_pop() is None
    assert queue.take_backward() is None
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(queue.pop(30)))
    waiting.start()
    queue.pause(False)
    waiting.join()
    assert found == [apply(0)]
    assert [queue.try_pop(), queue.try_pop()] == [backward(0), forward(1)]
