"""Races at one block, message by message, on the simulated world's exact block."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from layerwise.applied import AppliedSet
from layerwise.errors import NotFiniteError, WrongLifeError
from layerwise.ids import Attempt, first_attempt
from layerwise.messages import (
    Abort,
    AttemptsClosed,
    BlockClosed,
    BlockPlace,
    BlockReport,
    BoundaryGradient,
    Closed,
    CutSaved,
    CutTaken,
    Decline,
    DetachedTask,
    Failure,
    Forward,
    Grant,
    Hosting,
    LayerFile,
    LayerRevision,
    LinkDown,
    Message,
    NamedTensors,
    NotFinite,
    Offer,
    Outcome,
    PushGradient,
    Ready,
    Reroute,
    StartTraining,
    Stop,
    StopAt,
    Stopping,
    TaskFinished,
    TaskRequest,
    Tensors,
)
from layerwise.plan import TrainingPlan
from layerwise.roles import Connect, Disconnect, Effect, End, Send
from layerwise.server.admission import GENERATION_BITS
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.shard_role import ShardRole
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import (
    ApplyTask,
    BackwardResult,
    BackwardTask,
    DetachTask,
    DropTask,
    EvaluateTask,
    FindResult,
    FindTask,
    ForwardTask,
    InputGradient,
    run_to_end,
)
from tests.simulation.counting_block import CountingBlock, FlushedLog, LayerCopy, activation, gradient, target

PLAN = TrainingPlan(num_samples=8, batch=2, accumulation=2, num_updates=6)
ROUTE = (
    BlockPlace(start=0, stop=2, shard="shard-0", address="here:0", life=5),
    BlockPlace(start=2, stop=4, shard="shard-1", address="here:1", life=6),
    BlockPlace(start=4, stop=6, shard="shard-2", address="here:2", life=7),
)


class Bench:
    """One block of ``route``, and one slot that works when it is told to."""

    def __init__(
        self,
        block: int,
        *,
        route: Sequence[BlockPlace] = ROUTE,
        window: int = 3,
        attached: bool = True,
        every: int = 2,
        drops: bool = False,
        synchronous: bool = False,
        copies: dict[int, LayerCopy] | None = None,
        version: int = 0,
    ) -> None:
        """``copies``: the block begins with a standby copy of ``version``."""
        self.now = 0.0
        self.cuts: list[int] = []
        self.standby: dict[int, dict[int, LayerCopy]] = {}
        self.place = route[block]
        self.compute = CountingBlock(
            start=self.place.start,
            stop=self.place.stop,
            num_layers=route[-1].stop,
            life=self.place.life,
            plan=PLAN,
            log=FlushedLog(),
            position_order=synchronous,
            frozen_below=0,
            restored=copies or {},
            on_cut=lambda version, copies: self.cuts.append(version),
            from_cut=copies is None,
            copied_every=1,
            on_copy=lambda version, copies: self.standby.__setitem__(version, copies),
        )
        self.queue = TaskQueue(window=window, num_layers=2, attached=attached)
        self.role = ShardRole(
            job="job",
            block=block,
            route=route,
            plan=PLAN,
            window=window,
            synchronous=synchronous,
            compute=self.compute,
            queue=self.queue,
            schedule=CutSchedule(final=PLAN.num_updates, intervals=(every,)),
            version=version,
            layer_names=[f"layer-{layer}" for layer in range(6)],
            task_seconds=10.0,
            drops_bad_samples=drops,
            from_cut=copies is None,
        )
        self.begun = self.role.begin(self.compute.applied(), 0.0)

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
                case DetachTask(backward=backward, job=job, life=life, have=have):
                    made = self.compute.detach(backward, job, life, have)
                    effects += self.role.on_task_done(task, made, self.now)
                case FindTask(attempt=lost):
                    found = FindResult(layer=self.compute.first_not_finite(lost))
                    effects += self.role.on_task_done(task, found, self.now)
                case ApplyTask():
                    run_to_end(self.compute.apply(task))
                    effects += self.role.on_task_done(task, None, self.now)
                case DropTask(attempt=given_up, reason=reason):
                    effects += self.role.on_task_done(task, self.compute.drop(given_up, reason), self.now)
                case EvaluateTask():
                    effects += self.role.on_task_done(task, run_to_end(self.compute.evaluate(task)), self.now)
        return effects

    def offer(self, index: int, worker: str = "forward-0", *, generation: int | None = None) -> list[Effect]:
        """``generation``: of the route that the microbatch was leased under; the role's own."""
        leased = attempt(index, self.role.hosting.generation if generation is None else generation)
        return self.hears(worker, Offer(job="job", attempt=leased, life=self.place.life))

    def ask(self, worker: str) -> list[Effect]:
        """A detached worker has nothing to do; what a slot then makes for it."""
        return self.hears(worker, request(worker, self.place.life)) + self.work()

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
        closed = attempt(index, self.role.hosting.generation)
        message = BlockClosed(
            job="job", attempt=closed, number=number, life=self.place.life, block=block, outcome=outcome
        )
        return self.hears(f"shard-{self.role.block + 1}", message)


