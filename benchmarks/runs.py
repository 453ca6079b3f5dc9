"""Jobs and peers run as processes of their own, and what they say at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits.yaml"
STDLIB_LM = ROOT / "examples" / "stdlib-lm.yaml"


def train(spec: Path, *overrides: str) -> dict[str, Any]:
    """``layerwise train`` in a folder that is gone afterwards; the job's document."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "layerwise", "train", str(spec), "--output", "json"]
        for override in (f"checkpoint.path={folder}/run", *overrides):
            command += ["--set", override]
        return _last_line(command)


def peer(name: str, spec: Path, *arguments: str) -> float:
    """Samples a second of one of ``benchmarks.baselines``."""
    command = [sys.executable, "-m", "benchmarks.baselines", name, "--spec", str(spec), *arguments]
    return float(_last_line(command)["samples_per_second"])


def synchronous(specs: Sequence[tuple[Path, Sequence[str]]]) -> list[dict[str, Any]]:
    """The plain loop of each (job file, overrides), all at the same time with one thread each."""
    commands = []
    for spec, overrides in specs:
        command = [sys.executable, "-m", "benchmarks.plain_run", str(spec)]
        for override in overrides:
            command += ["--set", override]
        commands.append(command)
    running = [_start(command) for command in commands]
    return [_finish(process, command) for process, command in zip(running, commands, strict=True)]


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "benchmarks.plain_run" in command else None
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str], command: Sequence[str]) -> dict[str, Any]:
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-4000:]}")
    document: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return document


def _last_line(command: Sequence[str]) -> dict[str, Any]:
    return _finish(_start(command), command)
