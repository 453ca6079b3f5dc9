"""What all that decides about one run shares: the job as it should be stored, its log, and the training that goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from layerwise.job import JobSpec
from layerwise.server.job_record import CutRecord, JobEvent, JobRecord, JobState
from layerwise.server.preparation import Prepared, prepared_before
from layerwise.server.recovery import Recovery
from layerwise.server.training import Training


class RunAccount:
    """One run, as far as it has come. Not thread-safe.

    ``record`` is the job as it now should be stored, ``events`` what was written to its log since it was last emptied.
    ``now`` (unix seconds) is when that happened which is acted on. ``prepared`` is there once the model was measured,
    ``training`` once it has begun, from then on for good: it is ``suspended`` while the route is changed.
    """

    def __init__(self, record: JobRecord, spec: JobSpec, now: float) -> None:
        self.record = record
        self.spec = spec
        self.now = now
        self.events: list[JobEvent] = []
        self.prepared: Prepared | None = prepared_before(record)
        self.training: Training | None = None
        self.recovery = Recovery()

    @property
    def job(self) -> str:
        """The job's id."""
        return self.record.job

    @property
    def over(self) -> bool:
        """The run has ended."""
        return self.record.state.final

    @property
    def stopping(self) -> bool:
        """It ends at the next update."""
        return self.record.state is JobState.STOPPING

    @property
    def recovering(self) -> bool:
        """It has trained, and does not now."""
        return self.training is not None and self.training.suspended

    @property
    def version(self) -> int:
        """The version that all layers have reached, as far as reported; -1 before training began."""
        return self.training.version if self.training is not None else -1

    @property
    def reached(self) -> int:
        """About the highest version that a layer has reached."""
        versions = [cut.version for cut in self.record.cuts]
        if self.training is not None:
            versions += [self.training.version, *(layer.version for layer in self.training.layers())]
        return max(versions, default=0)

    @property
    def durable(self) -> int:
        """The version of the newest durable cut (0: none)."""
        cut = self.record.durable_cut
        return cut.version if cut is not None else 0

    def note(self, level: str, message: str, **fields: object) -> None:
        """Append a line to the job's log."""
        sequence = self.record.num_events
        self.events.append(JobEvent(sequence=sequence, time=self.now, level=level, message=message, fields=fields))
        self.record = replace(self.record, num_events=sequence + 1)

    def keep_cuts(self, wanted: Callable[[int], bool]) -> tuple[CutRecord, ...]:
        """Forget the durable cuts of other versions; gives those that are left."""
        cuts = tuple(cut for cut in self.record.cuts if wanted(cut.version))
        self.record = replace(self.record, cuts=cuts)
        if self.training is not None:
            self.training.commits.records = {cut.version: cut for cut in cuts}
        return cuts
