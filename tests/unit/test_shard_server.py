"""What a shard's process does around its blocks: one at a time of a job speaks, and none is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from layerwise.ids import COORDINATOR, Attempt, Microbatch
from layerwise.messages import Assignment, BlockPlace, CommitCut, LayerFile, Tensors, Unassign, Unassigned
from layerwise.roles import Effect, Send
from layerwise.server.shard import ShardServer
from layerwise.server.slots import Slots
from layerwise.server.task_queue import TaskQueue
from layerwise.service import Service
from layerwise.tasks import BackwardResult, BackwardTask, BlockCompute, InputGradient, Steps, Task, TaskResult
from tests.unit.played_service import PlayedService


class World:
    """Blocks that note what happens to them, by life; ``gates`` hold back the building of a life."""

    def __init__(self) -> None:
        self.gates: dict[int, threading.Event] = {}
        self.begun: list[int] = []
        self.closed: list[int] = []
        self.heard: list[tuple[int, Task]] = []
        self.reports: dict[int, Callable[[Task, TaskResult | Exception], None]] = {}

    def make(self, assignment: Assignment, *, report: Callable[[Task, TaskResult | Exception], None], **_: Any) -> Any:
        life = assignment.route[0].life
        if life in self.gates:
            assert self.gates[life].wait(30)
        self.reports[life] = report

        def done(task: Task, result: TaskResult, now: float) -> list[Effect]:
            self.heard.append((life, task))
            return []

        def begin(now: float) -> list[Effect]:
            self.begun.append(life)
            return []

        def commit(message: CommitCut) -> None:
            assert self.gates[-life].wait(30)

        return SimpleNamespace(
            begin=begin,
            close=lambda: self.closed.append(life),
            commit=commit,
            events=SimpleNamespace(flush=lambda: None),
            on_task=done,
        )


def assignment(life: int) -> Assignment:
    route = (BlockPlace(start=0, stop=1, shard="shard-0", address="", life=life),)
    return Assignment(
        job="job",
        spec_json="",
        settings_json="",
        profile_json="",
        route=route,
        block=0,
        cut=0,
        directory="",
        generation=1,
    )


def play(monkeypatch: pytest.MonkeyPatch, scene: Any) -> None:
    async def run() -> None:
        world, loop = World(), PlayedService()
        monkeypatch.setattr("layerwise.server.shard.HostedBlock", world.make)
        await scene(world, loop, ShardServer(cast(Service, loop), torch.device("cpu")))
        assert not loop.errors

    asyncio.run(run())


def test_a_block_that_is_built_after_its_job_was_assigned_anew_is_closed_unheard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, loop: PlayedService, server: ShardServer) -> None:
        world.gates[1] = threading.Event()
        for message in (assignment(1), Unassign(job="job"), assignment(2)):
            server.on_message(COORDINATOR, message, 0.0)
        world.gates[1].set()
        await loop.until(lambda: world.begun == [2])
        await server.close()
        assert world.begun == [2]
        assert sorted(world.closed) == [1, 2]

    play(monkeypatch, scene)


def test_what_a_former_blocks_slot_still_reports_does_not_reach_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World, loop: PlayedService, server: ShardServer) -> None:
        server.on_message(COORDINATOR, assignment(1), 0.0)
        await loop.until(lambda: world.begun == [1])
        server.on_message(COORDINATOR, assignment(2), 0.0)
        await loop.until(lambda: world.begun == [1, 2])
        late, own = (BackwardTask(attempt=Attempt(Microbatch(0, 0, 1)), number=n, gradients=None) for n in (0, 1))
        world.reports[1](late, BackwardResult(gradients=None))
        world.reports[2](own, BackwardResult(gradients=None))
        await loop.until(lambda: bool(world.heard))
        await server.close()
        assert world.heard == [(2, own)]

    play(monkeypatch, scene)


def test_a_server_that_ends_closes_also_the_block_whose_closing_still_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World, loop: PlayedService, server: ShardServer) -> None:
        world.gates[-1] = threading.Event()
        server.on_message(COORDINATOR, assignment(1), 0.0)
        await loop.until(lambda: world.begun == [1])
        files: tuple[LayerFile, ...] = ()
        server.on_message(COORDINATOR, CommitCut(job="job", version=1, files=files, manifest_json="", keep=()), 0.0)
        server.on_message(COORDINATOR, Unassign(job="job"), 0.0)
        ending = asyncio.ensure_future(server.close())
        await asyncio.sleep(0)
        world.gates[-1].set()
        await ending
        assert world.closed == [1]

    play(monkeypatch, scene)


def test_the_coordinator_hears_that_a_job_is_left_once_its_block_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World, loop: PlayedService, server: ShardServer) -> None:
        server.on_message(COORDINATOR, assignment(1), 0.0)
        await loop.until(lambda: world.begun == [1])
        server.on_message(COORDINATOR, Unassign(job="job"), 0.0)
        await loop.until(lambda: Send(COORDINATOR, Unassigned(job="job")) in loop.effects)
        assert world.closed == [1]
        await server.close()

    play(monkeypatch, scene)


class HandingOn:
    """A block whose backward pass has something to hand on on the way."""

    def backward(self, task: BackwardTask) -> Steps[BackwardResult]:
        yield
        yield InputGradient(gradients=Tensors.none())
        yield
        return BackwardResult(gradients=None)


def test_a_slot_reports_what_a_pass_hands_on_and_then_its_end() -> None:
    queue = TaskQueue(window=1, num_layers=1)
    heard: SimpleQueue[tuple[Task, TaskResult | Exception]] = SimpleQueue()
    block = cast(BlockCompute, HandingOn())
    slots = Slots(block, queue, num_slots=1, name="job", report=lambda task, outcome: heard.put((task, outcome)))
    slots.start()
    task = BackwardTask(attempt=Attempt(Microbatch(0, 0, 1), 0), number=1, gradients=None)
    queue.push(task)
    assert heard.get(timeout=30.0) == (task, InputGradient(gradients=Tensors.none()))
    assert heard.get(timeout=30.0) == (task, BackwardResult(gradients=None))
    slots.stop()
    assert heard.empty()


def test_slots_that_never_started_can_be_stopped() -> None:
    queue = TaskQueue(window=1, num_layers=1)
    slots = Slots(cast(BlockCompute, None), queue, num_slots=2, name="job", report=lambda task, outcome: None)
    slots.stop()
    assert queue.pop() is None
