from __future__ import annotations

from dataclasses import replace

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Assignment,
    BlockPlace,
    DetachedTask,
    Failure,
    Hosting,
    LayerRevision,
    LayerState,
    NamedTensors,
    PushGradient,
    Ready,
    Reroute,
    TaskFinished,
    TaskRequest,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Connect, Disconnect, Send
from layerwise.worker.backward_role import BackwardRole, Build, Execute, Leave

LIFE = 4
ROUTE = (
    BlockPlace(start=0, stop=2, shard="shard-0", address="here:0", life=3),
    BlockPlace(start=2, stop=4, shard="shard-1", address="here:1", life=LIFE),
)
ASSIGNMENT = Assignment(
    job="job",
    spec_json="{}",
    settings_json="{}",
    profile_json="{}",
    route=ROUTE,
    block=1,
    cut=0,
    directory="",
    generation=1,
)


def task(number: int, revision: int = 1, *, life: int = LIFE) -> DetachedTask:
    return DetachedTask(
        job="job",
        attempt=Attempt(Microbatch(0, number, number + 1)),
        number=number,
        life=life,
        inputs=Tensors(("inputs",)),
        targets=None,
        gradients=Tensors(("gradient",)),
        buffers=(),
        lacking=(2, 3),
        input_gradient=True,
        states=(LayerState(layer=3, life=life, revision=revision, version=revision, parameters=NamedTensors((), ())),),
    )


def gradient(of: DetachedTask) -> PushGradient:
    return PushGradient(
        job="job",
        attempt=of.attempt,
        number=of.number,
        layer=3,
        life=LIFE,
        revision=1,
        read=1,
        gradients=NamedTensors((), ()),
    )


def finished(of: DetachedTask) -> TaskFinished:
    return TaskFinished(job="job", attempt=of.attempt, number=of.number, life=LIFE, gradients=None)


def request(*have: tuple[int, int]) -> Send:
    held = tuple(LayerRevision(layer=layer, life=LIFE, revision=revision) for layer, revision in have)
    return Send("shard-1", TaskRequest(job="job", life=LIFE, have=held))


def built_role() -> BackwardRole:
    role = BackwardRole()
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    assert role.take_requests() == [Build(assignment=ASSIGNMENT)]
    ready = Send("coordinator", Ready(job="job", block=1, generation=1))
    assert role.on_built("job", 0.0) == [Connect("shard-1", "here:1"), ready, request()]
    return role


def test_a_task_is_executed_pushed_layer_by_layer_and_followed_by_the_next_request() -> None:
    role, first = built_role(), task(0)
    assert role.on_message("shard-1", first, 0.0) == []
    assert role.take_requests() == [Execute(job="job", task=first)]
    assert role.on_gradient("job", gradient(first), 0.0) == [Send("shard-1", gradient(first))]
    assert role.on_executed("job", finished(first), 0.0) == [Send("shard-1", finished(first)), request((3, 1))]


def test_an_idle_worker_asks_again() -> None:
    role = built_role()
    assert role.on_tick(0.9) == []
    assert role.on_tick(1.0) == [request()]
    role.on_message("shard-1", task(0), 1.1)
    assert role.on_tick(9.0) == []


def test_a_task_from_another_life_or_shard_is_refused() -> None:
    role = built_role()
    role.on_message("shard-1", task(0, life=LIFE - 1), 0.0)
    role.on_message("shard-0", task(0), 0.0)
    assert role.take_requests() == []


def test_a_newer_task_says_that_the_one_before_was_taken_back() -> None:
    role, first, second = built_role(), task(0), task(1)
    role.on_message("shard-1", first, 0.0)
    role.on_message("shard-1", second, 0.0)
    assert role.on_gradient("job", gradient(first), 0.0) == []
    assert role.on_executed("job", finished(first), 0.0) == []
    assert len(role.on_executed("job", finished(second), 0.0)) == 2


def test_a_lost_shard_gets_a_new_link_and_the_task_is_left_to_it() -> None:
    role, first = built_role(), task(0)
    role.on_message("shard-1", first, 0.0)
    assert role.on_lost("shard-1", 1.0) == []
    assert role.on_gradient("job", gradient(first), 1.5) == []
    assert role.on_tick(1.9) == []
    assert role.on_tick(2.0) == [Connect("shard-1", "here:1"), request((3, 1))]


def test_a_pass_that_raises_fails_the_job() -> None:
    role, first = built_role(), task(0)
    role.on_message("shard-1", first, 0.0)
    effects = role.on_execute_failed("job", first, "shapes differ", 0.0)
    assert effects == [Send("coordinator", Failure(job="job", message="shapes differ"))]


def test_an_unassigned_worker_leaves_the_job() -> None:
    role, first = built_role(), task(0)
    role.on_message("shard-1", first, 0.0)
    role.take_requests()
    left = [Disconnect("shard-1"), Send("coordinator", Unassigned(job="job"))]
    assert role.on_message("coordinator", Unassign(job="job"), 0.0) == left
    assert role.take_requests() == [Leave(job="job")]
    assert role.on_gradient("job", gradient(first), 0.0) == []
    assert role.on_message("coordinator", Unassign(job="job"), 0.0) == left[1:]


