"""A cluster for one chaos run, and the job as it runs there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerwise.chaos.plan import ChaosPlan, JobShape, Scenario
from layerwise.chaos.run import FiredFiles
from layerwise.cluster import LocalCluster
from layerwise.data.load import load_dataset
from layerwise.fault_points import FIRED_VARIABLE, VARIABLE
from layerwise.faults import frame_fault_variable
from layerwise.job import JobSpec, resolve
from layerwise.sections import Backward

SHORT_TIMEOUTS = {"heartbeat": 3.0, "task": 5.0, "lease": 10.0}
"""Unless the job says otherwise: with the usual ones a pause would have to last for minutes to be noticed."""


def job_for_chaos(spec: JobSpec, scenario: Scenario, directory: Path) -> JobSpec:
    """The job with time-outs short enough to matter, and with detached backward workers if some are to be killed."""
    given = spec.timeouts.model_fields_set
    timeouts = spec.timeouts.model_copy(
        update={name: value for name, value in SHORT_TIMEOUTS.items() if name not in given}
    )
    changes: dict[str, object] = {
        "timeouts": timeouts,
        "checkpoint": spec.checkpoint.model_copy(update={"path": str(directory)}),
    }
    if scenario is Scenario.KILL_BACKWARD and not spec.cluster.num_detached:
        backward = Backward(attached=True, detached=spec.cluster.shards)
        changes["cluster"] = spec.cluster.model_copy(update={"backward": backward})
    return spec.model_copy(update=changes)


def shape_of(spec: JobSpec, allow_imports: Sequence[str] = ()) -> JobShape:
    """The shape of a job that has not run yet: loads its data.

    Where the window is left open it is taken to be the longest that measuring could bring, so that no link is thought
    to carry more frames than it will.
    """
    data = load_dataset(spec.data, tuple(allow_imports))
    settings = resolve(spec, data.info.num_train, spec.cluster.shards, hop_fraction=1e3)
    return JobShape.of(spec, settings)


def cluster_for(
    spec: JobSpec,
    plan: ChaosPlan,
    directory: Path,
    *,
    allow_imports: Sequence[str] = (),
    threads: int | None = None,
) -> tuple[LocalCluster, FiredFiles]:
    """A cluster (not started) as large as the job wants, with a warm spare process, and the plan in its environment.

    Where a process is to be replaced while it is paused, there is one more of each role: a warm spare takes the place of
    those that have ended only.
    """
    fired = FiredFiles.below(directory)
    environment: dict[str, str] = {}
    if plan.frame_faults:
        environment |= frame_fault_variable(plan.frame_faults, fired.frames)
    if plan.disk_faults:
        environment |= {VARIABLE: ",".join(plan.disk_faults), FIRED_VARIABLE: str(fired.disk)}
    more = 1 if plan.needs_spares(spec.timeouts.heartbeat) else 0
    detached = spec.cluster.num_detached
    cluster = LocalCluster(
        shards=spec.cluster.shards + more,
        forward=spec.cluster.forward + more,
        backward=detached + more if detached else 0,
        directory=directory / "cluster",
        allow_imports=allow_imports,
        threads=threads,
        devices=(spec.cluster.device,),
        serve_metrics=False,
        restart=True,
        spare=True,
        environment=environment,
    )
    return cluster, fired
