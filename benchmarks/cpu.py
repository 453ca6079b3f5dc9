"""Processor seconds a sample on ``examples/stdlib-lm.yaml``: what each role takes, and how much of it is not the model's arithmetic.

    python -m benchmarks cpu [--repeats N]

The arithmetic is what the plain loop takes for the same microbatches on one thread. A process's main thread is its event loop (links, roles, log).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import table, write_section
from benchmarks.runs import STDLIB_LM
from layerwise.cluster import LocalCluster
from layerwise.overrides import read_job
from layerwise.reference import train_reference
from layerwise.settings import resolve

UPDATES = 16
TICKS = os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks cpu")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    torch.set_num_threads(1)
    plain: list[float] = []
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        plain.append(_plain())
        for part, value in _layerwise().items():
            found.setdefault(part, []).append(value)
    arithmetic = statistics.median(plain)
    total = statistics.median(map(sum, zip(*found.values(), strict=True)))
    rows = [["plain loop (arithmetic)", f"{1e3 * arithmetic:.2f}", "100 %"]]
    for part, values in found.items():
        value = statistics.median(values)
        rows.append([part, f"{1e3 * value:.2f}", f"{100 * value / arithmetic:.1f} %"])
    rows.append(["layerwise, all together", f"{1e3 * total:.2f}", f"{100 * total / arithmetic:.1f} %"])
    rows.append(
        ["outside the arithmetic", f"{1e3 * (total - arithmetic):.2f}", f"{100 * (total / arithmetic - 1):.1f} %"]
    )
    write_section(
        "Processor time outside the arithmetic",
        f"python -m benchmarks cpu --repeats {repeats}",
        table(["", "CPU ms a sample", "of the arithmetic"], rows),
    )


def _job(folder: str) -> list[str]:
    return [
        f"train.steps={UPDATES}",
        "checkpoint.every=1000",
        "data.validation=0.0005",
        f"checkpoint.path={folder}/run",
    ]


def _plain() -> float:
    spec = read_job(STDLIB_LM, _job("unused"))
    settings = resolve(spec, 10**5, spec.cluster.shards)
    warm = train_reference(spec, settings, updates=1)
    began = time.process_time()
    for _ in range(6):
        warm.step()
    return (time.process_time() - began) / (6 * spec.data.batch)


def _layerwise() -> dict[str, float]:
    """CPU seconds a training sample by part, between the first third of the run and its end."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(shards=2, forward=1) as cluster,
        cluster.client() as client,
    ):
        spec = read_job(STDLIB_LM, _job(folder))
        name = str(client.submit(spec.to_json())["job"])
        document = client.get_job(name)
        while document["steps"] < UPDATES // 4:
            time.sleep(0.05)
            document = client.get_job(name)
        before, first = _parts(cluster.pids), document["samples"]
        while document["steps"] < UPDATES - 2 and document["state"] == "running":
            time.sleep(0.05)
            document = client.get_job(name)
        after, last = _parts(cluster.pids), document["samples"]
    return {part: (after[part] - before[part]) / (last - first) for part in after}


def _parts(pids: dict[str, int]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for name, pid in pids.items():
        role = name.rpartition("-")[0] or name
        loop = processor_seconds(Path(f"/proc/{pid}/task/{pid}/stat"))
        whole = sum(processor_seconds(stat) for stat in Path(f"/proc/{pid}/task").glob("*/stat"))
        parts[f"{role}: event loop"] = parts.get(f"{role}: event loop", 0.0) + loop
        parts[f"{role}: other threads"] = parts.get(f"{role}: other threads", 0.0) + whole - loop
    return parts


def processor_seconds(stat: Path) -> float:
    """What a process or a thread has used, by its file in ``/proc``."""
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
