"""What the guarantees cost while nothing fails: processor time a sample on ``examples/stdlib-lm.yaml`` with and without them.

    python -m benchmarks guarantees [--pairs N] [--updates N]

*With*: the event log, a hash of each update, and cuts as often as the example has them, one in the part that is measured.
*Without*: none of the three, which no setting of layerwise allows; `benchmarks/unguarded` takes them out of the processes.
The time is that of all processes together, between two moments of the same run, so that neither start nor end counts. The
two take turns, and so does who goes first.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.live_job import live_job, python_path
from benchmarks.report import spread, table, write_section
from benchmarks.runs import STDLIB_LM
from layerwise.cluster import LocalCluster

UNGUARDED = Path(__file__).parent / "unguarded"
WARMUP = 4
"""Updates before the measured ones."""
REST = 4
"""Updates behind them: what a run does at its end must not begin before."""
AIM = 1.02
TICKS = os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks guarantees")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--updates", type=int, default=50, help="measured in each run, and from cut to cut")
    given = parser.parse_args(arguments)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(given.pairs):
        for guarded in (True, False) if number % 2 == 0 else (False, True):
            found[guarded].append(_measure(given.updates, guarded=guarded))
    ratios = [with_them / without for with_them, without in zip(found[True], found[False], strict=True)]
    rows = [
        ["with event log, hashes and cuts", spread([1e3 * one for one in found[True]], 2)],
        ["without", spread([1e3 * one for one in found[False]], 2)],
        ["ratio of each pair", spread(ratios, 4)],
    ]
    text = table(["", "CPU ms a sample"], rows)
    reached = "reached" if statistics.median(ratios) <= AIM else "missed"
    text += f"\n\n{given.updates} updates a run, one cut among them. The aim, {AIM:g}, is {reached}."
    write_section(
        "Cost of the guarantees",
        f"python -m benchmarks guarantees --pairs {given.pairs} --updates {given.updates}",
        text,
    )


def _measure(updates: int, *, guarded: bool) -> float:
    """CPU seconds a training sample of all processes."""
    environment = {} if guarded else {"PYTHONPATH": python_path(UNGUARDED)}
    steps = WARMUP + updates + REST
    job = [
        f"train.steps={steps}",
        # The cut lies in the middle of what is measured, so that writing it does too.
        f"checkpoint.every={WARMUP + updates // 2 if guarded else 10 * steps}",
        "data.validation=0.0005",
    ]
    with live_job(STDLIB_LM, *job, environment=environment) as live:
        document = live.until(WARMUP)
        before, first = _seconds(live.cluster), int(document["samples"])
        document = live.until(WARMUP + updates)
        after, last = _seconds(live.cluster), int(document["samples"])
        _check(live.directory, guarded=guarded)
        return (after - before) / (last - first)


def _check(directory: Path, *, guarded: bool) -> None:
    """A comparison of two runs that were the same would look very good."""
    logs, cuts = list(directory.glob("events/*/*/*.log")), list(directory.glob("cuts/*/manifest*"))
    if bool(logs) != guarded or bool(cuts) != guarded:
        raise SystemExit(f"with guarantees {guarded}: there are {len(logs)} event logs and {len(cuts)} cuts")


def _seconds(cluster: LocalCluster) -> float:
    return sum(_processor_seconds(Path(f"/proc/{pid}/stat")) for pid in cluster.pids.values())


def _processor_seconds(stat: Path) -> float:
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
