"""What the workers' processes do around their roles: a job that was assigned anew is not answered for the old one."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from layerwise.errors import ConfigError
from layerwise.ids import COORDINATOR
from layerwise.messages import Assignment, BlockPlace, Failure, Ready, Role, Unassign
from layerwise.roles import End, Send
from layerwise.service import Service, ServiceSettings
from layerwise.worker.backward import BackwardWorker
from layerwise.worker.forward import ForwardWorker
from tests.unit.played_service import PlayedService


def assignment(life: int) -> Assignment:
    route = (BlockPlace(start=0, stop=1, shard="shard-0", address="unix:/nowhere", life=life),)
    return Assignment(
        job="job",
        spec_json="{}",
        settings_json="{}",
        profile_json="{}",
        route=route,
        block=0,
        cut=0,
        directory="",
        generation=1,
    )


def said(service: PlayedService, kind: type[Any]) -> int:
    return sum(isinstance(one, Send) and isinstance(one.message, kind) for one in service.effects)


@pytest.mark.parametrize("first_fails", [False, True])
def test_only_the_last_assignments_block_is_announced(monkeypatch: pytest.MonkeyPatch, first_fails: bool) -> None:
    gate = threading.Event()
    built: list[int] = []

    def build(given: Assignment, **_: Any) -> Any:
        assert gate.wait(30)
        built.append(given.route[0].life)
        if first_fails and len(built) == 1:
            raise ValueError("no such data")
        return SimpleNamespace()

    async def scene() -> None:
        service = PlayedService()
        monkeypatch.setattr("layerwise.worker.backward.build_detached", build)
        worker = BackwardWorker(cast(Service, service), torch.device("cpu"))
        for message in (assignment(1), Unassign(job="job"), assignment(2)):
            worker.on_message(COORDINATOR, message, 0.0)
        gate.set()
        await service.until(lambda: said(service, Ready) > 0)
        assert built == [1, 2]
        assert said(service, Ready) == 1
        assert said(service, Failure) == 0
        await worker.close()

    asyncio.run(scene())


def test_data_that_come_after_their_job_was_left_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def load(*_: Any) -> Any:
        assert gate.wait(30)
        return SimpleNamespace(train=[], validation=[])

    async def scene() -> None:
        service = PlayedService()
        spec = SimpleNamespace(data=None, train=SimpleNamespace(seed=1))
        monkeypatch.setattr("layerwise.worker.forward.parse_job", lambda *_, **__: spec)
        monkeypatch.setattr("layerwise.worker.forward.load_dataset", load)
        settings = SimpleNamespace(from_json=lambda _: SimpleNamespace(window=1, mode="asynchronous"))
        monkeypatch.setattr("layerwise.worker.forward.ResolvedSettings", settings)
        worker = ForwardWorker(cast(Service, service))
        worker.on_message(COORDINATOR, assignment(1), 0.0)
        worker.on_message(COORDINATOR, Unassign(job="job"), 0.0)
        worker.on_message(COORDINATOR, assignment(2), 0.0)
        gate.set()
        await service.until(lambda: said(service, Ready) > 0)
        assert said(service, Ready) == 1
        worker.on_message(COORDINATOR, Unassign(job="job"), 0.0)
        assert worker.jobs == ()
        await worker.close()

    asyncio.run(scene())


def test_a_service_that_nobody_could_call_starts_nothing() -> None:
    def make_handler(service: Service) -> Any:
        raise AssertionError("it was started")

    settings = ServiceSettings(role=Role.SHARD, coordinator="unix:/nowhere", listen="0.0.0.0:0", insecure=True)
    with pytest.raises(ConfigError, match="say --advertise"):
        asyncio.run(Service(settings, make_handler).run())


def test_a_worker_that_has_no_memory_for_its_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> Any:
        raise MemoryError

    async def scene() -> None:
        service = PlayedService()
        monkeypatch.setattr("layerwise.worker.backward.build_detached", build)
        worker = BackwardWorker(cast(Service, service), torch.device("cpu"))
        worker.on_message(COORDINATOR, assignment(1), 0.0)
        await service.until(lambda: len(service.effects) > 1)
        sentence = "a block can't be built: memory ran out (MemoryError)"
        assert service.effects == [Send(COORDINATOR, Failure(job="job", message=sentence, memory=True)), End(sentence)]
        await worker.close()

    asyncio.run(scene())


def test_a_worker_that_has_no_memory_for_its_data_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise MemoryError

    async def scene() -> None:
        service = PlayedService()
        monkeypatch.setattr("layerwise.worker.forward.parse_job", lambda *_, **__: SimpleNamespace(data=None))
        monkeypatch.setattr("layerwise.worker.forward.load_dataset", load)
        worker = ForwardWorker(cast(Service, service))
        worker.on_message(COORDINATOR, assignment(1), 0.0)
        await service.until(lambda: len(service.effects) > 1)
        sentence = "the data can't be loaded: memory ran out (MemoryError)"
        assert service.effects == [Send(COORDINATOR, Failure(job="job", message=sentence, memory=True)), End(sentence)]
        await worker.close()

    asyncio.run(scene())
