"""One block of one job as it lives in a shard's process: the role, the layers, the slots, the log and the writer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from layerwise.build import BuiltBlock, build_block
from layerwise.cuts import commit_manifest, durable_cuts
from layerwise.data_info import DataInfo
from layerwise.event_log import EventLog
from layerwise.log_retention import LogKeeper
from layerwise.messages import Assignment, CommitCut, LayerFile, Message, TaskRequest
from layerwise.refusals import Refusals, Refused
from layerwise.roles import Effect
from layerwise.sections import CrossEntropy, Text
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.frame_checks import FrameChecks
from layerwise.server.shard_role import ShardRole
from layerwise.server.slots import Slots
from layerwise.server.task_queue import TaskQueue
from layerwise.standby_bytes import LayerBytes
from layerwise.standby_writer import Written
from layerwise.tasks import ForwardTask, Task, TaskResult

log = logging.getLogger(__name__)


class HostedBlock:
    """Built on any thread; afterwards used from the event loop's, but for `close`.

    ``report(task, outcome)`` is called on slot threads, ``cut_taken`` and ``cut_saved`` on those and the writers',
    ``standby_written`` on a writer's.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        device: torch.device,
        allowed_imports: Sequence[str],
        report: Callable[[Task, TaskResult | Exception], None],
        cut_taken: Callable[[int], None],
        cut_saved: Callable[[int, tuple[LayerFile, ...], str], None],
        standby: Mapping[int, LayerBytes] | None = None,
        standby_written: Written | None = None,
    ) -> None:
        """Build the block as the assignment says. For ``standby`` and ``standby_written`` see `layerwise.build.build_block`.

        Raises:
            LayerwiseError: as `layerwise.build.build_block`.
        """
        self._assignment = assignment
        self._built: BuiltBlock = build_block(
            assignment,
            device=device,
            cut_events=_CutEvents(cut_taken, cut_saved),
            allowed_imports=allowed_imports,
            standby=standby,
            standby_written=standby_written,
        )
        spec, settings, plan = self._built.spec, self._built.settings, self._built.settings.plan
        self.block = self._built.block
        self._log_keeper = LogKeeper(assignment.directory) if assignment.block == 0 else None
        self.queue = TaskQueue(
            window=settings.window, num_layers=len(self.block.layers), attached=spec.cluster.attached
        )
        self.role = ShardRole(
            job=assignment.job,
            block=assignment.block,
            route=assignment.route,
            plan=plan,
            window=settings.window,
            synchronous=settings.mode == "synchronous",
            compute=self.block,
            queue=self.queue,
            schedule=CutSchedule(final=plan.num_updates, intervals=settings.cut_intervals),
            version=assignment.cut,
            layer_names=[layer.name for layer in self._built.profile.layers],
            generation=assignment.generation,
            task_seconds=spec.timeouts.task,
            drops_bad_samples=spec.train.on_bad_sample == "drop",
            synchronous_until=assignment.course.synchronous_until,
            from_cut=standby is None,
        )
        self.checks = _checks(self._built)
        # Two slots could run the forward passes of two microbatches out of their order, which buffers would show.
        one_by_one = spec.cluster.slots == "auto" or settings.mode == "synchronous"
        num_slots = 1 if one_by_one else int(spec.cluster.slots)
        self.block.updates_last = num_slots == 1
        self._is_last = assignment.block == len(assignment.route) - 1 and spec.cluster.attached
        self._slots = Slots(
            self.block,
            self.queue,
            num_slots=num_slots,
            name=assignment.job,
            report=report,
            backward_follows=self._is_last,
        )

    @property
    def num_slots(self) -> int:
        """Passes that are computed at once."""
        return self._slots.num_slots

    @property
    def num_unsaved(self) -> int:
        """Cuts that wait for the disk."""
        return self._built.writer.num_waiting

    @property
    def events(self) -> EventLog:
        """The block's event log."""
        return self._built.events

    @property
    def shortage(self) -> str:
        """Why the disk gives the event log no more room; empty when it does. ``queue.paused`` says if work waits for it."""
        return self.events.shortage

    def begin(self, now: float) -> list[Effect]:
        """Let the slots work and say that the block is ready."""
        self._slots.start()
        return self.role.begin(self._built.applied, now)

    def on_message(self, peer: str, message: Message, refusals: Refusals, now: float) -> list[Effect]:
        """A message of the block's job; one whose tensors do not fit the block gets no further than here."""
        fault = self.checks.fault(message)
        if fault:
            refusals.add(Refused.UNEXPECTED if isinstance(message, TaskRequest) else Refused.TENSOR)
            return self.role.on_unfit(peer, message, fault, now)
        before = self.role.num_refused
        effects = self.role.on_message(peer, message, now)
        if self.role.num_refused > before:
            refusals.add(Refused.UNEXPECTED)
        return effects

    def on_task(self, task: Task, outcome: TaskResult | Exception, now: float) -> list[Effect]:
        """A slot has run ``task``."""
        self._mind_room()
        try:
            if isinstance(outcome, Exception):
                return self.role.on_task_failed(task, outcome, now)
            return self.role.on_task_done(task, outcome, now)
        finally:
            if self._is_last and isinstance(task, ForwardTask):
                self.queue.release_forward()

    def on_tick(self, now: float) -> list[Effect]:
        """Deadlines and reports of the role."""
        self._mind_room()
        reports = self.role.reports
        reports.compute_seconds = self._slots.compute_seconds
        reports.log_bytes = self.events.num_bytes
        reports.shortage = self.shortage
        return self.role.on_tick(now)

    def commit(self, message: CommitCut) -> None:
        """Write the cut's manifest, which makes it a cut, and delete those that are not to be kept. Any thread.

        Raises:
            WrongLifeError: this life, or another one in the cut, was replaced; the cut does not count.
            OSError: the disk refused; the cuts before stand.
        """
        assignment = self._assignment
        commit_manifest(
            assignment.directory,
            message.version,
            message.manifest_json,
            message.keep,
            life=assignment.route[0].life,
        )
        if self._log_keeper is not None:
            self._log_keeper.release(min(durable_cuts(assignment.directory), default=0))

    def _mind_room(self) -> None:
        """Let nothing begin that could not be written down."""
        full = self.events.full
        if full != self.queue.paused:
            self.queue.pause(full)
            what = "waits until there is" if full else "goes on: there is"
            log.warning("job %s %s room for its event log in %s", self._assignment.job, what, self.events.directory)

    def close(self) -> None:
        """End the slots, save the cuts that wait, close the log. Waits for passes and disk; any thread."""
        self._slots.stop()
        try:
            self._built.close()
        finally:
            if self._log_keeper is not None:
                self._log_keeper.close()


def _checks(built: BuiltBlock) -> FrameChecks:
    """What fits the block; values are known where the data are the built-in ones and the loss takes classes."""
    spec, profile, place = built.spec, built.profile, built.place
    info = DataInfo.from_json(profile.data_json) if profile.data_json else None
    return FrameChecks(
        profile,
        start=place.start,
        stop=place.stop,
        parameters={
            layer.index: {
                name: (str(one.dtype).removeprefix("torch."), tuple(one.shape))
                for name, one in layer.compute.owned.items()
            }
            for layer in built.block.layers
        },
        detached=spec.cluster.num_detached > 0,
        classes=info.num_classes if info is not None and isinstance(spec.loss, CrossEntropy) else None,
        tokens=info.vocabulary if info is not None and isinstance(spec.data, Text) else None,
    )


class _CutEvents:
    """What the shelf tells, handed on."""

    def __init__(self, taken: Callable[[int], None], saved: Callable[[int, tuple[LayerFile, ...], str], None]) -> None:
        self._taken = taken
        self._saved = saved

    def cut_taken(self, version: int) -> None:
        self._taken(version)

    def cut_saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        self._saved(version, files, error)
