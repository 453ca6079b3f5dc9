"""Processor seconds a sample on ``examples/stdlib-lm.yaml``: how many more than the plain loop takes, and where they go.

    python -m benchmarks cpu [--repeats N]

The plain loop computes the same microbatches on one thread. The processes of layerwise keep accounts of their threads
(`benchmarks/accounted`); what is between two moments of a run counts, for as many samples as passed through the model meanwhile.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accounted.accounts import ACCOUNTS, timed
from benchmarks.accounted.process_account import Passed, ProcessAccount, Row, read_account
from benchmarks.live_job import live_job, python_path
from benchmarks.report import table, write_section
from benchmarks.runs import STDLIB_LM
from layerwise.overrides import read_job
from layerwise.reference import train_reference
from layerwise.settings import resolve

ACCOUNTED = Path(__file__).parent / "accounted"
WARMUP, UPDATES, AFTER = 2, 14, 2
"""Not measured, measured, not measured: what a run does at its end must not begin before the second moment."""
PLAIN_UPDATES = 6
REST = "rest"
ARITHMETIC = ("forward", "backward", "gradient sums", "optimizer step")
"""What the plain loop does as well."""
MERGED = {"loss": "forward", "loss backward": "backward"}
PARTS = (
    *ARITHMETIC,
    "hashes",
    "cut copies",
    "event log",
    "metrics",
    "role",
    "clients' questions",
    "links",
    "encode",
    "decode",
    "gRPC",
    "tasks",
    REST,
)
"""In the order of the table; others follow."""
SLOTS = "shard, slots"
LEAST = 5e-6
CALLS = 100_000


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks cpu")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    torch.set_num_threads(1)
    plain: list[dict[str, float]] = []
    found: list[dict[Row, float]] = []
    wrapped: list[float] = []
    for _ in range(repeats):
        plain.append(_plain())
        parts, calls = _layerwise()
        found.append(parts)
        wrapped.append(calls)
    write_section(
        "Processor time outside the arithmetic",
        f"python -m benchmarks cpu --repeats {repeats}",
        f"{_table(plain, found)}\n\n{_words(plain, found, statistics.median(wrapped) * _seconds_of_a_call())}",
    )


def _table(plain: list[dict[str, float]], found: list[dict[Row, float]]) -> str:
    whole = statistics.median(sum(one.values()) for one in plain)
    rows: list[list[str]] = []

    def add(name: str, seconds: float, loop: float | None) -> None:
        more = seconds - (loop or 0.0)
        values = ["" if loop is None else f"{1e3 * loop:.2f}", f"{1e3 * seconds:.2f}", f"{1e3 * more:+.2f}"]
        rows.append([name, *values, f"{100 * more / whole:+.1f} %"])

    for place, part in sorted({key for one in found for key in one}, key=_order):
        seconds = statistics.median(one.get((place, part), 0.0) for one in found)
        loop = [one[part] for one in plain if place == SLOTS and part in one]
        if seconds >= LEAST or loop:
            add(f"{place}: {part}", seconds, statistics.median(loop) if loop else None)
    for place in sorted({place for one in found for place, _ in one}, key=lambda one: (one != SLOTS, one)):
        sums = [sum(seconds for (where, _), seconds in one.items() if where == place) for one in found]
        add(f"**{place}, all**", statistics.median(sums), whole if place == SLOTS else None)
    add("**all processes**", statistics.median(sum(one.values()) for one in found), whole)
    return table(["CPU ms a sample", "plain loop", "layerwise", "more", "of the plain loop"], rows)


def _order(row: Row) -> tuple[bool, str, int, str]:
    place, part = row
    return place != SLOTS, place, PARTS.index(part) if part in PARTS else len(PARTS), part


def _words(plain: list[dict[str, float]], found: list[dict[Row, float]], instruments: float) -> str:
    whole = statistics.median(sum(one.values()) for one in plain)
    ratios = [sum(one.values()) / sum(loop.values()) for one, loop in zip(found, plain, strict=True)]
    return (
        f"Medians of {len(found)} rounds with {UPDATES} updates each and no cut among them; what takes less than {1e3 * LEAST:g} ms is left out. "
        f"All processes together take {statistics.median(ratios):.3f} times the plain loop's time "
        f"({min(ratios):.3f}-{max(ratios):.3f}), the instruments' own {1e3 * instruments:.2f} ms ({100 * instruments / whole:.1f} %) "
        'included. "rest" is what no named function takes: in slots the walk through the layers, ledgers, locks and freed memory, '
        'on event loops what wakes them and lets them sleep. "tasks" are the links\' loops and timers, "links" what is numbered and acknowledged. '
        "The plain loop gives freed memory back to the system, as torch does by itself; shards keep it, so that slots may take less than the loop."
    )


# --- the plain loop -------------------------------------------------------------------------------------------------------


def _plain() -> dict[str, float]:
    """Its CPU seconds a training sample, by part."""
    spec = read_job(STDLIB_LM, ["data.validation=0.0005"])
    loop: Any = train_reference(spec, resolve(spec, 10**5, spec.cluster.shards), updates=1)
    for holder, name, part in (
        (loop, "loss", "forward"),
        (loop, "_batches", "rest"),
        (loop, "_backward", "backward"),
        (loop, "_accumulate", "gradient sums"),
        (loop.optimizer, "step", "optimizer step"),
        (loop, "step", "rest"),
    ):
        setattr(holder, name, timed(part, getattr(holder, name)))
    seconds = _between(lambda: [loop.step() for _ in range(PLAIN_UPDATES)])
    return {part: seconds[part] / (PLAIN_UPDATES * spec.data.batch) for part in (*ARITHMETIC, REST)}


def _between(act: Callable[[], object]) -> dict[str, float]:
    """What this thread spends in parts meanwhile."""
    seconds = ACCOUNTS[threading.get_ident()].seconds
    before = dict(seconds)
    act()
    return {part: value - before.get(part, 0.0) for part, value in seconds.items()}


def _seconds_of_a_call() -> float:
    """What the account of one call costs."""
    empty = timed("empty", lambda: None)
    began = time.thread_time()
    for _ in range(CALLS):
        empty()
    return (time.thread_time() - began) / CALLS


# --- layerwise ------------------------------------------------------------------------------------------------------------


def _layerwise() -> tuple[dict[Row, float], float]:
    """CPU seconds a training sample by place and part; how many calls a sample were accounted for."""
    job = [
        f"train.steps={WARMUP + UPDATES + AFTER}",
        "checkpoint.every=1000",
        "data.validation=0.0005",
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": python_path(ACCOUNTED), "ACCOUNTS_FOLDER": folder}
        with live_job(STDLIB_LM, *job, environment=environment) as live:
            live.until(WARMUP)
            before = _accounts(live.cluster.pids, Path(folder))
            document = live.until(WARMUP + UPDATES)
            after = _accounts(live.cluster.pids, Path(folder))
    used = {name: after[name].since(before[name]) for name in after}
    layers = {block["shard"]: block["stop"] - block["start"] for block in document["blocks"]}
    passes = {
        name: Passed(
            forward=used[name].calls["forward"] / number * document["spec"]["data"]["batch"] / document["accumulation"],
            backward=used[name].calls["backward"]
            / number
            * document["spec"]["data"]["batch"]
            / document["accumulation"],
            updated=used[name].calls["hashes"] / number * document["spec"]["data"]["batch"],
        )
        for name, number in layers.items()
    }
    samples = statistics.mean(one.forward for one in passes.values())
    found: dict[Row, float] = defaultdict(float)
    for name, process in used.items():
        passed = passes.get(name, Passed(forward=samples, backward=samples, updated=samples))
        for (place, part), seconds in process.seconds.items():
            found[f"{name.rpartition('-')[0] or name}, {place}", MERGED.get(part, part)] += seconds / passed.through(
                part
            )
    return dict(found), sum(sum(process.calls.values()) for process in used.values()) / samples


def _accounts(pids: Mapping[str, int], folder: Path) -> dict[str, ProcessAccount]:
    """Have every process write down what it has used."""
    for path in folder.iterdir():
        path.unlink()
    for pid in pids.values():
        os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + 30.0
    while len(list(folder.glob("*.json"))) < len(pids):
        if time.monotonic() > deadline:
            raise SystemExit(
                f"of {', '.join(pids)} only {len(list(folder.glob('*.json')))} have written their accounts"
            )
        time.sleep(0.01)
    return {name: read_account(folder / f"{pid}.json") for name, pid in pids.items()}
