"""What one run does when its training diverges: watch, and stop or go back to a cut from before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise.job import JobSpec
from layerwise.server.divergence_guard import Divergence, DivergenceGuard
from layerwise.server.job_record import JobRecord
from layerwise.server.preparation import Prepared
from layerwise.server.rollback import MOST_ROLLBACKS, course_after, roll_back
from layerwise.server.training import NOT_FINITE

LEAST_NOT_FINITE = 8
"""Dropped microbatches in a row whose losses are not finite, before training is at fault and not the samples; at least."""


class DivergencePolicy:
    """``train.on_divergence`` of one job, from route to route. Not thread-safe."""

    def __init__(self, spec: JobSpec) -> None:
        self.rolls_back = spec.train.on_divergence == "rollback"
        self.guard: DivergenceGuard | None = None
        """There from the first `begin` on, unless the job ignores divergence."""
        self.found: Divergence | None = None
        """Why all layers go back with the next route."""
        self._watches = spec.train.on_divergence != "ignore"
        self._warmup = spec.train.schedule.warmup

    def begin(self, prepared: Prepared, record: JobRecord, *, cut: int, some: bool, all_layers: bool) -> None:
        """Training begins, or goes on: watch the loss anew where ``some`` layers, or all, were set back to ``cut``."""
        if not self._watches:
            return
        settings = prepared.settings
        if self.guard is None:
            self.guard = DivergenceGuard(
                settings.plan.num_updates,
                warmup=int(self._warmup * settings.plan.num_updates),
                eager=self.rolls_back,
                can_stall=settings.mode == "asynchronous" and settings.window > 1,
                most_not_finite=max(2 * settings.accumulation, LEAST_NOT_FINITE),
                first=record.document.get("loss_at_start"),
                good_version=cut if all_layers else _oldest_cut(record),
            )
        elif some:
            self.guard.restart(cut if all_layers else None)
        if record.rollbacks and self.guard.first is not None:
            self.guard.be_wary(course_after(record.rollbacks).synchronous_until)

    def judge(self, record: JobRecord, version: int, why: str) -> Divergence:
        """A block met at about ``version`` what can't be trained on, as ``why`` says."""
        good = _oldest_cut(record) if self.guard is None else self.guard.good_version(version)
        return Divergence(version=version, good_version=good, why=why)

    def refusal(self, record: JobRecord, found: Divergence) -> str:
        """Why the job fails of ``found``, in one sentence; empty when it may go back."""
        if not self.rolls_back:
            remedy = "lower the learning rate or async.window, or have train.on_divergence: rollback"
            return f"training diverges: {found.why}; {remedy}"
        if len(record.rollbacks) >= MOST_ROLLBACKS:
            factor = record.rollbacks[-1]["rate_factor"]
            return (
                f"training diverges again, synchronously and with {factor:g} of its learning rate: {found.why}; "
                f"lower the learning rate"
            )
        return ""

    def go_back(
        self, record: JobRecord, reached: int, num_updates: int, now: float
    ) -> tuple[JobRecord, str, dict[str, Any]]:
        """Write down to which cut all layers go back from about version ``reached``, and how training goes on from there.

        Gives the record, and a line for the job's log with its fields.
        """
        found, self.found = self.found, None
        assert found is not None
        cuts = tuple(one for one in record.cuts if one.version <= found.good_version)
        version = cuts[-1].version if cuts else 0
        reached = max(reached, version)
        rollback = roll_back(
            record.rollbacks, version=version, reached=reached, num_updates=num_updates, why=found.why, now=now
        )
        # What diverged made losses not finite; that was not the samples' fault, unless it was there before.
        kept = {(one["epoch"], one["start"]) for cut in cuts for one in cut.ledger.get("dropped", ())}
        drops = tuple(
            one
            for one in record.drops
            if not one["reason"].startswith(NOT_FINITE) or (one["epoch"], one["start"]) in kept
        )
        fields = rollback.to_json()
        line = (
            f"training diverges: {found.why}; all layers go back from version {reached} to {version}, forget their moments, "
            f"and train at {rollback.rate_factor:g} of the learning rate, synchronously until version "
            f"{rollback.synchronous_until}"
        )
        return replace(record, cuts=cuts, drops=drops, rollbacks=(*record.rollbacks, fields)), line, fields


def _oldest_cut(record: JobRecord) -> int:
    """A cut from before any rise is kept, so the oldest one is the likeliest to be good if nothing else is known."""
    return record.cuts[0].version if record.cuts else 0
