"""The audit of a job's directory, with all that is known about the job beside its event logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.audit import SampleLedgerSummary, audit_directory
from layerwise.audit_report import AuditReport
from layerwise.cuts import durable_cuts, load_manifest
from layerwise.dropped import DroppedMicrobatch
from layerwise.errors import CorruptError, NotFoundError
from layerwise.event_log import LogReader, find_logs
from layerwise.events import UpdateEvent
from layerwise.job import JobSpec, parse_job
from layerwise.policies import delay_policy
from layerwise.schedules import learning_rate_factor
from layerwise.sections import Muon
from layerwise.settings import ResolvedSettings


def audit_job(directory: str | Path, document: Mapping[str, Any] | None = None) -> AuditReport:
    """Audit the event logs in ``directory``.

    The plan and the learning rates come from the newest cut's manifest, if there is one; the sample ledger from
    ``document``, the job's own, if it says that the job came to its end.

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
    rates = _LearningRates(parse_job(manifest["spec"], source=f"cut {versions[-1]} in {directory}"), settings)
    rates.find_bases(directory)
    return audit_directory(directory, ledger=ledger, plan=settings.plan, learning_rate=rates)


class _LearningRates:
    """What each update must have used: the layer's base rate, times the schedule's factor, through the delay policy.

    An optimizer may have several base rates, such as muon's own and that of its adam; which of them is a layer's is
    seen from its first update. All later ones are checked.
    """

    def __init__(self, spec: JobSpec, settings: ResolvedSettings) -> None:
        optimizer = spec.train.optimizer
        self._bases = (optimizer.lr, optimizer.adam_lr) if isinstance(optimizer, Muon) else (optimizer.lr,)
        self._schedule = spec.train.schedule
        self._policy = delay_policy(settings.delay_policy)
        self._total = max(settings.plan.total_samples, 1)
        self._base_of: dict[int, float] = {}

    def __call__(self, layer: int, samples: int, staleness: int) -> float:
        return self._rate(self._base_of.get(layer, self._bases[0]), samples, staleness)

    def find_bases(self, directory: str | Path) -> None:
        """Read the first update of every layer."""
        for folder in find_logs(directory):
            try:
                reader = LogReader(folder)
                missing = set(range(reader.header.start, reader.header.stop)) - self._base_of.keys()
                for record in reader.records:
                    event = record.event
                    if isinstance(event, UpdateEvent) and event.layer in missing and event.learning_rate is not None:
                        fitting = [
                            base
                            for base in self._bases
                            if self._rate(base, event.samples_before, event.staleness)
                            == event.learning_rate / reader.header.rate_factor
                        ]
                        self._base_of[event.layer] = (*fitting, *self._bases)[0]
                        missing.remove(event.layer)
                    if not missing:
                        break
            except (CorruptError, NotFoundError):
                continue  # the audit itself says so

    def _rate(self, base: float, samples: int, staleness: int) -> float:
        return self._policy(staleness, base * learning_rate_factor(self._schedule, samples, self._total))


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
            dropped=tuple(DroppedMicrobatch.from_json(one) for one in ledger.get("dropped", ())),
            num_dropped=ledger.get("num_dropped", -1),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"the ledger in the document of job {document.get('job')} can't be read: {error}") from error