def test_a_worker_that_is_assigned_anew_takes_no_task_of_the_link_before() -> None:
    role = built_role()
    role.on_message("shard-1", task(0), 0.0)
    role.take_requests()
    # The shard still thinks that the worker has the states that it brought, and may have sent the next task.
    assert role.on_message("coordinator", ASSIGNMENT, 1.0) == [Disconnect("shard-1")]
    assert role.take_requests() == [Leave(job="job"), Build(assignment=ASSIGNMENT)]
    assert role.on_built("job", 2.0) == [Connect("shard-1", "here:1"), ready(1), request()]


def test_the_link_to_a_shard_that_another_job_needs_stays() -> None:
    role = built_role()
    role.on_message("coordinator", replace(ASSIGNMENT, job="other"), 0.0)
    assert role.on_message("coordinator", Unassign(job="job"), 1.0) == [Send("coordinator", Unassigned(job="job"))]
    assert role.on_message("coordinator", Unassign(job="other"), 1.0)[0] == Disconnect("shard-1")


# A new route ----------------------------------------------------------------------------------------------------------


def reroute(shard: str = "shard-1", life: int = LIFE, generation: int = 4) -> Reroute:
    own = BlockPlace(start=2, stop=4, shard=shard, address=f"there:{shard}", life=life)
    return Reroute(job="job", route=(ROUTE[0], own), block=1, generation=generation, durable=0)


def ready(generation: int) -> Send:
    return Send("coordinator", Ready(job="job", block=1, generation=generation))


def test_a_new_route_gives_the_task_up_and_keeps_the_layer_states_of_the_same_life() -> None:
    role, first = built_role(), task(0)
    role.on_message("shard-1", first, 0.0)
    effects = role.on_message("coordinator", reroute(), 1.0)
    assert effects == [Connect("shard-1", "there:shard-1"), ready(4), request((3, 1))]
    assert role.on_gradient("job", gradient(first), 1.0) == []
    assert role.on_executed("job", finished(first), 1.0) == []
    assert role.on_execute_failed("job", first, "refused", 1.0) == []


def test_a_block_in_a_new_life_at_another_shard_is_asked_without_any_states() -> None:
    role = built_role()
    role.on_message("shard-1", task(0), 0.0)
    effects = role.on_message("coordinator", reroute("shard-7", LIFE + 5), 1.0)
    asked = Send("shard-7", TaskRequest(job="job", life=LIFE + 5))
    assert effects == [Disconnect("shard-1"), Connect("shard-7", "there:shard-7"), ready(4), asked]
    role.take_requests()
    role.on_message("shard-1", task(1), 2.0)
    role.on_message("shard-7", task(1), 2.0)  # of the life before
    assert role.take_requests() == []
    new = task(2, life=LIFE + 5)
    role.on_message("shard-7", new, 2.0)
    assert role.take_requests() == [Execute(job="job", task=new)]


def test_a_worker_whose_layers_are_not_built_yet_answers_for_the_newest_route_once_they_are() -> None:
    role = BackwardRole()
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    assert role.on_message("coordinator", reroute("shard-7"), 0.5) == [Disconnect("shard-1")]
    assert role.on_built("job", 1.0) == [
        Connect("shard-7", "there:shard-7"),
        ready(4),
        Send("shard-7", TaskRequest(job="job", life=LIFE)),
    ]


def test_a_worker_that_waited_for_its_link_uses_that_of_the_new_route_at_once() -> None:
    role = built_role()
    role.on_lost("shard-1", 1.0)
    assert role.on_message("coordinator", reroute(), 1.1)[0] == Connect("shard-1", "there:shard-1")
    assert role.on_tick(2.05) == []
    assert role.on_tick(2.1) == [request()]


def test_only_newer_routes_of_the_coordinator_count() -> None:
    role = built_role()
    assert role.on_message("shard-1", reroute(), 1.0) == []
    assert role.on_message("coordinator", reroute(generation=1), 1.0) == []
    assert role.on_message("coordinator", replace(reroute(), route=()), 1.0) == []
    other = Reroute(job="other", route=ROUTE, block=1, generation=9, durable=0)
    assert role.on_message("coordinator", other, 1.0) == []


def test_what_a_worker_works_for_is_what_it_tells_a_coordinator_that_was_started_again() -> None:
    role = built_role()
    assert role.hosting == (Hosting(job="job", block=1, life=LIFE, generation=1),)
    role.on_message("coordinator", reroute(life=LIFE + 5), 1.0)
    assert role.hosting == (Hosting(job="job", block=1, life=LIFE + 5, generation=4),)
    role.on_message("coordinator", Unassign(job="job"), 2.0)
    assert role.hosting == ()
