"""Finished runs that need not be made again: kept under everything that determines how such a run ends."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.report import machine
from benchmarks.runs import ROOT

ENGINE = ("layerwise", "server", "worker", "proto")
"""All that can change what an asynchronous run comes to."""
PLAIN_LOOP = (
    "benchmarks/plain_run.py",
    "layerwise/data",
    "layerwise/models",
    *(
        f"layerwise/{name}.py"
        for name in (
            "assembly",
            "build",
            "data_info",
            "device",
            "eager",
            "head",
            "ids",
            "imports",
            "job",
            "layer_compute",
            "losses",
            "messages",
            "muon",
            "optimizers",
            "overrides",
            "plan",
            "policies",
            "randomness",
            "reference",
            "schedules",
            "section",
            "sections",
            "settings",
            "specification",
            "state_hash",
            "tensors",
        )
    ),
)
"""What a run of the plain loop calls, neither engine nor transport; a test runs one and compares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """How it ended, and when and with which commit that was measured."""

    loss: float
    commit: str
    date: str


class RunMemory:
    """Runs by side, learning rate and seed, in ``path``; those of other code, of another machine or job are not found."""

    def __init__(self, path: Path, job: Path, sources: dict[str, Iterable[str]]) -> None:
        """``sources``: for each side, the files and folders (from the repository's root) that its runs depend on."""
        self._path = path
        self._common = f"{machine()}; job {_digest([job])}"
        self._code = {side: _digest(_files(names)) for side, names in sources.items()}
        self._now = {"commit": commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}

    def find(self, side: str, rate: float, seed: int) -> FinishedRun | None:
        """The run, if it was made before."""
        found = self._load().get(self._key(side, rate, seed))
        return FinishedRun(**found) if found is not None else None

    def add(self, side: str, rate: float, seed: int, loss: float) -> FinishedRun:
        """Remember a run that has just ended."""
        run = FinishedRun(loss=loss, **self._now)
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(json.dumps(self._load() | {self._key(side, rate, seed): asdict(run)}, indent=2))
        return run

    def _key(self, side: str, rate: float, seed: int) -> str:
        return f"{side}, rate {rate:g}, seed {seed}; {self._common}; code {self._code[side]}"

    def _load(self) -> dict[str, dict[str, str | float]]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}


def commit() -> str:
    """The commit that is checked out, and whether the tree differs from it."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", *ENGINE, "benchmarks/*.py", "examples")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if changed else name


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _files(names: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for name in names:
        path = ROOT / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
