"""``examples/digits.yaml``: test accuracy of five seeds, asynchronous beside synchronous, and the time of one run.

python -m benchmarks digits [--seeds 1 2 3 4 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from benchmarks.report import spread, table, write_section
from benchmarks.runs import DIGITS, synchronous, train


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    seeds = parser.parse_args(arguments).seeds
    ours, theirs, seconds = [], [], []
    for seed in seeds:
        began = time.perf_counter()
        ours.append(float(train(DIGITS, f"train.seed={seed}")["validation"]["accuracy"]))
        seconds.append(time.perf_counter() - began)
    for start in range(0, len(seeds), 2):
        found = synchronous([(DIGITS, [f"train.seed={seed}"]) for seed in seeds[start : start + 2]])
        theirs += [float(one["validation"]["accuracy"]) for one in found]
    rows = [
        [str(seed), f"{100 * plain:.2f} %", f"{100 * mine:.2f} %"]
        for seed, plain, mine in zip(seeds, theirs, ours, strict=True)
    ]
    rows.append(["mean", f"{100 * statistics.mean(theirs):.2f} %", f"{100 * statistics.mean(ours):.2f} %"])
    text = table(["seed", "synchronous", "asynchronous"], rows)
    text += f"\n\nOne run with start-up and evaluation: {spread(seconds)} s."
    write_section("Accuracy of digits", f"python -m benchmarks digits {' '.join(arguments)}".strip(), text)
