"""A job as one JSON object: what ``status``, ``result`` and ``--output json`` show.

Every key is always there; what is not known yet is None, zero or empty. Staleness is in updates, times are unix
seconds, durations seconds.
"""

from __future__ import annotations

import json
import math
from typing import Any

from layerwise.messages import Role
from layerwise.server.evaluation_round import num_evaluations
from layerwise.server.job_record import JobRecord
from layerwise.server.run import Run
from layerwise.server.staleness_view import staleness_document, summarize
from layerwise.server.training import Training


def job_document(
    record: JobRecord, run: Run | None, *, queue_position: int | None = None, waiting_for: str = ""
) -> dict[str, Any]:
    """The document of a job. ``queue_position`` is 1 for the job that starts next, None for one that does not wait.

    A run that is over, or one that has not begun since, shows what the last document said.
    """
    document = _empty(record)
    document.update({key: value for key, value in record.document.items() if key in document})
    document.update(_from_record(record))
    document["queue_position"] = queue_position
    document["waiting_for"] = waiting_for
    if run is not None:
        document.update(_from_run(run))
    if waiting_for and not record.message:
        document["message"] = f"waiting: {waiting_for}"
    return document


def _empty(record: JobRecord) -> dict[str, Any]:
    return {
        **_from_record(record),
        "queue_position": None,
        "waiting_for": "",
        "steps": 0,
        "total_steps": None,
        "epochs": 0.0,
        "samples": 0,
        "total_samples": None,
        "seconds": 0.0,
        "samples_per_second": None,
        "train_loss": None,
        "loss_at_start": None,
        "staleness": {**summarize({}), "layers": []},
        "ledger": {"samples_leased": 0, "samples_applied": 0, "samples_dropped": 0, "num_dropped": 0, "dropped": []},
        "window": None,
        "accumulation": None,
        "backward_weights": None,
        "delay_policy": None,
        "max_staleness": None,
        "expected_staleness": None,
        "learning_rate": None,
        "blocks": [],
        "forward_workers": [],
        "backward_workers": [],
        "joined_workers": [],
        "recoveries": [],
    }


def _from_record(record: JobRecord) -> dict[str, Any]:
    last = record.evaluations[-1] if record.evaluations else None
    return {
        "job": record.job,
        "name": record.name,
        "state": str(record.state),
        "message": record.message,
        "warnings": [*record.warnings, *_not_finite(record)],
        "created": record.created,
        "started": record.started,
        "finished": record.finished,
        "directory": record.directory,
        "resume_count": record.resume_count,
        "num_events": record.num_events,
        "spec": json.loads(record.spec_json),
        "cuts": [cut.to_json() for cut in record.cuts],
        "evaluations": [dict(one) for one in record.evaluations],
        "num_evaluations": num_evaluations(record.evaluations),
        "rollbacks": [dict(one) for one in record.rollbacks],
        "validation": {key: value for key, value in last.items() if key not in ("seconds", "number")} if last else None,
    }


def _not_finite(record: JobRecord) -> list[str]:
    """What must be said of evaluations whose numbers can't be shown; the newest one stands for all."""
    for evaluation in reversed(record.evaluations):
        names = [name for name, value in evaluation.items() if isinstance(value, float) and not math.isfinite(value)]
        if names:
            return [f"the evaluation of version {evaluation['version']} gave no finite {', '.join(names)}"]
    return []


def _from_run(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = {
        "blocks": _blocks(run),
        "recoveries": list(run.recovery.made),
        "forward_workers": list(run.workers.of_role(Role.FORWARD)),
        "backward_workers": list(run.workers.of_role(Role.BACKWARD)),
        "joined_workers": list(run.workers.joined),
    }
    if run.loss_at_start is not None:
        document["loss_at_start"] = run.loss_at_start
    if run.prepared is not None:
        settings = run.prepared.settings
        document |= {
            "total_steps": settings.plan.num_updates,
            "total_samples": settings.plan.total_samples,
            "window": settings.window,
            "accumulation": settings.accumulation,
            "backward_weights": settings.backward_weights,
            "delay_policy": settings.delay_policy,
            "max_staleness": settings.max_staleness,
            "expected_staleness": settings.expected_staleness,
        }
        if run.training is not None:
            document |= _from_training(run.training, run.prepared.layer_names, over=run.over)
    if not run.record.message:
        document["message"] = run.phase
    return document


def _from_training(training: Training, names: tuple[str, ...], *, over: bool) -> dict[str, Any]:
    seconds = training.clock.seconds
    samples = training.ledger.samples_applied
    layers = training.layers()
    return {
        "steps": training.version,
        "samples": samples,
        "epochs": (samples + training.ledger.samples_dropped) / training.plan.num_samples,
        "seconds": seconds,
        "samples_per_second": training.run_samples / seconds if seconds else None,
        "train_loss": training.loss.recent if over else training.loss.running,
        "staleness": staleness_document(layers, names),
        "ledger": training.ledger.summary(),
        "learning_rate": layers[0].learning_rate if layers else None,
    }


def _blocks(run: Run) -> list[dict[str, Any]]:
    blocks = []
    for block, place in enumerate(run.route):
        report = run.training.reports.get(block) if run.training is not None else None
        layers = report.layers if report is not None else ()
        parameters = 0
        if run.prepared is not None:
            parameters = sum(layer.parameters for layer in run.prepared.profile.layers[place.start : place.stop])
        blocks.append(
            {
                "block": block,
                "shard": place.shard,
                "device": run.device(block),
                "start": place.start,
                "stop": place.stop,
                "life": place.life,
                "parameters": parameters,
                "version": min((layer.version for layer in layers), default=None),
                "open_attempts": report.open_attempts if report is not None else 0,
                "store_bytes": report.store_bytes if report is not None else 0,
                "forward_queue": report.forward_queue if report is not None else 0,
                "backward_queue": report.backward_queue if report is not None else 0,
                "compute_seconds": report.compute_seconds if report is not None else 0.0,
                "log_bytes": report.log_bytes if report is not None else 0,
                "standby_version": run.standby_version(block),
            }
        )
    return blocks