def attempt(index: int, generation: int = 0) -> Attempt:
    return Attempt(PLAN.microbatch(index), first_attempt(generation))


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
    """At the last tick within its time: the next one would be too late."""
    bench, _ = detached_bench()
    bench.hears("backward-1", request("backward-1", 7))
    assert sent(bench.role.on_tick(9.7), DetachedTask) == []
    assert sent(bench.work(), DetachedTask) == []
    assert bench.role.on_tick(9.9) == []
    assert [peer for peer, _ in sent(bench.work(), DetachedTask)] == ["backward-1"]


def test_a_task_that_a_slot_makes_for_a_worker_that_is_gone_is_made_anew_for_the_next() -> None:
    bench = Bench(2, attached=False)
    bench.forward("shard-1", 0, 0)
    bench.work()
    held = tuple(LayerRevision(layer=layer, life=7, revision=0) for layer in (4, 5))
    assert bench.hears("backward-0", TaskRequest(job="job", life=7, have=held)) == []
    bench.role.on_lost("backward-0", 0.0)
    bench.hears("backward-0", request("backward-0", 7))  # it is back, with nothing
    ((peer, task),) = sent(bench.work(), DetachedTask)
    assert isinstance(task, DetachedTask)
    assert (peer, [state.layer for state in task.states]) == ("backward-0", [4, 5])


def test_a_worker_that_comes_and_goes_gives_the_slots_no_more_to_do() -> None:
    bench = Bench(2, attached=False)
    bench.forward("shard-1", 0, 0)
    bench.work()
    for _ in range(100):
        bench.hears("backward-0", request("backward-0", 7))
        bench.role.on_lost("backward-0", 0.0)
    assert len(bench.queue) == 1


def test_a_task_that_nobody_waits_for_any_more_may_fail() -> None:
    bench = Bench(2, attached=False)
    bench.forward("shard-1", 0, 0)
    bench.work()
    bench.hears("backward-0", request("backward-0", 7))
    stale = bench.queue.try_pop()
    assert isinstance(stale, DetachTask)
    bench.role.on_lost("backward-0", 0.0)
    assert bench.role.on_task_failed(stale, KeyError("nothing is kept"), 0.0) == []
    bench.hears("backward-1", request("backward-1", 7))
    task = bench.queue.try_pop()
    assert isinstance(task, DetachTask)
    ((_, failure),) = sent(bench.role.on_task_failed(task, RuntimeError("out of memory"), 0.0), Failure)
    assert isinstance(failure, Failure)
    assert failure.message.startswith("backward pass of 0:0-1 for backward-1 failed in layers 4-5 on shard shard-2")


def test_nobody_can_finish_what_it_has_not_been_given_yet() -> None:
    bench = Bench(2, attached=False)
    bench.forward("shard-1", 0, 0)
    bench.work()
    bench.hears("backward-0", request("backward-0", 7))
    early = TaskFinished(job="job", attempt=attempt(0), number=0, life=7, gradients=gradient(0, 3))
    assert bench.hears("backward-0", early) == []
    assert [peer for peer, _ in sent(bench.work(), DetachedTask)] == ["backward-0"]


def test_a_slot_looks_for_what_is_not_finite() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.work()
    bench.compute.not_finite = (0, 3)
    assert bench.hears("shard-2", NotFinite(job="job", attempt=attempt(0), number=0, life=6)) == []
    ((peer, failure),) = sent(bench.work(), Failure)
    assert isinstance(failure, Failure)
    assert peer == "coordinator"
    assert "layer 3 (layer-3) is the first whose output is not finite" in failure.message


