"""The forward worker's process: `ForwardRole` on gRPC, with real data."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerwise.background import Background
from layerwise.data.dataset import Dataset, TrainingData
from layerwise.data.load import load_dataset
from layerwise.data.sampling import microbatch_indices
from layerwise.data_info import DataInfo
from layerwise.errors import LayerwiseError, sentence
from layerwise.ids import COORDINATOR
from layerwise.job import parse_job
from layerwise.memory import is_out_of_memory
from layerwise.messages import Assignment, Hosting, Message, Role, Tensors, Welcome
from layerwise.profile import Profile
from layerwise.roles import Effect, run_out
from layerwise.service import Service, ServiceSettings
from layerwise.settings import ResolvedSettings
from layerwise.tracebacks import log_traceback
from layerwise.worker.forward_requests import Forget, Load, LoadEvaluation, Prepare
from layerwise.worker.forward_role import ForwardRole

CLOSE_SECONDS = 3.0
"""How long a load that is under way may keep the process from ending."""

log = logging.getLogger(__name__)


class ForwardWorker:
    """Carries out what the role asks for: prepares data, loads samples (on a thread of its own)."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._role = ForwardRole()
        self._loader = Background(service, "loader", abandon=True)
        self._assigned: dict[str, Assignment] = {}
        self._data: dict[str, tuple[TrainingData, int]] = {}

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs whose data are in memory."""
        return tuple(self._data)

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
        """The leases held."""
        from prometheus_client.core import GaugeMetricFamily

        yield GaugeMetricFamily(
            "layerwise_leases", "Microbatches leased to this forward worker", value=self._role.num_leases
        )

    async def close(self) -> None:
        """Stop loading. A user's loader may hang: it is given `CLOSE_SECONDS`, then the process ends without it."""
        self._loader.close()
        if not await asyncio.to_thread(self._loader.wait, CLOSE_SECONDS):
            log.warning("samples are still being loaded after %g s; this worker ends without them", CLOSE_SECONDS)

    def _then(self, effects: list[Effect]) -> list[Effect]:
        for request in self._role.take_requests():
            match request:
                case Prepare():
                    self._prepare(request)
                case Load():
                    self._load(request)
                case LoadEvaluation():
                    self._load_evaluation(request)
                case Forget(job=job):
                    self._assigned.pop(job, None)
                    self._data.pop(job, None)
        return effects

    def _prepare(self, request: Prepare) -> None:
        assignment = request.assignment
        job = assignment.job
        self._assigned[job] = assignment

        def work() -> tuple[TrainingData, int, int, bool]:
            spec = parse_job(json.loads(assignment.spec_json), source=job)
            allowed = self._service.settings.allow_imports
            data = load_dataset(spec.data, allowed)
            planned = Profile.from_json(assignment.profile_json).data_json
            if planned:
                data.info.check(DataInfo.from_json(planned))
            settings = ResolvedSettings.from_json(assignment.settings_json)
            ordered = settings.plain
            return data, spec.train.seed, settings.window, ordered

        def done(loaded: tuple[TrainingData, int, int, bool]) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                return []  # the job was left meanwhile: nobody would ever drop these data
            data, seed, window, ordered = loaded
            self._data[job] = (data, seed)
            now = self._service.loop.time()
            return self._then(self._role.on_prepared(job, window, now, ordered=ordered))

        def failed(error: Exception) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                return []
            log_traceback("the data were not loaded", error)
            if is_out_of_memory(error):
                return run_out(COORDINATOR, job, f"the data can't be loaded: memory ran out ({sentence(error)})")
            return self._then(self._role.on_prepare_failed(job, sentence(error), self._service.loop.time()))

        self._loader.run(work, done, failed)

    def _load(self, request: Load) -> None:
        job, attempt = request.job, request.attempt
        data, seed = self._data[job]

        def work() -> tuple[Tensors, Tensors]:
            try:
                inputs, targets = data.training_batch(seed, attempt.microbatch)
            except Exception as error:
                indices = microbatch_indices(seed, attempt.microbatch, len(data.train))
                raise LayerwiseError(_which(data.train, indices, error)) from error
            return _tensors(inputs), _tensors(targets)

        def failed(error: Exception) -> list[Effect]:
            log_traceback(f"the samples of {attempt.microbatch} were not loaded", error)
            if is_out_of_memory(error):
                what = f"samples {attempt.microbatch} can't be loaded"
                return run_out(COORDINATOR, job, f"{what}: memory ran out ({sentence(error)})")
            return self._then(self._role.on_load_failed(job, attempt, sentence(error), self._service.loop.time()))

        self._loader.run(
            work,
            lambda loaded: self._then(self._role.on_loaded(job, attempt, *loaded, self._service.loop.time())),
            failed,
        )

    def _load_evaluation(self, request: LoadEvaluation) -> None:
        job, version, samples = request.job, request.version, request.samples
        data, seed = self._data[job]

        def work() -> tuple[Tensors, Tensors]:
            inputs, targets = data.validation_batch(seed, samples.start, samples.stop)
            return _tensors(inputs), _tensors(targets)

        def failed(error: Exception) -> list[Effect]:
            what = f"validation samples {samples.start}-{samples.stop} could not be loaded"
            log_traceback(what, error)
            if is_out_of_memory(error):
                return run_out(COORDINATOR, job, f"{what}: memory ran out ({sentence(error)})")
            said = f"{what}: {sentence(error)}"
            return self._then(self._role.on_evaluation_load_failed(job, said, self._service.loop.time()))

        self._loader.run(
            work,
            lambda loaded: self._then(
                self._role.on_evaluation_loaded(job, version, samples, *loaded, self._service.loop.time())
            ),
            failed,
        )


def _which(data: Dataset, indices: Sequence[int] | NDArray[np.int64], error: Exception) -> str:
    """Why samples can't be loaded, with the name of the first one that alone can't be."""
    for index in indices:
        try:
            data.batch([int(index)])
        except Exception as alone:  # a user's own code may raise anything
            return f"sample {index} of the training data can't be loaded: {sentence(alone)}"
    return sentence(error)


def _tensors(values: Sequence[torch.Tensor]) -> Tensors:
    return Tensors(tuple(values), single=len(values) == 1)


def run_forward(
    *,
    coordinator: str,
    name: str = "",
    metrics: str = "",
    join: str | None = None,
    allow_imports: tuple[str, ...] = (),
    threads: int = 1,
    insecure: bool = False,
    exit_with_parent: bool = False,
) -> None:
    """Serve as a forward worker until a signal or the end of the parent.

    Raises:
        UnreachableError: no coordinator answers.
        NotFoundError: there is no job ``join``; "" is any.
        NotAllowedError: the job can't use this worker.
    """
    torch.set_num_threads(threads)
    settings = ServiceSettings(
        role=Role.FORWARD,
        coordinator=coordinator,
        name=name,
        metrics=metrics,
        join=join,
        allow_imports=allow_imports,
        insecure=insecure,
        exit_with_parent=exit_with_parent,
    )
    asyncio.run(Service(settings, ForwardWorker).run())
