"""The detached backward worker's process: `BackwardRole` on gRPC, with real layers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from layerwise.background import Background
from layerwise.build import build_detached
from layerwise.detached import DetachedBlock
from layerwise.device import resolve_device
from layerwise.errors import sentence
from layerwise.ids import COORDINATOR
from layerwise.memory import is_out_of_memory
from layerwise.messages import Assignment, DetachedTask, Hosting, Message, PushGradient, Role, TaskFinished, Welcome
from layerwise.roles import Effect, run_out
from layerwise.service import Service, ServiceSettings
from layerwise.tracebacks import log_traceback
from layerwise.worker.backward_role import BackwardRole, Build, Execute, Leave


class BackwardWorker:
    """Carries out what the role asks for: builds blocks, runs passes, sends each gradient as soon as it exists."""

    def __init__(self, service: Service, device: torch.device) -> None:
        self._service = service
        self._device = device
        self._role = BackwardRole()
        self._compute = Background(service, "backward")
        self._assigned: dict[str, Assignment] = {}
        self._blocks: dict[str, DetachedBlock] = {}
        self._num_passes = 0

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """See `layerwise.service.ServiceHandler`."""
        if isinstance(message, Welcome):
            return []
        return self._then(self._role.on_message(peer, message, now))

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """See `layerwise.service.ServiceHandler`."""
        return self._then(self._role.on_lost(peer, now))

    def on_tick(self, now: float) -> list[Effect]:
        """See `layerwise.service.ServiceHandler`."""
        return self._then(self._role.on_tick(now))

    def hosting(self) -> tuple[Hosting, ...]:
        """See `layerwise.service.ServiceHandler`."""
        return self._role.hosting

    def before_send(self) -> None:
        """A worker writes nothing down."""

    def collect(self) -> Iterable[Any]:
        """Backward passes done."""
        from prometheus_client.core import CounterMetricFamily

        yield CounterMetricFamily(
            "layerwise_backward_passes", "Backward passes done by this detached worker", value=self._num_passes
        )

    async def close(self) -> None:
        """Stop computing."""
        self._compute.close()

    def _then(self, effects: list[Effect]) -> list[Effect]:
        for request in self._role.take_requests():
            match request:
                case Build():
                    self._build(request)
                case Execute():
                    self._execute(request)
                case Leave(job=job):
                    self._assigned.pop(job, None)
                    self._blocks.pop(job, None)
        return effects

    def _build(self, request: Build) -> None:
        assignment = request.assignment
        job = assignment.job
        self._assigned[job] = assignment

        def done(block: DetachedBlock) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                return []  # the job was left meanwhile, and perhaps assigned anew: that block is being built
            self._blocks[job] = block
            return self._then(self._role.on_built(job, self._now()))

        def failed(error: Exception) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                return []
            log_traceback("the block was not built", error)
            if is_out_of_memory(error):
                return run_out(COORDINATOR, job, f"a block can't be built: memory ran out ({sentence(error)})")
            return self._then(self._role.on_build_failed(job, sentence(error), self._now()))

        self._compute.run(
            lambda: build_detached(
                assignment, device=self._device, allowed_imports=self._service.settings.allow_imports
            ),
            done,
            failed,
        )

    def _execute(self, request: Execute) -> None:
        job, task = request.job, request.task
        block = self._blocks[job]

        def work() -> TaskFinished:
            for part in block.run(task):
                if isinstance(part, TaskFinished):
                    return part
                self._service.loop.call_soon_threadsafe(self._push, job, part)
            raise AssertionError("a pass ends with TaskFinished")

        def done(finished: TaskFinished) -> list[Effect]:
            self._num_passes += 1
            return self._then(self._role.on_executed(job, finished, self._now()))

        self._compute.run(work, done, partial(self._failed, job, task))

    def _push(self, job: str, gradient: PushGradient) -> None:
        self._service.guard(lambda: self._then(self._role.on_gradient(job, gradient, self._now())))

    def _failed(self, job: str, task: DetachedTask, error: Exception) -> list[Effect]:
        log_traceback("a backward pass failed", error)
        if is_out_of_memory(error):
            what = f"backward pass of {task.attempt.microbatch} failed in a detached worker"
            return run_out(COORDINATOR, job, f"{what}: memory ran out ({sentence(error)})")
        return self._then(self._role.on_execute_failed(job, task, sentence(error), self._now()))

    def _now(self) -> float:
        return self._service.loop.time()


def run_backward(
    *,
    coordinator: str,
    device: str = "auto",
    threads: int = 1,
    name: str = "",
    metrics: str = "",
    join: str | None = None,
    allow_imports: tuple[str, ...] = (),
    insecure: bool = False,
    exit_with_parent: bool = False,
) -> None:
    """Serve as a detached backward worker until a signal or the end of the parent.

    Raises:
        ConfigError: there is no such device.
        UnreachableError: no coordinator answers.
        NotFoundError: there is no job ``join``; "" is any.
        NotAllowedError: the job can't use this worker.
    """
    torch.set_num_threads(threads)
    found = resolve_device(device)
    settings = ServiceSettings(
        role=Role.BACKWARD,
        coordinator=coordinator,
        name=name,
        device=str(found),
        metrics=metrics,
        join=join,
        allow_imports=allow_imports,
        insecure=insecure,
        exit_with_parent=exit_with_parent,
    )
    asyncio.run(Service(settings, lambda service: BackwardWorker(service, found)).run())