def test_a_worker_that_leaves_a_layer_out_loses_the_task_and_in_the_end_the_job() -> None:
    bench, task = detached_bench()
    bench.hears("backward-0", push(task, 5))
    bench.work()
    assert bench.hears("backward-0", finished(task, None)) == []
    for _ in range(6):
        ((peer, again),) = sent(bench.ask("backward-0"), DetachedTask)
        assert isinstance(again, DetachedTask)
        assert (peer, again.attempt) == ("backward-0", task.attempt)
        assert bench.hears("backward-0", finished(again, None)) == []
    bench.ask("backward-0")
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
    ((peer, failure),) = sent(bench.role.on_task_failed(task, RuntimeError("shapes\ndiffer"), 0.0), Failure)
    assert isinstance(failure, Failure)
    assert peer == "coordinator"
    assert failure.message == "forward pass of 0:0-1 failed in layers 2-3 on shard shard-1: RuntimeError: shapes differ"
    assert bench.forward("shard-0", 1, 1) == []


@pytest.mark.parametrize("rerouted", [False, True])
def test_a_pass_without_memory_ends_the_process_and_not_the_job(rerouted: bool) -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    if rerouted:
        bench.hears("coordinator", Reroute(job="job", route=ROUTE, block=1, generation=2, durable=0))
    sentence = "forward pass of 0:0-1 failed in layers 2-3 on shard shard-1: memory ran out (MemoryError)"
    assert bench.role.on_task_failed(task, MemoryError(), 0.0) == [
        Send("coordinator", Failure(job="job", message=sentence, memory=True)),
        End(sentence),
    ]
    assert bench.role.failed


@pytest.mark.parametrize("block", [0, 1])
def test_a_lost_neighbour_is_told_to_the_coordinator_who_knows_what_it_means(block: int) -> None:
    bench = Bench(block)
    bench.start()
    bench.offer(0)
    bench.forward("forward-0" if block == 0 else "shard-0", 0, 0)
    peer = f"shard-{block + 1}"
    down = LinkDown(job="job", peer=peer, generation=0)
    assert bench.role.on_lost(peer, 1.0) == [Send("coordinator", down)]
    assert sent(bench.role.on_tick(60.0), Failure) == []
    assert not bench.role.failed


def test_an_abort_that_was_the_first_to_go_over_a_link_is_not_lost_with_it() -> None:
    """Nobody else says so again, and the number would be open for ever."""
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    assert sent(bench.role.on_lost("forward-0", 1.0), Abort)
    down = LinkDown(job="job", peer="shard-1", generation=0)
    assert bench.role.on_lost("shard-1", 1.0) == [Send("coordinator", down)]


def test_a_link_to_an_earlier_incarnation_of_the_neighbour_is_opened_again() -> None:
    bench = Bench(1)
    assert bench.role.on_lost("shard-2", 1.0) == [Connect("shard-2", "here:2")]
    assert bench.role.on_lost("shard-0", 1.0) == []  # that one links to us
    assert sent(bench.role.on_tick(60.0), Failure) == []


# A new route ----------------------------------------------------------------------------------------------------------

GENERATION = 3


def reroute(
    *, route: Sequence[BlockPlace] = ROUTE, block: int, generation: int = GENERATION, durable: int = 0
) -> Reroute:
    return Reroute(job="job", route=tuple(route), block=block, generation=generation, durable=durable)


def moved(block: int, shard: str, life: int) -> tuple[BlockPlace, ...]:
    """The route with one block at another shard, in a new life."""
    there = replace(ROUTE[block], shard=shard, address=f"there:{block}", life=life)
    return (*ROUTE[:block], there, *ROUTE[block + 1 :])


def number(count: int, generation: int = GENERATION) -> int:
    return (generation << GENERATION_BITS) + count


def ready_of(effects: list[Effect]) -> Ready:
    ((peer, ready),) = sent(effects, Ready)
    assert isinstance(ready, Ready)
    assert peer == "coordinator"
    return ready


def test_after_a_new_route_an_idle_block_connects_anew_and_says_what_its_layers_have() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.work()
    bench.boundary(0, 0)
    bench.work()
    effects = bench.hears("coordinator", reroute(route=moved(2, "shard-9", 11), block=1))
    assert effects[:2] == [Disconnect("shard-2"), Connect("shard-9", "there:2")]
    ready = ready_of(effects)
    assert (ready.generation, ready.block) == (GENERATION, 1)
    assert [AppliedSet.from_json(json.loads(text)).watermark for text in ready.applied_json] == [1, 1]
    assert bench.role.hosting == Hosting(job="job", block=1, life=6, generation=GENERATION)


