"""Samples a second on ``examples/stdlib-lm.yaml``: layerwise beside the ideal and beside synchronous peers, taken in turn.

    python -m benchmarks throughput [--repeats N]

*Ideal* is twice plain PyTorch on one thread: two processors that never wait. Each round runs every peer once, in processes of
their own. All are measured alike, after a warm-up: layerwise between two moments of one run, by the first shard's clock. Shards
let the allocator keep freed memory; "memory kept" is the plain loop with that setting, and "two of them side by side" are
two such loops at the same time that have nothing to do with each other: the limit of the hardware.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.live_job import live_job
from benchmarks.report import spread, table, write_section
from benchmarks.runs import STDLIB_LM, peer

WARMUP, UPDATES, AFTER = 2, 24, 2
"""Of layerwise: not measured, measured, not measured, so that the end of the run is not looked at by mistake."""
PLAIN_UPDATES = 8
"""More than the peers', since every ratio depends on it."""
LAYERWISE = "layerwise, 2 shards"
WHOLE_RUN = "layerwise, the whole run with its start"
LIMIT = "two of them side by side"
AIM = 0.95


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks throughput")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    common = ("--warmup", "1")
    split = ("--split", "5")
    measures: dict[str, Callable[[], float]] = {
        "one process, one thread, memory kept": lambda: peer(
            "plain", STDLIB_LM, *common, "--updates", "4", "--keep-memory"
        ),
        LIMIT: lambda: _side_by_side(*common, "--updates", "4", "--keep-memory"),
        "one process, two threads": lambda: peer("plain", STDLIB_LM, *common, "--updates", "5", "--threads", "2"),
        "DDP (gloo, 2 ranks)": lambda: peer("ddp", STDLIB_LM, *common, "--updates", "5"),
    }
    for name in ("gpipe", "1f1b", "zero-bubble"):
        for microbatches in (4, 8):
            extra = (*common, *split, "--updates", "5", "--microbatches", str(microbatches))
            measures[f"pipelining {name}, {microbatches} microbatches"] = lambda name=name, extra=extra: peer(  # type: ignore[misc]
                name, STDLIB_LM, *extra
            )
    ideals: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in (LAYERWISE, WHOLE_RUN, *measures)}
    for _ in range(repeats):
        ideals.append(2 * peer("plain", STDLIB_LM, *common, "--updates", str(PLAIN_UPDATES)))
        steady, whole = layerwise_speeds()
        speeds[LAYERWISE].append(steady)
        speeds[WHOLE_RUN].append(whole)
        for name, measure in measures.items():
            speeds[name].append(measure())
    ratios = {name: [one / ideal for one, ideal in zip(found, ideals, strict=True)] for name, found in speeds.items()}
    rows = [["ideal (2 x one thread)", spread(ideals), "1"]]
    for name in sorted(speeds, key=lambda name: -statistics.median(ratios[name])):
        rows.append([name, spread(speeds[name]), spread(ratios[name], 3)])
    text = table(["", "sequences/s", "of the ideal of its round"], rows)
    write_section(
        "Throughput of stdlib-lm",
        f"python -m benchmarks throughput --repeats {repeats}",
        f"{text}\n\n{standing({name: statistics.median(found) for name, found in ratios.items()})}",
    )


def standing(ratios: dict[str, float]) -> str:
    """Whether layerwise has reached its aim, and every peer that is ahead of it."""
    own = ratios[LAYERWISE]
    reached = "reached" if own >= AIM else f"missed by {100 * (AIM - own):.1f} points"
    peers = {name: ratio for name, ratio in ratios.items() if name not in (LAYERWISE, WHOLE_RUN, LIMIT)}
    ahead = [f"{name} ({peers[name]:.3f})" for name in sorted(peers, key=lambda one: -peers[one]) if peers[name] > own]
    who = (
        f"Ahead of it are {len(ahead)} of {len(peers)} peers: {'; '.join(ahead)}."
        if ahead
        else "No peer is ahead of it."
    )
    return f"Layerwise has {own:.3f} of the ideal over {UPDATES} updates after {WARMUP}; the aim of {AIM:g} is {reached}. {who}"


def _side_by_side(*arguments: str) -> float:
    """Both processors with the plain loop each, nothing to do with each other: what sharing the memory's bandwidth leaves."""
    with ThreadPoolExecutor(2) as threads:
        return sum(threads.map(lambda _: peer("plain", STDLIB_LM, *arguments), range(2)))


def layerwise_speeds() -> tuple[float, float]:
    """Training samples a second of one job: between two moments, and from first admission to last apply."""
    job = [f"train.steps={WARMUP + UPDATES + AFTER}", "checkpoint.every=1000", "data.validation=0.0005"]
    with live_job(STDLIB_LM, *job) as live:
        first = live.until(WARMUP)
        last = live.until(WARMUP + UPDATES)
        whole = live.end()
    # Samples and seconds come together from the first shard, so that it does not matter when they are asked for.
    steady = (last["samples"] - first["samples"]) / (last["seconds"] - first["seconds"])
    return steady, float(whole["samples_per_second"])
