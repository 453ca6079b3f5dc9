"""A job that only its directory remembers: the newest cut's manifest says how to go on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from layerwise.cuts import durable_cuts, load_manifest
from layerwise.errors import CorruptError, NotFoundError
from layerwise.server.job_record import CutRecord, JobRecord, JobState

_LIFE = re.compile(r"life-(\d+)")


def read_job(directory: str | Path) -> JobRecord:
    """The record of the job whose cuts are in ``directory``, as a cancelled job at its newest durable cut.

    Its next life is above every life that has left an event log there, whatever the manifest knew.

    Raises:
        NotFoundError: there is no durable cut in it.
        CorruptError: the newest cut's manifest can't be read.
    """
    folder = Path(directory).absolute()
    versions = durable_cuts(folder)
    if not versions:
        raise NotFoundError(
            f"there is no durable cut in {folder}, so there is nothing to go on from; submit the job instead"
        )
    manifest = load_manifest(folder, versions[-1])
    try:
        return JobRecord(
            job=manifest["job"],
            number=0,
            name=manifest["name"],
            state=JobState.CANCELLED,
            message=f"found in {folder}",
            spec_json=json.dumps(manifest["spec"], sort_keys=True, separators=(",", ":")),
            settings_json=json.dumps(manifest["settings"], sort_keys=True, separators=(",", ":")),
            profile_json=json.dumps(manifest["profile"], separators=(",", ":")),
            blocks=tuple((one["start"], one["stop"]) for one in manifest["blocks"]),
            directory=str(folder),
            created=manifest["created"],
            started=manifest["started"],
            next_life=max(manifest["next_life"], _newest_life(folder) + 1),
            resume_count=manifest["resume_count"],
            cuts=tuple(_cut(folder, version) for version in versions),
            evaluations=tuple(manifest["evaluations"]),
            drops=tuple(manifest["ledger"].get("dropped", ())),
            rollbacks=tuple(manifest.get("rollbacks", ())),
        )
    except (KeyError, TypeError) as error:
        raise CorruptError(
            f"the manifest of cut {versions[-1]} in {folder} lacks {error}; it can't be resumed"
        ) from error


def unused_directory(directory: str | Path) -> str:
    """``directory`` as an absolute path; ``directory-2`` and so on if an earlier job has left its work there."""
    folder = Path(directory).absolute()
    number = 1
    candidate = folder
    while (candidate / "cuts").exists() or (candidate / "events").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return str(candidate)


def _cut(folder: Path, version: int) -> CutRecord:
    manifest = load_manifest(folder, version)
    num_bytes = sum(one["bytes"] for one in manifest["files"])
    return CutRecord(version=version, time=0.0, num_bytes=num_bytes, ledger=manifest["ledger"])


def _newest_life(folder: Path) -> int:
    found = (_LIFE.fullmatch(path.name) for path in folder.glob("events/*/*"))
    return max((int(match.group(1)) for match in found if match), default=0)