def test_the_link_to_a_neighbour_that_stays_is_not_closed() -> None:
    bench = Bench(1)
    effects = bench.hears("coordinator", reroute(block=1))
    assert effects[0] == Connect("shard-2", "here:2")


def test_what_was_under_way_is_aborted_and_can_be_begun_again_as_another_attempt() -> None:
    bench = Bench(1)
    for index in range(3):
        bench.forward("shard-0", index, index)
    bench.work()
    bench.boundary(0, 0)  # waits in the queue
    assert (bench.role.num_open, bench.compute.store_bytes) == (3, 3)
    ready = ready_of(bench.hears("coordinator", reroute(block=1)))
    assert (bench.role.num_open, bench.compute.store_bytes, len(bench.queue)) == (0, 0, 0)
    assert [len(AppliedSet.from_json(json.loads(text))) for text in ready.applied_json] == [0, 0]
    again = Attempt(PLAN.microbatch(0), 2)
    forward = Forward(
        job="job",
        attempt=again,
        number=number(0),
        life=6,
        needed_from=0,
        inputs=activation(0, 1),
        targets=target(0),
    )
    bench.hears("shard-0", forward)
    assert kinds(bench.work()) == ["Forward"]
    gradients = gradient(0, 3)
    bench.hears("shard-2", BoundaryGradient(job="job", attempt=again, number=number(0), life=6, gradients=gradients))
    assert kinds(bench.work()) == ["BoundaryGradient", "BlockClosed"]


def test_a_microbatch_that_the_block_has_only_passes_its_gradient_on_after_a_new_route() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.work()
    bench.boundary(0, 0)
    bench.work()
    bench.hears("coordinator", reroute(route=moved(0, "shard-7", 9), block=1))
    again = Attempt(PLAN.microbatch(0), 2)
    forward = Forward(
        job="job",
        attempt=again,
        number=number(0),
        life=6,
        needed_from=0,
        inputs=activation(0, 1),
        targets=target(0),
    )
    bench.hears("shard-7", forward)
    bench.work()
    bench.hears(
        "shard-2",
        BoundaryGradient(job="job", attempt=again, number=number(0), life=6, gradients=gradient(0, 3)),
    )
    effects = bench.work()
    assert [(peer, type(message).__name__) for peer, message in sent(effects, BoundaryGradient)] == [
        ("shard-7", "BoundaryGradient")
    ]
    ((peer, closed),) = sent(effects, BlockClosed)
    assert isinstance(closed, BlockClosed)
    assert (peer, closed.life) == ("shard-7", 9)
    assert [layer.version for layer in bench.compute.report()] == [0, 0]  # it did not count twice: an update takes 2


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_slot_computes_is_waited_for_before_the_block_is_ready_and_then_forgotten(fails: bool) -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.forward("shard-0", 1, 1)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    assert bench.hears("coordinator", reroute(block=1)) == []
    assert bench.queue.try_pop() is None  # what waited is gone
    assert bench.role.on_tick(50.0) == []
    if fails:
        effects = bench.role.on_task_failed(task, RuntimeError("refused"), 0.0)
    else:
        effects = bench.role.on_task_done(task, run_to_end(bench.compute.forward(task)), 0.0)
    assert kinds(effects) == ["Ready"]
    assert not bench.role.failed
    assert (bench.role.num_open, bench.compute.store_bytes) == (0, 0)


