"""The audit of a job's directory, with all that is known about the job beside its event logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.audit import DroppedMicrobatch, SampleLedgerSummary, audit_directory
from layerwise.audit_report import AuditReport
from layerwise.cuts import durable_cuts, load_manifest
from layerwise.errors import CorruptError
from layerwise.ids import Microbatch
from layerwise.job import parse_job
from layerwise.policies import delay_policy
from layerwise.schedules import learning_rate_factor
from layerwise.settings import ResolvedSettings


def audit_job(directory: str | Path, document: Mapping[str, Any] | None = None) -> AuditReport:
    """Audit the event logs in ``directory``.

    The plan and the learning rates come from the newest cut's manifest, if there is one; the sample ledger from ``document``, the job's
    own, if it says that the job came to its end.

    Raises:
        NotFoundError: there are no event logs.
        CorruptError: a manifest can't be read.
    """
    ledger = _ledger(document) if document is not None and document.get("state") in ("done", "cancelled") else None
    versions = durable_cuts(directory)
    if not versions:
        return audit_directory(directory, ledger=ledger)
    manifest = load_manifest(directory, versions[-1])
    settings = ResolvedSettings.from_json(json.dumps(manifest["settings"]))
    schedule = parse_job(manifest["spec"], source=f"cut {versions[-1]} in {directory}").train.schedule
    policy = delay_policy(settings.delay_policy)
    total = max(settings.plan.total_samples, 1)

    def learning_rate(layer: int, samples: int, staleness: int) -> float:
        return policy(staleness, learning_rate_factor(schedule, samples, total))

    return audit_directory(directory, ledger=ledger, plan=settings.plan, learning_rate=learning_rate)


def _ledger(document: Mapping[str, Any]) -> SampleLedgerSummary | None:
    ledger = document.get("ledger") or {}
    if not document.get("steps"):
        return None
    try:
        return SampleLedgerSummary(
            job=document["job"],
            version=document["steps"],
            samples_leased=ledger["samples_leased"],
            samples_applied=ledger["samples_applied"],
            samples_dropped=ledger["samples_dropped"],
            dropped=tuple(
                DroppedMicrobatch(
                    microbatch=Microbatch(one["epoch"], one["start"], one["stop"]),
                    reason=one["reason"],
                    missing_from=one["missing_from"],
                )
                for one in ledger.get("dropped", ())
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"the ledger in the document of job {document.get('job')} can't be read: {error}") from error
