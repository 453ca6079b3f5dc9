"""The shard server's process: hosts blocks of jobs on one device, each a `ShardRole` with a real `Block`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from layerwise.background import Background
from layerwise.device import resolve_device
from layerwise.errors import CorruptError, MalformedMessageError, NotFoundError, sentence
from layerwise.ids import COORDINATOR
from layerwise.job import parse_job
from layerwise.memory import is_out_of_memory
from layerwise.messages import (
    Assignment,
    CommitCut,
    CutCommitted,
    Echo,
    Echoed,
    Failure,
    Hosting,
    LayerFile,
    Message,
    Probe,
    Probed,
    Reroute,
    Role,
    StandbyHeld,
    StandbyOffer,
    StandbyPart,
    StandbyRequest,
    Unassign,
    Unassigned,
    Welcome,
)
from layerwise.probe import probe
from layerwise.profile import Profile
from layerwise.refusals import Refused
from layerwise.roles import Effect, Send, run_out
from layerwise.server.hop_probe import HopProbe
from layerwise.server.hosted_block import HostedBlock
from layerwise.server.standby_copy import StandbyBytes, StandbyCopy
from layerwise.server.standby_role import StandbyRole
from layerwise.service import Service, ServiceSettings
from layerwise.settings import ResolvedSettings
from layerwise.standby_bytes import ArrivingLayer, LayerBytes, most_bytes
from layerwise.tasks import Task, TaskResult
from layerwise.tracebacks import log_traceback

log = logging.getLogger(__name__)


class ShardServer:
    """Routes messages to the blocks it hosts; probes, builds and leaves jobs on a thread of its own."""

    def __init__(self, service: Service, device: torch.device) -> None:
        self._service = service
        self._device = device
        self._blocks: dict[str, HostedBlock] = {}
        self._standby: dict[str, StandbyRole] = {}
        self._assigned: dict[str, Assignment] = {}
        """By job what this shard is to host, built or not; a block of any other assignment has no say any more."""
        self._hop: HopProbe | None = None
        self._profile: Profile | None = None
        """What was measured of a job's layers while its hop is still being measured."""
        self._builder = Background(service, "builder")
        self._closer = Background(service, "closer")

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """See `layerwise.service.ServiceHandler`."""
        match message:
            case Welcome():
                return [effect for standby in self._standby.values() for effect in standby.tell_held()]
            case Probe() if peer == COORDINATOR:
                self._probe(message)
                return []
            case Assignment() if peer == COORDINATOR:
                return self._take_assignment(message, now)
            case Reroute() if peer == COORDINATOR and message.job in self._standby:
                self._standby[message.job].take_route(message.route)
            case StandbyOffer() | StandbyRequest() | StandbyPart() | StandbyHeld() if message.job in self._standby:
                return self._standby[message.job].on_message(peer, message, now)
            case Echo():
                return [Send(peer, Echoed(job=message.job, round=message.round))]
            case Echoed():
                return self._on_echoed(peer, message, now)
            case Unassign() if peer == COORDINATOR:
                self._leave(message.job)
                return []
            case CommitCut() if peer == COORDINATOR:
                self._commit(message)
                return []
        block = self._blocks.get(getattr(message, "job", ""))
        if block is None:
            sentence = f"{type(message).__name__} from {peer} refused: no block of that job is hosted here"
            self._service.transport.refusals.add(Refused.UNEXPECTED, sentence)
            return []
        return block.on_message(peer, message, self._service.transport.refusals, now)

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """See `layerwise.service.ServiceHandler`. Without the coordinator the blocks go on; one that is being built is given up."""
        effects = [effect for block in self._blocks.values() for effect in block.role.on_lost(peer, now)]
        effects += [effect for standby in self._standby.values() for effect in standby.on_lost(peer)]
        if self._hop is not None:
            self._hop.on_lost(peer)
            effects += self._when_measured()
        if peer != COORDINATOR:
            return effects
        for job in [job for job in self._assigned if job not in self._blocks]:
            self._standby.pop(job, None)
            self._close(self._take_out(job), list)
        return effects

    def on_tick(self, now: float) -> list[Effect]:
        """See `layerwise.service.ServiceHandler`."""
        effects = [effect for block in self._blocks.values() for effect in block.on_tick(now)]
        effects += [effect for standby in list(self._standby.values()) for effect in standby.on_tick(now)]
        if self._hop is not None:
            self._hop.on_tick(now)
            effects += self._when_measured()
        return effects

    def hosting(self) -> tuple[Hosting, ...]:
        """See `layerwise.service.ServiceHandler`."""
        return tuple(block.role.hosting for block in self._blocks.values())

    def before_send(self) -> None:
        """Write every event down before its effects leave the process."""
        for block in self._blocks.values():
            block.events.flush()

    def collect(self) -> Iterable[Any]:
        """Prometheus families of the blocks hosted here."""
        from prometheus_client.core import GaugeMetricFamily

        labels = ["job", "shard"]
        store = GaugeMetricFamily(
            "layerwise_activation_store_bytes", "What forward passes keep for backward passes.", labels=labels
        )
        waiting = GaugeMetricFamily(
            "layerwise_queue_depth_tasks", "Passes that wait for a slot.", labels=[*labels, "direction"]
        )
        copies_of_cuts = GaugeMetricFamily("layerwise_cut_copies_bytes", "Cuts in memory.", labels=labels)
        unsaved = GaugeMetricFamily("layerwise_cut_queue_tasks", "Cuts that wait for the disk.", labels=labels)
        for job, block in list(self._blocks.items()):
            where = [job, self._service.name]
            copies_of_cuts.add_metric(where, block.block.shelf.num_bytes)
            unsaved.add_metric(where, block.num_unsaved)
            store.add_metric(where, block.block.store_bytes)
            waiting.add_metric([*where, "forward"], block.queue.forward_depth)
            waiting.add_metric([*where, "backward"], block.queue.backward_depth)
        standby = GaugeMetricFamily(
            "layerwise_standby_bytes",
            "Standby copies: those of other blocks, and the own ones on their way.",
            labels=labels,
        )
        for job in {*self._blocks, *self._standby}:  # copies may come before the block of one's own is built
            copies = self._standby.get(job)
            standby.add_metric([job, self._service.name], 0 if copies is None else copies.num_bytes)
        yield from (store, waiting, copies_of_cuts, unsaved, standby)

    async def close(self) -> None:
        """End slots and writers, close the logs."""
        self._builder.close()
        for job in list(self._assigned):
            self._close(self._take_out(job), list)
        # Its threads are waited for by the interpreter, so none may be left behind.
        await self._service.loop.run_in_executor(None, self._closer.finish)

    def _probe(self, message: Probe) -> None:
        def work() -> Profile:
            spec = parse_job(json.loads(message.spec_json), source=message.job)
            return probe(spec, device=self._device, allowed_imports=self._service.settings.allow_imports)

        self._builder.run(
            work,
            lambda profile: self._probe_hop(message, profile),
            lambda error: [Send(COORDINATOR, Probed(job=message.job, error=self._explain(error)))],
        )

    def _probe_hop(self, message: Probe, profile: Profile) -> list[Effect]:
        """Measure what a hop to the next shard takes with the largest output of a layer, then tell the profile."""
        self._profile = profile
        num_bytes = max(layer.output_bytes for layer in profile.layers)
        payload = torch.zeros(max(num_bytes, 1), dtype=torch.uint8)
        self._hop = HopProbe(job=message.job, peer=message.peer, address=message.address, payload=payload)
        return self._hop.begin(self._service.loop.time()) if message.peer else self._when_measured()

    def _on_echoed(self, peer: str, message: Echoed, now: float) -> list[Effect]:
        if self._hop is None or self._hop.job != message.job:
            return []
        return self._hop.on_echoed(peer, message, now) + self._when_measured()

    def _when_measured(self) -> list[Effect]:
        if self._hop is None or self._profile is None or not self._hop.done:
            return []
        profile = replace(self._profile, hop_seconds=self._hop.seconds)
        answer = Probed(job=self._hop.job, profile_json=profile.to_json())
        self._hop = self._profile = None
        return [Send(COORDINATOR, answer)]

    def _take_assignment(self, assignment: Assignment, now: float) -> list[Effect]:
        """Build the block, once its layers are here if they come from another shard."""
        job, source = assignment.job, assignment.standby
        if job in self._assigned:
            self._close(self._take_out(job), list)
        self._assigned[job] = assignment
        standby = self._prepare_standby(assignment)
        if standby is None or not source.holder:
            self._build(assignment, None)
            return []

        def fetched(layers: Mapping[int, StandbyBytes] | str) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                return []
            if isinstance(layers, str):
                what = f"the standby copy of version {assignment.cut} can't be fetched from {source.holder}: {layers}"
                return [Send(COORDINATOR, Failure(job=job, message=what, standby=assignment.cut))]
            self._build(assignment, {layer: one for layer, one in layers.items() if isinstance(one, LayerBytes)})
            return []

        patience = parse_job(json.loads(assignment.spec_json), source=job).timeouts.task
        return standby.restore(source, assignment.cut, fetched, patience=patience, now=now)

    def _prepare_standby(self, assignment: Assignment) -> StandbyRole | None:
        """The job's copies in this process, where it has any: those of other blocks outlive the own one."""
        job, route = assignment.job, assignment.route
        try:
            every = ResolvedSettings.from_json(assignment.settings_json).standby_every
            layers = Profile.from_json(assignment.profile_json).layers if every else ()
        except MalformedMessageError:
            every = 0  # building the block ends with the same error, and the coordinator is told of it
        if not every:
            self._standby.pop(job, None)
            return None
        standby = self._standby.get(job)
        if standby is not None:
            standby.assign(assignment.block, route)
            return standby
        limits = [most_bytes(layers[place.start : place.stop]) for place in route]
        standby = StandbyRole(job=job, block=assignment.block, route=route, sink=ArrivingLayer, limits=limits)
        self._standby[job] = standby
        return standby

    def _build(self, assignment: Assignment, standby: Mapping[int, LayerBytes] | None) -> None:
        job, life = assignment.job, assignment.route[assignment.block].life

        def written(version: int, files: tuple[LayerFile, ...], layers: dict[int, LayerBytes]) -> None:
            copy = StandbyCopy(block=assignment.block, life=life, version=version, files=files, layers=layers)
            self._from_thread(assignment, lambda block, now: self._standby[job].offer(copy))

        def work() -> HostedBlock:
            return HostedBlock(
                assignment,
                device=self._device,
                allowed_imports=self._service.settings.allow_imports,
                report=lambda task, outcome: self._from_slot(assignment, task, outcome),
                cut_taken=lambda version: self._from_thread(
                    assignment, lambda block, now: block.role.on_cut_taken(version, now)
                ),
                cut_saved=lambda version, files, error: self._from_writer(assignment, version, files, error),
                standby=standby,
                standby_written=written,
            )

        def done(block: HostedBlock) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                self._close(block, list)
                return []
            self._blocks[job] = block
            return block.begin(self._service.loop.time())

        def failed(error: Exception) -> list[Effect]:
            if self._assigned.get(job) is not assignment:
                return []
            if is_out_of_memory(error):
                place = assignment.route[assignment.block]
                what = f"layers {place.start}-{place.stop - 1} can't be built on shard {place.shard}"
                return run_out(COORDINATOR, job, f"{what}: memory ran out ({self._explain(error)})")
            # With a cut that is damaged or gone the job goes on from the one before it.
            version = assignment.cut if isinstance(error, CorruptError | NotFoundError) else 0
            cut, copy = (version, 0) if standby is None else (0, version)
            return [Send(COORDINATOR, Failure(job=job, message=self._explain(error), cut=cut, standby=copy))]

        self._builder.run(work, done, failed)

    def _leave(self, job: str) -> None:
        """Take the block out of the way at once; say so when its threads have ended."""
        self._standby.pop(job, None)
        self._close(self._take_out(job), lambda: [Send(COORDINATOR, Unassigned(job=job))])

    def _take_out(self, job: str) -> HostedBlock | None:
        """The job's block, which nothing reaches from now on; what it has sent is written down first."""
        self._assigned.pop(job, None)
        block = self._blocks.pop(job, None)
        if block is not None:
            try:
                block.events.flush()
            except OSError as error:
                self._service.fail(error)
        return block

    def _close(self, block: HostedBlock | None, closed: Callable[[], list[Effect]]) -> None:
        """End the block's threads and files, behind what is being closed or committed already; then ``closed``."""

        def work() -> None:
            if block is not None:
                block.close()

        def failed(error: Exception) -> list[Effect]:
            log.error("a block was not left cleanly: %s", self._explain(error))
            return closed()

        self._closer.run(work, lambda _: closed(), failed)

    def _commit(self, message: CommitCut) -> None:
        block = self._blocks.get(message.job)
        if block is None:
            return

        assignment = self._assigned.get(message.job)

        def answer(error: str = "") -> list[Effect]:
            if self._assigned.get(message.job) is not assignment:
                return []  # it was a cut of the life before
            return [Send(COORDINATOR, CutCommitted(job=message.job, version=message.version, error=error))]

        self._closer.run(
            lambda: block.commit(message),
            lambda _: answer(),
            lambda error: answer(f"the manifest of cut {message.version} could not be written: {self._explain(error)}"),
        )

    def _from_slot(self, assignment: Assignment, task: Task, outcome: TaskResult | Exception) -> None:
        def act(block: HostedBlock, now: float) -> list[Effect]:
            if isinstance(outcome, Exception):
                log_traceback(f"{type(task).__name__} failed", outcome)
            return block.on_task(task, outcome, now)

        self._from_thread(assignment, act)

    def _from_writer(self, assignment: Assignment, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        self._from_thread(assignment, lambda block, now: block.role.on_cut_saved(version, files, error, now))

    def _from_thread(self, assignment: Assignment, act: Callable[[HostedBlock, float], list[Effect]]) -> None:
        """Let the role of ``assignment``'s block hear it, on the loop; not that of a later life of the job."""

        def on_loop() -> None:
            block = self._blocks.get(assignment.job)
            if block is not None and self._assigned.get(assignment.job) is assignment:
                self._service.guard(lambda: act(block, self._service.loop.time()))

        self._service.loop.call_soon_threadsafe(on_loop)

    def _explain(self, error: Exception) -> str:
        log_traceback("failed", error)
        return sentence(error)


def run_shard(
    *,
    coordinator: str,
    listen: str,
    advertise: str = "",
    device: str = "auto",
    threads: int = 1,
    name: str = "",
    metrics: str = "",
    allow_imports: tuple[str, ...] = (),
    insecure: bool = False,
    exit_with_parent: bool = False,
) -> None:
    """Serve as a shard until a signal or the end of the parent. ``threads`` are torch's, inside one operator.

    Raises:
        ConfigError: the address is taken, or there is no such device.
        NotAllowedError: listening beyond this host without ``insecure``.
        UnreachableError: no coordinator answers.
    """
    torch.set_num_threads(threads)
    found = resolve_device(device)
    settings = ServiceSettings(
        role=Role.SHARD,
        coordinator=coordinator,
        name=name,
        listen=listen,
        advertise=advertise,
        device=str(found),
        metrics=metrics,
        allow_imports=allow_imports,
        insecure=insecure,
        exit_with_parent=exit_with_parent,
    )
    asyncio.run(Service(settings, lambda service: ShardServer(service, found)).run())