def last_block_computes_backward() -> tuple[Bench, BackwardTask]:
    bench = Bench(2)
    bench.forward("shard-1", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    bench.role.on_task_done(task, run_to_end(bench.compute.forward(task)), 0.0)
    following = bench.queue.try_pop()
    assert isinstance(following, BackwardTask)
    return bench, following


def test_an_input_gradient_goes_on_before_the_updates_and_the_report_behind_them() -> None:
    bench, task = last_block_computes_backward()
    early = bench.role.on_task_done(task, InputGradient(gradients=Tensors((1,))), 0.0)
    assert kinds(early) == ["BoundaryGradient"]
    assert (bench.queue.num_running, bench.role.num_open) == (1, 1), "the slot is at work still"
    assert kinds(bench.role.on_task_done(task, BackwardResult(gradients=None), 0.0)) == ["BlockClosed"]
    assert (bench.queue.num_running, bench.role.num_open) == (0, 0)


def test_an_input_gradient_of_what_is_given_up_goes_nowhere() -> None:
    bench, task = last_block_computes_backward()
    bench.hears("coordinator", reroute(block=2))
    assert bench.role.on_task_done(task, InputGradient(gradients=Tensors((1,))), 0.0) == []
    assert kinds(bench.role.on_task_done(task, BackwardResult(gradients=None), 0.0)) == ["Ready"]


def test_a_gradient_that_a_slot_was_taking_in_is_among_what_the_block_says_it_has() -> None:
    bench = Bench(2)
    bench.forward("shard-1", 0, 0)
    first = bench.queue.try_pop()
    assert isinstance(first, ForwardTask)
    bench.role.on_task_done(first, run_to_end(bench.compute.forward(first)), 0.0)
    task = bench.queue.try_pop()
    assert isinstance(task, BackwardTask)
    assert bench.hears("coordinator", reroute(block=2)) == []
    ready = ready_of(bench.role.on_task_done(task, run_to_end(bench.compute.backward(task)), 0.0))
    assert [0 in AppliedSet.from_json(json.loads(text)) for text in ready.applied_json] == [True, True]


def test_while_a_slot_still_computes_messages_of_what_is_given_up_are_dropped() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    bench.hears("coordinator", reroute(block=1))
    assert bench.forward("shard-0", 1, 1) == []
    assert bench.hears("shard-0", Abort(job="job", attempt=attempt(0), number=0, life=6)) == []
    assert bench.role.num_open == 1
    assert kinds(bench.role.on_task_done(task, run_to_end(bench.compute.forward(task)), 0.0)) == ["Ready"]


def test_numbers_of_another_generation_are_refused() -> None:
    bench = Bench(1)
    bench.hears("coordinator", reroute(block=1))
    refused = bench.role.num_refused
    assert bench.forward("shard-0", 0, 0) == []
    assert bench.forward("shard-0", 0, number(0, GENERATION + 1)) == []
    assert bench.hears("shard-0", Abort(job="job", attempt=attempt(0), number=1, life=6)) == []
    assert bench.closed_by(2, 0, 0) == []
    assert (bench.role.num_refused - refused, bench.role.num_open) == (4, 0)
    bench.forward("shard-0", 0, number(0))
    assert bench.role.num_open == 1


def test_only_the_coordinator_s_newer_routes_count() -> None:
    bench = Bench(1)
    assert bench.hears("shard-0", reroute(block=1)) == []
    assert ready_of(bench.hears("coordinator", reroute(block=1))).generation == GENERATION
    assert bench.hears("coordinator", reroute(block=1)) == []
    assert bench.hears("coordinator", reroute(block=1, generation=GENERATION - 1)) == []


def test_a_second_new_route_while_a_slot_computes_replaces_the_first() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    bench.hears("coordinator", reroute(route=moved(2, "shard-8", 8), block=1))
    bench.hears("coordinator", reroute(route=moved(2, "shard-9", 9), block=1, generation=GENERATION + 1))
    effects = bench.role.on_task_done(task, run_to_end(bench.compute.forward(task)), 0.0)
    assert effects[:2] == [Disconnect("shard-2"), Connect("shard-9", "there:2")]
    assert ready_of(effects).generation == GENERATION + 1


def test_cuts_that_may_not_be_durable_are_told_of_again() -> None:
    bench = Bench(1)
    files = (LayerFile(layer=2, life=6, name="layer-2", num_bytes=1, digest="d"),)
    bench.role.on_cut_taken(2, 0.0)
    bench.role.on_cut_saved(2, files, "", 0.0)
    bench.role.on_cut_taken(4, 0.0)
    bench.role.on_cut_saved(4, (), "the disk is full", 0.0)
    bench.role.on_cut_taken(6, 0.0)  # is being saved
    effects = bench.hears("coordinator", reroute(block=1, durable=2))
    told = [one.message for one in effects if isinstance(one, Send) and isinstance(one.message, CutTaken | CutSaved)]
    assert told == [
        CutTaken(job="job", block=1, version=2),
        CutSaved(job="job", block=1, version=2, files=files),
        CutTaken(job="job", block=1, version=4),
        CutSaved(job="job", block=1, version=4, error="the disk is full"),
        CutTaken(job="job", block=1, version=6),
    ]
    effects = bench.hears("coordinator", reroute(block=1, generation=GENERATION + 1, durable=6))
    assert [message for _, message in sent(effects, CutTaken)] == [CutTaken(job="job", block=1, version=6)]
    assert kinds(bench.role.on_cut_saved(6, files, "", 0.0)) == ["CutSaved"]


def test_what_a_saved_cut_waits_for_is_told_at_once() -> None:
    """All else waits for a quarter of a second, while others are under way."""
    bench = Bench(0)
    bench.start()

    def close(index: int) -> bool:
        bench.offer(index)
        bench.offer(index + 1)
        bench.forward("forward-0", index, index)
        bench.work()
        bench.boundary(index, index)
        bench.work()
        bench.closed_by(1, index, index)
        return "AttemptsClosed" in kinds(bench.closed_by(2, index, index))

    close(0)
    assert not close(1)
    assert kinds(bench.role.on_cut_saved(1, (), "", 0.0)) == ["AttemptsClosed", "CutSaved"]
    assert not close(2)
    assert kinds(bench.role.on_cut_saved(2, (), "", 0.0)) == ["AttemptsClosed", "CutSaved"]  # three of its four
    assert close(3)
    assert not close(4)


def test_the_first_shard_tells_what_has_closed_and_then_admits_in_the_numbers_of_the_new_generation() -> None:
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    bench.forward("forward-0", 0, 0)
    bench.work()
    bench.boundary(0, 0)
    bench.work()
    bench.closed_by(1, 0, 0)
    bench.closed_by(2, 0, 0)
    bench.offer(1)
    effects = bench.hears("coordinator", reroute(block=0))
    assert bench.role.num_open == 0
    ready_of(effects)
    assert bench.offer(2) == []  # not before the coordinator says that all are ready
    done = json.dumps(AppliedSet(watermark=1).to_json())
    ((peer, grant),) = sent(bench.hears("coordinator", StartTraining(job="job", done_json=done)), Grant)
    assert isinstance(grant, Grant)
    assert (peer, grant.attempt, grant.number) == ("forward-0", attempt(2, GENERATION), number(0))


def test_an_offer_that_was_on_its_way_while_the_route_changed_holds_no_place() -> None:
    """Its worker forgets it with the route; granted, its number would be open until the time limit."""
    bench = Bench(0, window=1)
    bench.start()
    bench.hears("coordinator", reroute(block=0))
    assert bench.offer(0, generation=0) == []
    bench.start()
    assert bench.role.num_open == 0
    assert bench.offer(1, generation=0) == []
    assert len(sent(bench.offer(0), Grant)) == 1


def test_closed_numbers_that_were_not_told_yet_are_told_before_the_first_shard_is_ready() -> None:
    bench = Bench(0)
    bench.start()
    bench.offer(0)
    bench.role.on_lost("forward-0", 0.0)
    bench.closed_by(1, 0, 0, Outcome.ABORTED)
    told = bench.closed_by(2, 0, 0, Outcome.ABORTED)
    effects = bench.hears("coordinator", reroute(block=0))
    order = [kind for kind in kinds(told + effects) if kind in ("AttemptsClosed", "Ready")]
    assert order == ["AttemptsClosed", "Ready"]


def test_a_stop_waits_for_the_start_of_the_new_generation_and_completes_what_some_layers_have() -> None:
    bench = Bench(0)
    bench.start()
    bench.hears("coordinator", reroute(block=0))
    assert bench.hears("coordinator", Stop(job="job")) == []
    done, held = (json.dumps(one.to_json()) for one in (AppliedSet(watermark=2), AppliedSet(watermark=3)))
    effects = bench.hears("coordinator", StartTraining(job="job", done_json=done, held_json=held))
    assert [message for _, message in sent(effects, Stopping)] == [Stopping(job="job", version=2)]


def test_the_first_shard_learns_from_the_route_which_cuts_are_durable() -> None:
    bench = Bench(0, every=1)
    bench.hears("coordinator", reroute(block=0, durable=3))
    bench.start()
    granted = []
    for index in range(2 * PLAN.num_updates):
        granted += sent(bench.offer(index), Grant)
        if granted and isinstance(granted[-1][1], Grant):
            bench.role.on_lost("forward-0", 0.0)
            last = granted[-1][1].number
            for block in (1, 2):
                bench.closed_by(block, index, last, Outcome.ABORTED)
    assert len(granted) == 2 * PLAN.num_updates


def test_a_link_that_breaks_after_the_new_route_was_used_is_told_with_its_generation() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.hears("coordinator", reroute(block=1))
    task = bench.queue.try_pop()
    assert task is None
    assert bench.role.on_lost("shard-2", 0.0) == [
        Connect("shard-2", "here:2")
    ]  # the old link: nothing used the new one
    bench.forward("shard-0", 0, number(0))
    down = LinkDown(job="job", peer="shard-0", generation=GENERATION)
    assert bench.role.on_lost("shard-0", 0.0) == [Send("coordinator", down)]


def test_a_detached_worker_s_task_is_forgotten_and_it_asks_again_under_the_new_route() -> None:
    bench, task = detached_bench()
    bench.hears("backward-0", push(task, 5))
    bench.hears("coordinator", reroute(block=2))
    assert bench.role.num_open == 0
    bench.hears("backward-0", push(task, 4))
    assert bench.hears("backward-0", finished(task, gradient(0, 3))) == []
    assert bench.work() == []
    bench.hears("backward-0", request("backward-0", 7))
    again = Attempt(PLAN.microbatch(0), 2)
    forward = Forward(
        job="job",
        attempt=again,
        number=number(0),
        life=7,
        needed_from=0,
        inputs=activation(0, 3),
        targets=target(0),
    )
    bench.hears("shard-1", forward)
    ((peer, new),) = sent(bench.work(), DetachedTask)
    assert isinstance(new, DetachedTask)
    assert (peer, new.attempt, new.number, new.lacking) == ("backward-0", again, number(0), (4, 5))


def test_a_role_that_has_failed_takes_no_new_route() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    bench.role.on_task_failed(task, RuntimeError("shapes differ"), 0.0)
    assert kinds(bench.hears("coordinator", reroute(block=1))) == [
        "Failure"
    ]  # the coordinator was away when it was told


def test_cuts_are_told_of_before_the_block_is_ready_so_that_the_coming_training_knows_them_from_its_start() -> None:
    bench = Bench(1)
    bench.role.on_cut_taken(2, 0.0)
    effects = bench.hears("coordinator", reroute(block=1, durable=2))
    assert [kind for kind in kinds(effects) if kind in ("CutTaken", "Ready")] == ["CutTaken", "Ready"]


def test_a_block_that_can_not_go_on_tells_a_coordinator_that_was_away_once_more() -> None:
    bench = Bench(2)
    bench.compute.not_finite = (0, 4)
    bench.forward("shard-1", 0, 0)
    [(_, told)] = sent(bench.work(), Failure)
    assert isinstance(told, Failure)
    assert told.diverged == bench.place.life
    assert bench.forward("shard-1", 1, 1) == []
    assert sent(bench.hears("coordinator", reroute(block=2, durable=0)), Failure) == [("coordinator", told)]


@pytest.mark.parametrize("on_the_way", [False, True], ids=["training", "while a new route waits"])
def test_a_gradient_that_is_not_finite_is_told_as_a_divergence_of_the_block(on_the_way: bool) -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    task = bench.queue.try_pop()
    assert isinstance(task, ForwardTask)
    if on_the_way:
        assert bench.hears("coordinator", reroute(block=1)) == []
    effects = bench.role.on_task_failed(task, NotFiniteError("the gradient of layer 2 is not finite"), 0.0)
    said = Failure(job="job", message="the gradient of layer 2 is not finite", diverged=bench.place.life)
    assert sent(effects, Failure) == [("coordinator", said)]
    assert bench.role.failed


# Standby copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "cuts"), [(1, []), (2, [2])], ids=["between cuts", "at a cut"])
def test_a_block_that_begins_with_a_standby_copy_saves_it_only_where_a_cut_is_due(
    version: int, cuts: list[int]
) -> None:
    """A cut there is not on disk yet, and nobody else can make it whole."""
    before = Bench(2, every=2)
    for index in range(4):
        before.forward("shard-1", index, index)
        before.work()
    assert sorted(before.standby) == [1, 2]
    bench = Bench(2, every=2, copies=before.standby[version], version=version)
    assert kinds(bench.begun) == ["Ready"], "the shell tells of the cut once it is taken"
    ((_, ready),) = sent(bench.begun, Ready)
    assert ready.version == version  # type: ignore[attr-defined]
    assert bench.cuts == cuts
    for index in range(2 * version, 8):
        bench.forward("shard-1", index, index)
        bench.work()
    assert bench.cuts == [*cuts, *(one for one in (2, 4) if one > version)]
