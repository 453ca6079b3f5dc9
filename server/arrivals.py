"""Which job a worker joins that came to help beyond what jobs need, or why it has nothing to do here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from layerwise.job import JobSpec
from layerwise.messages import Dismissal, DismissalReason, Role
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.membership import Membership, Process
from layerwise.server.placement import missing_imports, suits
from layerwise.server.run import Run


def arrivals(members: Membership) -> list[Process]:
    """The workers that came to join a job and work for none."""
    return [one for one in members if one.joins and one.free and not one.draining]


def destination(
    process: Process, runs: Mapping[str, Run], jobs: Mapping[str, JobRecord], spec_of: Callable[[JobRecord], JobSpec]
) -> Run | Dismissal | None:
    """The run that ``process`` joins now: that of the job it named, else the oldest that can use it. None: it waits.

    A job that failed or was cancelled may be resumed, so that is waited for.
    """
    name = process.hello.join
    if not name:
        return next(iter(_open_to(process, sorted(runs.values(), key=lambda run: run.record.number))), None)
    record = jobs.get(name)
    if record is None:
        known = ", ".join(list(jobs)[-5:]) or "none"
        return Dismissal(
            reason=DismissalReason.NOT_FOUND, message=f"no job {name!r} to join here; the newest are: {known}"
        )
    if record.state is JobState.DONE:
        return Dismissal(reason=DismissalReason.OVER, message=f"job {name} is done, so nothing is left to join")
    if why := why_useless(process, spec_of(record)):
        message = f"{process.role} worker {process.name} can't join job {name}: {why}"
        return Dismissal(reason=DismissalReason.NOT_ALLOWED, message=message)
    return next(iter(_open_to(process, [runs[name]] if name in runs else [])), None)


def why_useless(process: Process, spec: JobSpec) -> str:
    """Why a job can't use one more such worker, and what to do; empty when it can."""
    if process.role is Role.BACKWARD and not spec.cluster.num_detached:
        return (
            "it takes no detached backward workers; say `cluster: {backward: {detached: 1}}` in the job file, or start "
            "`layerwise forward --join`"
        )
    if modules := missing_imports(process, spec):
        return f"start it with --allow-import {' '.join(modules)}"
    if not suits(process, spec):
        return f"it is on {process.hello.device}, and the job wants {spec.cluster.device}"
    return ""


def _open_to(process: Process, runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.over and not run.stopping and not why_useless(process, run.spec)]
