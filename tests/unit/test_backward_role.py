from __future__ import annotations

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Assignment,
    BlockPlace,
    DetachedTask,
    Failure,
    LayerRevision,
    LayerState,
    NamedTensors,
    PushGradient,
    Ready,
    TaskFinished,
    TaskRequest,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Connect, Send
from layerwise.worker.backward_role import BackwardRole, Build, Execute, Leave

LIFE = 4
ROUTE = (
    BlockPlace(start=0, stop=2, shard="shard-0", address="here:0", life=3),
    BlockPlace(start=2, stop=4, shard="shard-1", address="here:1", life=LIFE),
)
ASSIGNMENT = Assignment(
    job="job", spec_json="{}", settings_json="{}", profile_json="{}", route=ROUTE, block=1, cut=0, directory="", generation=1
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
    assert role.on_message("coordinator", Unassign(job="job"), 0.0) == [Send("coordinator", Unassigned(job="job"))]
    assert role.take_requests() == [Leave(job="job")]
    assert role.on_gradient("job", gradient(first), 0.0) == []
