"""Samples a second on ``examples/stdlib-lm.yaml``: layerwise beside the ideal and beside synchronous peers, taken in turn.

    python -m benchmarks throughput [--repeats N]

*Ideal* is twice plain PyTorch on one thread: two processors that never wait. Each round runs every peer once, in processes of
their own. Shards let the allocator keep freed memory; "memory kept" is the plain loop with that setting, and "two of them
side by side" are two such loops at the same time that have nothing to do with each other: the limit of the hardware.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.report import spread, table, write_section
from benchmarks.runs import STDLIB_LM, peer, train

UPDATES = 24
WARMUP = 1


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks throughput")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    common = ("--warmup", str(WARMUP))
    split = ("--split", "5")
    peers: dict[str, Callable[[], float]] = {
        "one process, one thread": lambda: peer("plain", STDLIB_LM, *common, "--updates", "4"),
        "one process, one thread, memory kept": lambda: peer(
            "plain", STDLIB_LM, *common, "--updates", "4", "--keep-memory"
        ),
        "layerwise, 2 shards": layerwise_speed,
        "two of them side by side": lambda: _side_by_side(*common, "--updates", "4", "--keep-memory"),
        "one process, two threads": lambda: peer("plain", STDLIB_LM, *common, "--updates", "5", "--threads", "2"),
        "DDP (gloo, 2 ranks)": lambda: peer("ddp", STDLIB_LM, *common, "--updates", "5"),
    }
    for name in ("gpipe", "1f1b", "zero-bubble"):
        for microbatches in (4, 8):
            extra = (*common, *split, "--updates", "5", "--microbatches", str(microbatches))
            peers[f"pipelining {name}, {microbatches} microbatches"] = lambda name=name, extra=extra: peer(  # type: ignore[misc]
                name, STDLIB_LM, *extra
            )
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, measure in peers.items():
            speeds[name].append(measure())
    ideals = [2 * speed for speed in speeds.pop("one process, one thread")]
    rows = [["ideal (2 x one thread)", spread(ideals), "1"]]
    for name, found in sorted(speeds.items(), key=lambda item: -statistics.median(item[1])):
        ratios = [speed / ideal for speed, ideal in zip(found, ideals, strict=True)]
        rows.append([name, spread(found), spread(ratios, 3)])
    write_section(
        "Throughput of stdlib-lm",
        f"python -m benchmarks throughput --repeats {repeats}",
        table(["", "sequences/s", "of the ideal of its round"], rows),
    )


def _side_by_side(*arguments: str) -> float:
    """Both processors with the plain loop each, nothing to do with each other: what sharing the memory's bandwidth leaves."""
    with ThreadPoolExecutor(2) as threads:
        return sum(threads.map(lambda _: peer("plain", STDLIB_LM, *arguments), range(2)))


def layerwise_speed() -> float:
    """Training samples a second of one job, from first admission to last apply."""
    document = train(STDLIB_LM, f"train.steps={UPDATES}", "checkpoint.every=1000", "data.validation=0.0005")
    return float(document["samples_per_second"])
