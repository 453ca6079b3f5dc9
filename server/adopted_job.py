"""What a job's directory remembers of it: the newest sound cut's manifest says how to go on."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.cuts import durable_cuts, load_manifest, newest_sound_cut
from layerwise.errors import CorruptCutError, CorruptError, LayerwiseError, NotFoundError
from layerwise.fences import fences_in
from layerwise.rollbacks import rollbacks_in
from layerwise.server.job_record import CutRecord, JobEvent, JobRecord, JobState
from layerwise.server.memory_store import JobStore

log = logging.getLogger(__name__)

_LIFE = re.compile(r"life-(\d+)")


def read_job(directory: str | Path) -> JobRecord:
    """The record of the job whose cuts are in ``directory``, as a cancelled job at its newest sound cut.

    Cuts that are damaged are named in its warnings. Its next life is above every life that has left an event log or a
    fence there, whatever the manifest knew.

    Raises:
        NotFoundError: there is no durable cut in it.
        CorruptError: no cut is sound, or the newest sound one's manifest does not say enough.
    """
    folder = Path(directory).absolute()
    rollbacks = rollbacks_in(folder)
    version, warnings = _newest(folder, rollbacks)
    if version is None:
        raise NotFoundError(
            f"there is no durable cut in {folder}, so there is nothing to go on from; submit the job instead"
        )
    manifest = load_manifest(folder, version)
    try:
        return JobRecord(
            job=manifest["job"],
            number=0,
            name=manifest["name"],
            state=JobState.CANCELLED,
            message=f"found in {folder}",
            warnings=warnings,
            spec_json=json.dumps(manifest["spec"], sort_keys=True, separators=(",", ":")),
            settings_json=json.dumps(manifest["settings"], sort_keys=True, separators=(",", ":")),
            profile_json=json.dumps(manifest["profile"], separators=(",", ":")),
            blocks=tuple((one["start"], one["stop"]) for one in manifest["blocks"]),
            directory=str(folder),
            created=manifest["created"],
            started=manifest["started"],
            next_life=max(manifest["next_life"], _newest_life(folder) + 1),
            resume_count=manifest["resume_count"],
            cuts=_cuts(folder, version, ()),
            evaluations=tuple(manifest["evaluations"]),
            drops=tuple(manifest["ledger"].get("dropped", ())),
            rollbacks=_longest(manifest.get("rollbacks", ()), rollbacks),
        )
    except (KeyError, TypeError) as error:
        raise CorruptError(f"the manifest of cut {version} in {folder} lacks {error}; it can't be resumed") from error


def with_cuts_on_disk(record: JobRecord) -> JobRecord:
    """``record`` with the cuts that its directory really has, up to the newest sound one, before the job goes on.

    A coordinator that was killed between a commit and its own note of it knows a cut that may be deleted by now, and
    not the one that is there. Where the directory can't be seen from here, the record stands.

    Raises:
        NotFoundError: none of the recorded cuts is there any more, nor a newer one.
        CorruptError: no cut is sound.
    """
    folder = Path(record.directory)
    if not (folder / "cuts").is_dir():
        return record
    rollbacks = rollbacks_in(folder)
    version, warnings = _newest(folder, rollbacks)
    if version is None and record.cuts:
        recorded = ", ".join(str(cut.version) for cut in record.cuts)
        raise NotFoundError(
            f"none of the cuts {recorded} of job {record.job} is in {folder} any more; put them back, or submit the "
            "job again"
        )
    return replace(
        record,
        cuts=_cuts(folder, version, record.cuts) if version is not None else (),
        next_life=max(record.next_life, _newest_life(folder) + 1),
        rollbacks=_longest(record.rollbacks, rollbacks),
        warnings=(*record.warnings, *(one for one in warnings if one not in record.warnings)),
    )


def look_at_directories(store: JobStore, now: float) -> None:
    """Before a coordinator goes on with the jobs of the one before: let their records say what their directories have.

    The record may be older than the directory, by a commit whose answer came too late, or by what a power cut took back. A block
    that then began at an older cut would shut the newer ones out for good. Files of cuts are read only where the two differ.
    """
    for record in store.load():
        if record.state.final:
            continue
        try:
            found = _taken_over(record)
        except (LayerwiseError, OSError) as error:
            log.warning("the record of job %s stands, though its directory says otherwise: %s", record.job, error)
            continue
        if found == record:
            continue
        if found.cuts != record.cuts:
            noted, there = (", ".join(str(cut.version) for cut in one.cuts) or "none" for one in (record, found))
            message = f"the cuts in {record.directory} are {there}; noted were {noted}"
            store.add_event(
                record.job, JobEvent(sequence=record.num_events, time=now, level="warning", message=message)
            )
        store.put(found)


def _taken_over(record: JobRecord) -> JobRecord:
    folder = Path(record.directory)
    there = durable_cuts(folder)
    noted = tuple(cut.version for cut in record.cuts)
    rollbacks = rollbacks_in(folder)
    if there[-1:] == noted[-1:] and set(noted) <= set(there) and len(rollbacks) <= len(record.rollbacks):
        return replace(record, next_life=max(record.next_life, _newest_life(folder) + 1))
    found = with_cuts_on_disk(record)
    # What the record has forgotten before its deletion, but for what is newer than all that it knew, may be going just now.
    newest = max(noted, default=-1)
    return replace(found, cuts=tuple(cut for cut in found.cuts if cut.version in noted or cut.version > newest))


def unused_directory(directory: str | Path) -> str:
    """``directory`` as an absolute path; ``directory-2`` and so on if an earlier job has left its work there."""
    folder = Path(directory).expanduser().absolute()
    number = 1
    candidate = folder
    while (candidate / "cuts").exists() or (candidate / "events").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return str(candidate)


def _newest(folder: Path, rollbacks: Sequence[Mapping[str, Any]]) -> tuple[int | None, tuple[str, ...]]:
    """The newest sound cut of what was not rolled back, and a sentence about each damaged one that is newer."""
    damaged: list[CorruptCutError] = []
    version, found = newest_sound_cut(folder)
    damaged += found
    while version is not None and _rolled_back(folder, version, rollbacks):
        version, found = newest_sound_cut(folder, below=version)
        damaged += found
    if version is None and damaged:
        raise CorruptError(f"no cut in {folder} is sound: {damaged[0]}")
    return version, tuple(f"cut {one.version} is damaged, cut {version} is used instead: {one}" for one in damaged)


def _rolled_back(folder: Path, version: int, rollbacks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cut is of what a later rollback took back. No life may have begun since, so that no fence says it."""
    known = len(load_manifest(folder, version).get("rollbacks", ()))
    return any(one["version"] < version for one in rollbacks[known:])


def _longest(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Of two accounts of the rollbacks the one that goes on further."""
    return tuple(one if len(one) >= len(other) else other)


def _cuts(folder: Path, newest: int, known: tuple[CutRecord, ...]) -> tuple[CutRecord, ...]:
    """The cuts up to ``newest``, as they were recorded where they were."""
    found = {cut.version: cut for cut in known}
    versions = [version for version in durable_cuts(folder) if version <= newest]
    return tuple(found.get(version) or cut for version in versions if (cut := _cut(folder, version)) is not None)


def _cut(folder: Path, version: int) -> CutRecord | None:
    try:
        manifest = load_manifest(folder, version)
    except CorruptCutError:
        return None  # an old one that nobody goes on from
    num_bytes = sum(one["bytes"] for one in manifest["files"])
    return CutRecord(version=version, time=0.0, num_bytes=num_bytes, ledger=manifest["ledger"])


def _newest_life(folder: Path) -> int:
    logs = [int(match[1]) for path in folder.glob("events/*/*") if (match := _LIFE.fullmatch(path.name))]
    return max((*logs, *(fence.life for fence in fences_in(folder))), default=0)
