"""One block of one job as it lives in a shard's process: the role, the layers, the slots, the log and the writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerwise.build import BuiltBlock, build_block
from layerwise.cuts import commit_manifest
from layerwise.event_log import EventLog
from layerwise.messages import Assignment, CommitCut, LayerFile
from layerwise.roles import Effect
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.shard_role import ShardRole
from layerwise.server.slots import Slots
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import ForwardTask, Task, TaskResult


class HostedBlock:
    """Built on any thread; afterwards used from the event loop's, but for `close`.

    ``report(task, outcome)`` is called on slot threads, ``cut_taken`` and ``cut_saved`` on those and the writer's.
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
    ) -> None:
        """Build the block as the assignment says.

        Raises:
            LayerwiseError: as `layerwise.build.build_block`.
        """
        self._assignment = assignment
        self._built: BuiltBlock = build_block(
            assignment, device=device, cut_events=_CutEvents(cut_taken, cut_saved), allowed_imports=allowed_imports
        )
        spec, settings, plan = self._built.spec, self._built.settings, self._built.settings.plan
        self.block = self._built.block
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
        )
        # Two slots could run the forward passes of two microbatches out of their order, which buffers would show.
        one_by_one = spec.cluster.slots == "auto" or settings.mode == "synchronous"
        num_slots = 1 if one_by_one else int(spec.cluster.slots)
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
    def events(self) -> EventLog:
        """The block's event log."""
        return self._built.events

    def begin(self, now: float) -> list[Effect]:
        """Let the slots work and say that the block is ready."""
        self._slots.start()
        return self.role.begin(self._built.applied, now)

    def on_task(self, task: Task, outcome: TaskResult | Exception, now: float) -> list[Effect]:
        """A slot has run ``task``."""
        try:
            if isinstance(outcome, Exception):
                return self.role.on_task_failed(task, outcome, now)
            return self.role.on_task_done(task, outcome, now)
        finally:
            if self._is_last and isinstance(task, ForwardTask):
                self.queue.release_forward()

    def on_tick(self, now: float) -> list[Effect]:
        """Deadlines and reports of the role."""
        self.role.compute_seconds = self._slots.compute_seconds
        self.role.log_bytes = self.events.num_bytes
        return self.role.on_tick(now)

    def commit(self, message: CommitCut) -> None:
        """Write the cut's manifest, which makes it a cut, and delete those that are not to be kept. Any thread.

        Raises:
            OSError: the disk refused; the cuts before stand.
        """
        commit_manifest(self._assignment.directory, message.version, message.manifest_json, message.keep)

    def close(self) -> None:
        """End the slots, save the cuts that wait, close the log. Waits for passes and disk; any thread."""
        self._slots.stop()
        self._built.close()


class _CutEvents:
    """What the shelf tells, handed on."""

    def __init__(self, taken: Callable[[int], None], saved: Callable[[int, tuple[LayerFile, ...], str], None]) -> None:
        self._taken = taken
        self._saved = saved

    def cut_taken(self, version: int) -> None:
        self._taken(version)

    def cut_saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        self._saved(version, files, error)
