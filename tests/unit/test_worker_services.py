"""What the workers' processes do around their roles: a job that was assigned anew is not answered for the old one."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from layerwise.data import load_dataset
from layerwise.errors import ConfigError
from layerwise.ids import COORDINATOR
from layerwise.job import parse_job
from layerwise.messages import Assignment, BlockPlace, Failure, Ready, Role, Unassign
from layerwise.profile import Profile
from layerwise.roles import End, Send
from layerwise.service import Service, ServiceSettings
from layerwise.settings import resolve
from layerwise.worker.backward import BackwardWorker
from layerwise.worker.forward import ForwardWorker
from tests.unit.played_service import PlayedService

PROFILE = Profile(layers=(), num_train_samples=8, num_validation_samples=0, microbatch_samples=2, input_bytes=1)


def assignment(life: int) -> Assignment:
    route = (BlockPlace(start=0, stop=1, shard="shard-0", address="unix:/nowhere", life=life),)
    return Assignment(
        job="job",
        spec_json="{}",
        settings_json="{}",
        profile_json=PROFILE.to_json(),
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
        settings = SimpleNamespace(from_json=lambda _: SimpleNamespace(window=1, plain=True))
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


def test_a_worker_whose_files_are_not_the_jobs_says_how_they_differ(tmp_path: Path) -> None:
    """It trained on: with another number of samples, or others in their places, and ledger and audit were clean."""
    text = tmp_path / "text.txt"
    spec = parse_job(
        {
            "name": "job",
            "model": {"name": "transformer-lm"},
            "data": {"name": "text", "path": str(text), "context": 4, "batch": 2},
        }
    )
    text.write_bytes(bytes(range(64)))
    planned = load_dataset(spec.data).info

    async def answers(content: bytes) -> list[str]:
        text.write_bytes(content)
        service = PlayedService()
        worker = ForwardWorker(cast(Service, service))
        told = replace(
            assignment(1),
            spec_json=spec.to_json(),
            settings_json=resolve(spec, planned.num_train, 1).to_json(),
            profile_json=replace(PROFILE, data_json=planned.to_json()).to_json(),
        )
        worker.on_message(COORDINATOR, told, 0.0)
        await service.until(lambda: said(service, Ready) + said(service, Failure) > 0)
        await worker.close()
        return [
            one.message.message for one in service.effects if isinstance(one, Send) and hasattr(one.message, "message")
        ]

    assert asyncio.run(answers(bytes(range(64)))) == []
    [sentence] = asyncio.run(answers(bytes(range(80))))
    assert f"num_train 18 here and {planned.num_train} there" in sentence
    [sentence] = asyncio.run(answers(bytes(reversed(range(64)))))
    assert "digest" in sentence
    assert planned.digest in sentence
