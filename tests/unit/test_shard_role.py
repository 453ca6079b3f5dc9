"""Races at one block, message by message, on the simulated world's exact block."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from layerwise.applied import AppliedSet
from layerwise.errors import WrongLifeError
from layerwise.ids import Attempt
from layerwise.messages import (
    Abort,
    AttemptsClosed,
    BlockClosed,
    BlockPlace,
    BlockReport,
    BoundaryGradient,
    Closed,
    CutTaken,
    Decline,
    DetachedTask,
    Failure,
    Forward,
    Grant,
    Message,
    NamedTensors,
    Offer,
    Outcome,
    PushGradient,
    Ready,
    StartTraining,
    Stop,
    StopAt,
    Stopping,
    TaskFinished,
    TaskRequest,
    Tensors,
)
from layerwise.plan import TrainingPlan
from layerwise.roles import Connect, Effect, Send
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.shard_role import ShardRole
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import ApplyTask, BackwardTask, EvaluateTask, ForwardTask, run_to_end
from tests.simulation.counting_block import CountingBlock, FlushedLog, activation, gradient, target

PLAN = TrainingPlan(num_samples=8, batch=2, accumulation=2, num_updates=6)
ROUTE = (
    BlockPlace(start=0, stop=2, shard="shard-0", address="here:0", life=5),
    BlockPlace(start=2, stop=4, shard="shard-1", address="here:1", life=6),
    BlockPlace(start=4, stop=6, shard="shard-2", address="here:2", life=7),
)


class Bench:
    """One block of ``route``, and one slot that works when it is told to."""

    def __init__(
        self, block: int, *, route: Sequence[BlockPlace] = ROUTE, window: int = 3, attached: bool = True, every: int = 2
    ) -> None:
        self.now = 0.0
        self.cuts: list[int] = []
        self.place = route[block]
        self.compute = CountingBlock(
            start=self.place.start,
            stop=self.place.stop,
            num_layers=route[-1].stop,
            life=self.place.life,
            plan=PLAN,
            log=FlushedLog(),
            position_order=False,
            frozen_below=0,
            restored={},
            on_cut=lambda version, copies: self.cuts.append(version),
        )
        self.queue = TaskQueue(window=window, num_layers=2, attached=attached)
        self.role = ShardRole(
            job="job",
            block=block,
            route=route,
            plan=PLAN,
            window=window,
            synchronous=False,
            compute=self.compute,
            queue=self.queue,
            schedule=CutSchedule(final=PLAN.num_updates, intervals=(every,)),
            version=0,
            layer_names=[f"layer-{layer}" for layer in range(6)],
            task_seconds=10.0,
        )
        self.begun = self.role.begin([AppliedSet()] * 2, 0.0)

    def hears(self, peer: str, message: Message) -> list[Effect]:
        return self.role.on_message(peer, message, self.now)

    def start(self) -> None:
        done = json.dumps(AppliedSet().to_json())
        self.hears("coordinator", StartTraining(job="job", done_json=done))

    def work(self) -> list[Effect]:
        """Run all that waits."""
        effects: list[Effect] = []
        while (task := self.queue.try_pop()) is not None:
            match task:
                case ForwardTask():
                    effects += self.role.on_task_done(task, run_to_end(self.compute.forward(task)), self.now)
                case BackwardTask():
                    effects += self.role.on_task_done(task, run_to_end(self.compute.backward(task)), self.now)
                case ApplyTask():
                    run_to_end(self.compute.apply(task))
                    effects += self.role.on_task_done(task, None, self.now)
                case EvaluateTask():
                    effects += self.role.on_task_done(task, run_to_end(self.compute.evaluate(task)), self.now)
        return effects

    def offer(self, index: int, worker: str = "forward-0") -> list[Effect]:
        return self.hears(worker, Offer(job="job", attempt=attempt(index), life=self.place.life))

    def forward(
        self, peer: str, index: int, number: int, *, life: int | None = None, needed_from: int = 0
    ) -> list[Effect]:
        message = Forward(
            job="job",
            attempt=attempt(index),
            number=number,
            life=self.place.life if life is None else life,
            needed_from=needed_from,
            inputs=activation(index, self.place.start - 1),
            targets=target(index),
        )
        return self.hears(peer, message)

    def boundary(self, index: int, number: int) -> list[Effect]:
        message = BoundaryGradient(
            job="job",
            attempt=attempt(index),
            number=number,
            life=self.place.life,
            gradients=gradient(index, self.place.stop - 1),
        )
        return self.hears(f"shard-{self.role.block + 1}", message)

    def closed_by(self, block: int, index: int, number: int, outcome: Outcome = Outcome.APPLIED) -> list[Effect]:
        message = BlockClosed(
            job="job", attempt=attempt(index), number=number, life=self.place.life, block=block, outcome=outcome
        )
        return self.hears(f"shard-{self.role.block + 1}", message)


def attempt(index: int) -> Attempt:
    return Attempt(PLAN.microbatch(index))


def sent(effects: list[Effect], kind: type[Message]) -> list[tuple[str, Message]]:  # type: ignore[valid-type]
    return [(one.peer, one.message) for one in effects if isinstance(one, Send) and isinstance(one.message, kind)]


def kinds(effects: list[Effect]) -> list[str]:
    return [type(one.message).__name__ for one in effects if isinstance(one, Send)]


def request(worker: str, life: int) -> TaskRequest:
    return TaskRequest(job="job", life=life)


def push(task: DetachedTask, layer: int) -> PushGradient:
    state = next(one for one in task.states if one.layer == layer)
    return PushGradient(
        job="job",
        attempt=task.attempt,
        number=task.number,
        layer=layer,
        life=task.life,
        revision=state.revision,
        read=state.version,
        gradients=NamedTensors((), ()),
    )


def finished(task: DetachedTask, gradients: Tensors | None) -> TaskFinished:
    return TaskFinished(job="job", attempt=task.attempt, number=task.number, life=task.life, gradients=gradients)


def test_a_block_links_to_the_next_and_says_what_it_has() -> None:
    bench = Bench(1)
    assert bench.begun[0] == Connect("shard-2", "here:2")
    (peer, ready) = sent(bench.begun, Ready)[0]
    assert peer == "coordinator"
    assert isinstance(ready, Ready)
    assert len(ready.applied_json) == 2


def test_a_microbatch_goes_through_the_block_and_back() -> None:
    bench = Bench(1)
    assert bench.forward("shard-0", 0, 0) == []
    ((peer, forward),) = sent(bench.work(), Forward)
    assert isinstance(forward, Forward)
    assert (peer, forward.life, forward.needed_from) == ("shard-2", 7, 0)
    bench.boundary(0, 0)
    effects = bench.work()
    assert kinds(effects) == ["BoundaryGradient", "BlockClosed"]
    ((peer, closed),) = sent(effects, BlockClosed)
    assert isinstance(closed, BlockClosed)
    assert (peer, closed.life, closed.block, closed.outcome) == ("shard-0", 5, 1, Outcome.APPLIED)
    assert bench.compute.store_bytes == 0


def test_the_backward_pass_stops_below_the_lowest_layer_that_lacks_the_microbatch() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0, needed_from=6)  # no layer before this block lacks it
    bench.work()
    bench.boundary(0, 0)
    assert kinds(bench.work()) == ["BlockClosed"]


def test_a_block_where_nothing_is_lacking_runs_and_closes_at_once() -> None:
    bench = Bench(1)
    for number, needed_from in ((0, 6), (1, 6)):
        bench.forward("shard-0", 0, number, needed_from=needed_from)
        effects = bench.work()
        if number == 0:
            bench.boundary(0, 0)
            bench.work()
    assert kinds(effects) == ["Forward", "BlockClosed"]
    ((_, forward),) = sent(effects, Forward)
    assert isinstance(forward, Forward)
    assert forward.needed_from == 6
    assert bench.compute.store_bytes == 0


def test_a_block_that_has_it_still_hands_the_gradient_to_those_before() -> None:
    bench = Bench(2)
    bench.forward("shard-1", 0, 0)
    first = bench.work()
    bench.forward("shard-1", 0, 1)  # a retry after a restore of the blocks before
    again = bench.work()
    assert kinds(first) == kinds(again) == ["BoundaryGradient", "BlockClosed"]
    (_, counted), (_, repeated) = sent(first, BlockClosed)[0], sent(again, BlockClosed)[0]
    assert isinstance(counted, BlockClosed)
    assert isinstance(repeated, BlockClosed)
    assert counted.loss is not None
    assert repeated.loss is None  # its loss is not counted again


def test_an_older_life_is_refused_and_changes_nothing() -> None:
    bench = Bench(1)
    assert bench.forward("shard-0", 0, 0, life=5) == []
    assert bench.work() == []
    assert (bench.role.num_refused, bench.role.num_open) == (1, 0)


def test_an_offer_for_another_life_is_declined() -> None:
    bench = Bench(0)
    bench.start()
    ((_, decline),) = sent(bench.hears("forward-0", Offer(job="job", attempt=attempt(0), life=4)), Decline)
    assert isinstance(decline, Decline)
    assert (decline.reason, decline.life) == ("life", 4)


def test_a_boundary_gradient_from_a_stranger_is_refused() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.work()
    message = BoundaryGradient(job="job", attempt=attempt(0), number=0, life=6, gradients=gradient(0, 3))
    assert bench.hears("shard-0", message) == []
    assert bench.work() == []
    assert bench.role.num_refused == 1


def test_the_worker_hears_when_all_blocks_have_closed() -> None:
    bench = Bench(0, route=(ROUTE[0], BlockPlace(start=2, stop=6, shard="shard-1", address="here:1", life=6)))
    bench.start()
    ((_, grant),) = sent(bench.offer(0), Grant)
    assert isinstance(grant, Grant)
    bench.forward("forward-0", 0, grant.number)
    bench.work()
    assert sent(bench.closed_by(1, 0, 0), Closed) == []
    bench.boundary(0, 0)
    effects = bench.work()
    ((peer, closed),) = sent(effects, Closed)
    assert isinstance(closed, Closed)
    assert (peer, closed.outcome) == ("forward-0", Outcome.APPLIED)
    assert sent(effects + bench.role.on_tick(1.0), AttemptsClosed)


def test_a_worker_lost_before_its_tensors_came_is_aborted_everywhere() -> None:
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    effects = bench.role.on_lost("forward-0", 1.0)
    assert [peer for peer, _ in sent(effects, Abort)] == ["shard-1"]
    assert bench.role.num_open == 1  # the others have not freed it
    bench.closed_by(1, 0, 0, Outcome.ABORTED)
    effects = bench.closed_by(2, 0, 0, Outcome.ABORTED)
    assert bench.role.num_open == 0
    assert sent(effects, Closed) == []
    assert bench.forward("forward-0", 0, 0) == []  # too late
    assert bench.work() == []


def test_a_worker_lost_afterwards_costs_nothing() -> None:
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    bench.forward("forward-0", 0, 0)
    assert sent(bench.role.on_lost("forward-0", 1.0), Abort) == []
    assert kinds(bench.work()) == ["Forward"]


def test_tensors_that_do_not_come_are_aborted_after_the_time_limit() -> None:
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    assert sent(bench.role.on_tick(10.0), Abort) == []
    assert len(sent(bench.role.on_tick(10.5), Abort)) == 1
    assert sent(bench.role.on_tick(11.0), Abort) == []


def test_an_abort_is_answered_and_handed_on() -> None:
    bench = Bench(1)
    effects = bench.hears("shard-0", Abort(job="job", attempt=attempt(0), number=0, life=6))
    assert [peer for peer, _ in sent(effects, Abort)] == ["shard-2"]
    ((peer, closed),) = sent(effects, BlockClosed)
    assert isinstance(closed, BlockClosed)
    assert (peer, closed.outcome) == ("shard-0", Outcome.ABORTED)


def test_a_stop_is_said_once_to_all_and_again_to_the_coordinator() -> None:
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    first = bench.hears("coordinator", Stop(job="job"))
    again = bench.hears("coordinator", Stop(job="job"))
    assert kinds(first) == ["Stopping", "StopAt"]
    assert kinds(again) == ["Stopping"]
    assert [message for _, message in sent(first, StopAt)] == [StopAt(job="job", version=1, life=6)]
    assert bench.role.final_version == 1


def test_a_stop_before_training_begins_is_kept_until_it_does() -> None:
    bench = Bench(0)
    assert bench.hears("coordinator", Stop(job="job")) == []
    effects = bench.hears("coordinator", StartTraining(job="job", done_json=json.dumps(AppliedSet().to_json())))
    assert [message for _, message in sent(effects, Stopping)] == [Stopping(job="job", version=0)]


def test_the_last_cut_is_followed_by_a_last_report() -> None:
    bench = Bench(1)
    assert kinds(bench.role.on_cut_taken(2, 0.0)) == ["CutTaken"]
    effects = bench.role.on_cut_taken(PLAN.num_updates, 0.0)
    assert len(sent(effects, CutTaken)) == len(sent(effects, BlockReport)) == 1


def test_layers_copy_themselves_at_every_scheduled_version() -> None:
    bench = Bench(2)
    for index in range(2 * PLAN.num_updates):
        bench.forward("shard-1", index, index)
        bench.work()
        for version in bench.cuts:
            bench.role.on_cut_taken(version, 0.0)
    assert bench.cuts == [2, 4, 6]


def detached_bench() -> tuple[Bench, DetachedTask]:
    """A last block without attached slots; backward-0 has its first task."""
    bench = Bench(2, attached=False)
    bench.hears("backward-0", request("backward-0", 7))
    bench.forward("shard-1", 0, 0)
    ((peer, task),) = sent(bench.work(), DetachedTask)
    assert isinstance(task, DetachedTask)
    assert peer == "backward-0"
    assert task.lacking == (4, 5)
    return bench, task


def test_a_detached_pass_closes_once_its_last_gradient_is_taken_in() -> None:
    bench, task = detached_bench()
    bench.hears("backward-0", push(task, 5))
    bench.hears("backward-0", push(task, 4))
    assert bench.hears("backward-0", finished(task, gradient(0, 3))) == []
    assert kinds(bench.work()) == ["BoundaryGradient", "BlockClosed"]
    assert bench.compute.store_bytes == 0


def test_a_lost_detached_worker_leaves_only_what_is_lacking() -> None:
    bench, task = detached_bench()
    bench.hears("backward-0", push(task, 5))
    assert bench.role.on_lost("backward-0", 1.0) == []
    bench.hears("backward-1", request("backward-1", 7))
    ((peer, again),) = sent(bench.work(), DetachedTask)  # not before the pushed gradient is in
    assert isinstance(again, DetachedTask)
    assert (peer, again.lacking, again.number) == ("backward-1", (4,), 0)
    bench.hears("backward-0", push(task, 4))  # too late: it works on it no more
    assert bench.work() == []
    bench.hears("backward-1", push(again, 4))
    bench.hears("backward-1", finished(again, gradient(0, 3)))
    assert kinds(bench.work()) == ["BoundaryGradient", "BlockClosed"]


def test_a_request_that_crossed_its_task_brings_no_second_one() -> None:
    bench, _ = detached_bench()
    bench.forward("shard-1", 1, 1)
    bench.work()
    assert bench.hears("backward-0", request("backward-0", 7)) == []


def test_a_detached_pass_that_takes_too_long_is_given_to_the_next() -> None:
    bench, _ = detached_bench()
    bench.hears("backward-1", request("backward-1", 7))
    assert sent(bench.role.on_tick(9.9), DetachedTask) == []
    assert [peer for peer, _ in sent(bench.role.on_tick(10.1), DetachedTask)] == ["backward-1"]


def test_a_worker_that_leaves_a_layer_out_loses_the_task_and_in_the_end_the_job() -> None:
    bench, task = detached_bench()
    bench.hears("backward-0", push(task, 5))
    bench.work()
    assert bench.hears("backward-0", finished(task, None)) == []
    for _ in range(6):
        ((peer, again),) = sent(bench.hears("backward-0", request("backward-0", 7)), DetachedTask)
        assert isinstance(again, DetachedTask)
        assert (peer, again.attempt) == ("backward-0", task.attempt)
        assert bench.hears("backward-0", finished(again, None)) == []
    bench.hears("backward-0", request("backward-0", 7))
    ((_, failure),) = sent(bench.hears("backward-0", finished(task, None)), Failure)
    assert isinstance(failure, Failure)
    assert "without a gradient for layer 4" in failure.message


def test_a_gradient_from_another_life_is_dropped_without_harm() -> None:
    bench, task = detached_bench()
    bench.hears("backward-0", push(task, 5))
    taken = bench.queue.try_pop()
    assert isinstance(taken, ApplyTask)
    assert bench.role.on_task_failed(taken, WrongLifeError("from life 6"), 0.0) == []
    assert not bench.role.failed


def test_a_failed_pass_ends_the_job_with_one_sentence() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    ((peer, failure),) = sent(bench.role.on_task_failed(task, RuntimeError("shapes differ"), 0.0), Failure)
    assert isinstance(failure, Failure)
    assert peer == "coordinator"
    assert failure.message == "forward pass of 0:0-1 failed in layers 2-3 on shard shard-1: shapes differ"
    assert bench.forward("shard-0", 1, 1) == []


@pytest.mark.parametrize("block", [0, 1])
def test_a_lost_neighbour_ends_the_job_unless_the_coordinator_does_so_before(block: int) -> None:
    bench = Bench(block)
    bench.start()
    bench.offer(0)
    bench.forward("forward-0" if block == 0 else "shard-0", 0, 0)
    assert bench.role.on_lost(f"shard-{block + 1}", 1.0) == []
    assert sent(bench.role.on_tick(5.9), Failure) == []
    assert len(sent(bench.role.on_tick(6.0), Failure)) == 1


def test_a_link_to_an_earlier_incarnation_of_the_neighbour_is_opened_again() -> None:
    bench = Bench(1)
    assert bench.role.on_lost("shard-2", 1.0) == [Connect("shard-2", "here:2")]
    assert bench.role.on_lost("shard-0", 1.0) == []  # that one links to us
    assert sent(bench.role.on_tick(60.0), Failure) == []
