"""Recompute a job's promises from its event logs alone, and from the coordinator's sample ledger where there is one.

    blocks' logs ──► LayerAudit, one a layer and life ──► chain of lives, layer by layer ──► all layers ──► ledger

Counters that the running job keeps are not asked: this is what checks them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import frexp
from pathlib import Path

from layerwise.applied import AppliedSet
from layerwise.audit_report import AuditReport, Findings, LayerFacts
from layerwise.block_audit import AttemptNumbers, BlockEvents, log_name, replay_block
from layerwise.block_audit import StoredEvents as StoredEvents
from layerwise.cuts import durable_cuts, layer_files, load_manifest
from layerwise.dropped import DroppedMicrobatch
from layerwise.errors import CorruptCutError, CorruptError, NotFoundError
from layerwise.events import RestoreEvent
from layerwise.layer_audit import CutState, LayerAudit
from layerwise.log_header import LogHeader, name_of
from layerwise.log_reader import LogReader, find_logs
from layerwise.plan import TrainingPlan
from layerwise.rate_book import LearningRate, RateBook


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLedgerSummary:
    """The coordinator's sample ledger at the end of a job.

    Samples are counted once for each epoch, whatever the attempts. ``dropped`` may end before all ``num_dropped``
    microbatches (-1: it has them all).
    """

    job: str
    version: int
    samples_leased: int
    samples_applied: int
    samples_dropped: int
    dropped: tuple[DroppedMicrobatch, ...] = ()
    num_dropped: int = -1


_DETAILS = {
    "log": "records",
    "versions": "updates",
    "lives": "restores",
    "exactly-once": "microbatches taken in",
    "updates": "updates",
    "tickets": "records of tickets",
    "numbers": "attempts",
    "buffers": "forward passes",
    "staleness-identity": "layers and lives",
    "staleness-bound": "gradients",
    "learning-rates": "updates",
    "rollbacks": "gradients",
    "position-order": "updates",
    "agreement": "layers",
    "ledger": "microbatches",
}


def audit(
    blocks: Iterable[BlockEvents],
    *,
    ledger: SampleLedgerSummary | None = None,
    plan: TrainingPlan | None = None,
    learning_rate: LearningRate | None = None,
    cuts: Mapping[int, Iterable[tuple[int, int]]] | None = None,
    wanted: Container[int] | None = None,
) -> AuditReport:
    """Check every promise against the records of ``blocks``: all blocks and all lives of one job, in any order.

    With ``ledger`` the job is taken to be at its end: all layers must agree with each other and with it. ``plan`` is
    what the logs must have been written under; ``learning_rate(layer, samples_before, staleness)`` what each update
    must have used. ``cuts`` has the durable cuts: by version the layers, each with the life that saved it. What that life
    had done by then was on the disk before, so its log can't end earlier. ``wanted`` are the versions of these cuts and
    those at which lives begin, if they are known: states at others are not remembered. Contradictions are in the report; nothing is raised for them.
    """
    every = sorted(blocks, key=lambda block: (block.header.life, block.header.start))
    findings = Findings()
    rates = RateBook(findings, learning_rate)
    lives: dict[int, list[LayerAudit]] = {}
    names: dict[int, str] = {}
    numbers: dict[int, AttemptNumbers] = {}
    for block in every:
        header = block.header
        names.update(zip(range(header.start, header.stop), header.layer_names, strict=True))
        known = numbers.setdefault(header.life, AttemptNumbers(findings))
        for layer in replay_block(block, findings, rates, known, wanted):
            layer.finish()
            lives.setdefault(layer.layer, []).append(layer)
    _check_headers([block.header for block in every], findings, ledger, plan)
    rates.finish()
    for chain in lives.values():
        _check_chain(chain, findings)
    _check_rollbacks([block.header for block in every], findings)
    _check_cuts(lives, cuts or {}, findings)
    last = {layer: chain[-1] for layer, chain in sorted(lives.items())}
    _check_agreement(last, findings, ledger)
    dropped = _dropped(lives)
    _check_ledger(last, dropped, findings, ledger)
    if not any(block.header.position_order for block in every):
        findings.skip("position-order", "gradients are summed as they arrive")
    job = every[0].header.job if every else "of no name"
    return findings.report(
        job, _DETAILS, (_facts(layer, names[layer], chain) for layer, chain in sorted(lives.items())), dropped
    )


def audit_directory(
    path: str | Path,
    *,
    ledger: SampleLedgerSummary | None = None,
    plan: TrainingPlan | None = None,
    learning_rate: LearningRate | None = None,
) -> AuditReport:
    """`audit` the event logs in a job's directory against its cuts. A log that can't be read fails the check "log".

    Raises:
        NotFoundError: there are no event logs.
    """
    folders = find_logs(path)
    if not folders:
        raise NotFoundError(
            f"no event logs in {Path(path) / 'events'}: is this a job's directory, and has training begun?"
        )
    cuts = _durable_cuts(path)  # before the logs, which may be written to: what a cut has of them is there
    readers: list[LogReader] = []
    unreadable: list[str] = []
    for folder in folders:
        try:
            readers.append(LogReader(folder))
        except NotFoundError:
            continue  # a crash came before the first line, so this life did nothing
        except CorruptError as error:
            unreadable.append(str(error))
    wanted = frozenset([*cuts, *(version for reader in readers for version in _begun_at(reader))])
    report = audit(readers, ledger=ledger, plan=plan, learning_rate=learning_rate, cuts=cuts, wanted=wanted)
    return report.with_failures("log", unreadable)


def _begun_at(reader: LogReader) -> Iterator[int]:
    """The versions at which the layers of a log begin, which it says first of all. What is wrong with it the audit finds."""
    waiting = reader.header.stop - reader.header.start
    try:
        for state in reader.summary.layers.values() if reader.summary is not None else ():
            if state["restored"] is not None:
                waiting -= 1
                yield int(state["restored"]["version"])
        for record in reader.records if waiting > 0 else ():
            if isinstance(record.event, RestoreEvent):
                waiting -= 1
                yield record.event.version
                if not waiting:
                    return
    except (CorruptError, ValueError, KeyError, TypeError, AttributeError):
        return


def _durable_cuts(directory: str | Path) -> dict[int, list[tuple[int, int]]]:
    """By version which life saved each layer, as the cuts' manifests say; those that can't be read say nothing."""
    found: dict[int, list[tuple[int, int]]] = {}
    for version in durable_cuts(directory):
        try:
            found[version] = [(file.layer, file.life) for file in layer_files(load_manifest(directory, version))]
        except (CorruptCutError, NotFoundError):
            continue  # damaged, which whoever uses it hears; or deleted by a newer cut
    return found


def _check_headers(
    headers: list[LogHeader], findings: Findings, ledger: SampleLedgerSummary | None, plan: TrainingPlan | None
) -> None:
    if not headers:
        findings.fail("log", "there are no logs")
        return
    first = headers[0]
    job = ledger.job if ledger is not None else first.job
    arithmetic = _arithmetic(plan if plan is not None else first.plan)
    seen: set[tuple[int, int]] = set()
    for header in headers:
        if name_of(header.job) != name_of(job) or header.num_layers != first.num_layers:
            findings.fail(
                "log", f"{log_name(header)} is of job {header.job} with {header.num_layers} layers, not of job {job}"
            )
        if _arithmetic(header.plan) != arithmetic:
            findings.fail("log", f"{log_name(header)} was written under another plan: {header.plan}")
        again = [layer for layer in range(header.start, header.stop) if (header.life, layer) in seen]
        if again:
            findings.fail("log", f"{log_name(header)}: layers {again} are in two logs of the same life")
        seen.update((header.life, layer) for layer in range(header.start, header.stop))
    missing = sorted(set(range(first.num_layers)) - {layer for _, layer in seen})
    if missing:
        findings.fail("log", f"there is no log of layers {missing}")


def _arithmetic(plan: TrainingPlan) -> tuple[int, int, int]:
    """What must stay the same when a job goes on: the number of updates may grow."""
    return plan.num_samples, plan.batch, plan.accumulation


def _check_chain(chain: list[LayerAudit], findings: Findings) -> None:
    """Each life of one layer must begin at what an earlier life saved (the first one: with nothing)."""
    for number, layer in enumerate(chain):
        who = f"layer {layer.layer} (life {layer.header.life})"
        restored = layer.restored
        if restored is None:
            continue
        saved = _saved(chain[:number], restored.version)
        state = CutState(
            samples=restored.samples, digest=restored.digest, applied=restored.applied, buffers=restored.buffers
        )
        if not saved:
            fenced = [one.header.life for one in chain[:number] if restored.version in one.cuts]
            why = (
                f"which life {fenced[-1]} saved and a later one began below"
                if fenced
                else "which no earlier life saved"
            )
            findings.fail("lives", f"{who} begins at version {restored.version}, {why}")
        elif state not in saved:
            findings.fail(
                "lives",
                f"{who} begins at version {restored.version} with other contents than were saved: "
                f"{_difference(saved[-1], state)}",
            )


def _check_rollbacks(headers: list[LogHeader], findings: Findings) -> None:
    """Learning rates are only ever halved, and for all layers."""
    if all(header.rate_factor == 1.0 and not header.synchronous_until for header in headers):
        findings.skip("rollbacks", "nothing was rolled back")
        return
    since: dict[float, int] = {}
    for header in headers:
        since.setdefault(header.rate_factor, header.life)
        if not (0 < header.rate_factor <= 1 and frexp(header.rate_factor)[0] == 0.5):
            findings.fail(
                "rollbacks", f"{log_name(header)}: {header.rate_factor!r} of the learning rate comes from no halving"
            )
        lower = [factor for factor, life in since.items() if factor < header.rate_factor and life < header.life]
        if lower:
            findings.fail(
                "rollbacks",
                f"{log_name(header)} has {header.rate_factor!r} of the learning rate, an earlier life {min(lower)!r} already",
            )
    lowest = min(since)
    lives: dict[int, LogHeader] = {}
    for header in headers:
        lives.update(dict.fromkeys(range(header.start, header.stop), header))
    behind = sorted(layer for layer, header in lives.items() if header.rate_factor != lowest)
    if behind:
        findings.fail("rollbacks", f"layers {behind} do not have the {lowest!r} of the learning rate that others have")


def _check_cuts(
    lives: dict[int, list[LayerAudit]], cuts: Mapping[int, Iterable[tuple[int, int]]], findings: Findings
) -> None:
    """The log of the life that saved a layer must go on at least to there."""
    for version, owners in sorted(cuts.items()):
        missing: dict[int, list[int]] = {}
        for layer, life in owners:
            if not any(one.header.life == life and version in one.cuts for one in lives.get(layer, ())):
                missing.setdefault(life, []).append(layer)
        for life, layers in sorted(missing.items()):
            findings.fail(
                "log",
                f"life {life} of layers {layers} saved the cut at version {version}, and its log has nothing of that: "
                "it was cut short, or removed",
            )


def _saved(chain: list[LayerAudit], version: int) -> list[CutState]:
    """The states at ``version`` that a life after ``chain`` may begin with, oldest first.

    What a life has saved counts unless a later one has begun below it: the history of a layer is one line, each life's part of it
    ending where the next begins (see `layerwise.fences`).
    """
    saved: list[CutState] = []
    for layer in chain:
        if layer.restored is not None and layer.restored.version < version:
            saved.clear()
        if version in layer.cuts:
            saved.append(layer.cuts[version])
    initial = CutState(samples=0, digest="", applied=AppliedSet(), buffers=AppliedSet())
    return [initial, *saved] if version == 0 else saved


def _difference(saved: CutState, found: CutState) -> str:
    if saved.digest != found.digest:
        return f"hash {found.digest!r} instead of {saved.digest!r}"
    if saved.samples != found.samples:
        return f"{found.samples} samples instead of {saved.samples}"
    return "another set of microbatches applied" if saved.applied != found.applied else "another set of buffer writes"


def _check_agreement(last: dict[int, LayerAudit], findings: Findings, ledger: SampleLedgerSummary | None) -> None:
    if ledger is None:
        findings.skip("agreement", "promised for the end of a job: there is no ledger of one")
        return
    if not last:
        return
    first = next(iter(last.values()))
    for layer in last.values():
        findings.count("agreement")
        if layer.version != ledger.version:
            findings.fail(
                "agreement", f"layer {layer.layer} ends at version {layer.version}, the job at {ledger.version}"
            )
        elif not _same_members(layer.applied, first.applied):
            findings.fail(
                "agreement", f"layers {first.layer} and {layer.layer} end with different sets of microbatches"
            )
        for forward in layer.open.values():
            findings.fail("tickets", f"layer {layer.layer}: {forward.attempt} is still open at the end of the job")


def _same_members(one: AppliedSet, other: AppliedSet) -> bool:
    return one.watermark == other.watermark and one.above == other.above


def _dropped(lives: dict[int, list[LayerAudit]]) -> list[DroppedMicrobatch]:
    """What the layers hold as dropped at the end of their last lives; the reasons are those of any life."""
    reasons: dict[int, str] = {}
    layers: dict[int, list[int]] = {}
    for layer, chain in sorted(lives.items()):
        for life in chain:
            reasons.update(life.reasons)
        for index in chain[-1].applied.dropped:
            layers.setdefault(index, []).append(layer)
    plan = next((chain[-1].header.plan for chain in lives.values()), None)
    return [
        DroppedMicrobatch(
            microbatch=plan.microbatch(index),
            reason=reasons.get(index, "the logs that are here do not say why"),
            missing_from=None if len(missing) == len(lives) else missing[0],
        )
        for index, missing in sorted(layers.items())
        if plan is not None
    ]


def _check_ledger(
    last: dict[int, LayerAudit],
    dropped: list[DroppedMicrobatch],
    findings: Findings,
    ledger: SampleLedgerSummary | None,
) -> None:
    """Compare the coordinator's account with the logs'."""
    if ledger is None:
        findings.skip("ledger", "no ledger was given")
        return
    if not last:
        return
    if ledger.samples_leased != ledger.samples_applied + ledger.samples_dropped:
        findings.fail(
            "ledger",
            f"{ledger.samples_leased} samples were leased, {ledger.samples_applied} applied and "
            f"{ledger.samples_dropped} dropped",
        )
    first = next(iter(last.values()))
    if any(not _same_members(layer.applied, first.applied) for layer in last.values()):
        return  # there is no one total to compare with; the check "agreement" has said so
    plan = first.header.plan
    common = AppliedSet.intersection([layer.applied for layer in last.values()])
    samples = plan.samples_in(common.watermark) + sum(plan.microbatch(index).num_samples for index in common.above)
    tombstones = {one.microbatch: one for one in dropped}
    missing = sum(microbatch.num_samples for microbatch in tombstones)
    findings.count("ledger", len(common))
    if (ledger.samples_applied, ledger.samples_dropped) != (samples - missing, missing):
        findings.fail(
            "ledger",
            f"the ledger says {ledger.samples_applied} samples applied and {ledger.samples_dropped} dropped, the logs "
            f"{samples - missing} and {missing}",
        )
    listed = {one.microbatch: one for one in ledger.dropped}
    num_dropped = len(listed) if ledger.num_dropped < 0 else ledger.num_dropped
    if num_dropped > len(listed):
        # The document lists the first of them only.
        tombstones = {one.microbatch: one for one in dropped[: len(listed)]}
        if num_dropped != len(dropped):
            findings.fail("ledger", f"the ledger counts {num_dropped} dropped microbatches, the logs {len(dropped)}")
    for microbatch in sorted(tombstones.keys() ^ listed.keys()):
        where = "the ledger and not in the logs" if microbatch in listed else "the logs and not in the ledger"
        findings.fail("ledger", f"{microbatch} is dropped in {where}")
    for microbatch in sorted(tombstones.keys() & listed.keys()):
        said, found = listed[microbatch], tombstones[microbatch]
        if said.missing_from != found.missing_from:
            findings.fail(
                "ledger",
                f"{microbatch} is missing from {_missing(found)} in the logs and from {_missing(said)} in the ledger",
            )
        if not said.reason:
            findings.fail("ledger", f"{microbatch} is dropped, and the ledger does not say why")


def _missing(dropped: DroppedMicrobatch) -> str:
    return "every layer" if dropped.missing_from is None else f"layer {dropped.missing_from} and not from all"


def _facts(layer: int, name: str, chain: list[LayerAudit]) -> LayerFacts:
    last = chain[-1]
    histogram = [0] * (1 + max((max(life.staleness, default=-1) for life in chain), default=-1))
    for life in chain:
        for staleness, count in life.staleness.items():
            if staleness >= 0:
                histogram[staleness] += count
    return LayerFacts(
        layer=layer,
        name=name,
        life=last.header.life,
        version=last.version,
        microbatches=len(last.applied),
        dropped=len(last.applied.dropped),
        open_tickets=len(last.open),
        staleness=tuple(histogram),
    )
