"""Rollbacks as a job's directory remembers them: one file each, there before any life that follows from it trains.

::

    cuts/rollbacks/rollback-1.json      all layers went back to a version, and how training goes on from there

The manifest of a cut knows the rollbacks before it. Until the first cut after a rollback only this file tells whoever
resumes the job from its directory that learning rates are halved, and that cuts of what diverged do not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise import disk
from layerwise.errors import CorruptError

_NAME = re.compile(r"rollback-([1-9]\d*)\.json")
_NUMBERS = ("time", "version", "reached", "rate_factor", "synchronous_until")


def write_rollbacks(directory: str | Path, rollbacks: Sequence[Mapping[str, Any]]) -> None:
    """Write down those that are not there yet, durably. All are of one job, the first one first.

    Raises:
        OSError: the disk refused.
    """
    folder = _folder(directory)
    for number, rollback in enumerate(rollbacks, 1):
        path = folder / f"rollback-{number}.json"
        if path.exists():
            disk.sync_folder(folder, "rollback")  # who wrote it may have got no further
        else:
            disk.write_durably(path, json.dumps(dict(rollback), sort_keys=True).encode(), "rollback")


def rollbacks_in(directory: str | Path) -> tuple[dict[str, Any], ...]:
    """The rollbacks of the job in ``directory``, the first one first.

    Raises:
        CorruptError: a file is none of a rollback, or one is missing.
    """
    folder = _folder(directory)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
    if numbers != list(range(1, len(numbers) + 1)):
        raise CorruptError(f"{folder} has the rollbacks {numbers}; put the missing ones back")
    return tuple(_read(folder / f"rollback-{number}.json") for number in numbers)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{path} can't be read: {error}") from error
    numbers = isinstance(found, dict) and all(isinstance(found.get(key), int | float) for key in _NUMBERS)
    if not numbers or not isinstance(found.get("why"), str):
        raise CorruptError(f"{path} describes no rollback: expected {', '.join(_NUMBERS)}, why")
    return dict(found)


def _folder(directory: str | Path) -> Path:
    return Path(directory) / "cuts" / "rollbacks"
