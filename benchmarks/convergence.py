"""Validation loss of ``examples/stdlib-lm.yaml``, asynchronous beside synchronous: same samples, optimizer and grid of rates.

    python -m benchmarks convergence [--rates 0.02 0.04 0.08] [--seeds 1 2 3] [--only synchronous|asynchronous]

The best rate of each side is chosen with the first seed; the other seeds run at it. Synchronous is the plain PyTorch loop,
two runs at a time with one thread each. A measurement that was interrupted goes on: finished runs are remembered in
``build/convergence-runs.json``, under the code, the job file and the machine that they were made with.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

from benchmarks.report import table, write_section
from benchmarks.run_memory import ENGINE, PLAIN_LOOP, FinishedRun, RunMemory
from benchmarks.runs import ROOT, STDLIB_LM, synchronous, train

Runs = dict[tuple[float, int], FinishedRun]
"""By learning rate and seed."""


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks convergence")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=["synchronous", "asynchronous"])
    options = parser.parse_args(arguments)
    memory = RunMemory(
        ROOT / "build" / "convergence-runs.json", STDLIB_LM, {"synchronous": PLAIN_LOOP, "asynchronous": ENGINE}
    )
    found: dict[str, Runs] = {}
    best: dict[str, float] = {}
    for side, measure in (("synchronous", _plain), ("asynchronous", _layerwise)):
        if options.only not in (None, side):
            continue
        runs = _runs(memory, side, measure, [(rate, options.seeds[0]) for rate in options.rates])
        best[side] = min(options.rates, key=lambda rate: runs[rate, options.seeds[0]].loss)
        found[side] = runs | _runs(memory, side, measure, [(best[side], seed) for seed in options.seeds[1:]])
    if options.only is None:
        rates = " ".join(f"{rate:g}" for rate in options.rates)
        seeds = " ".join(map(str, options.seeds))
        write_section(
            "Validation loss of stdlib-lm",
            f"python -m benchmarks convergence --rates {rates} --seeds {seeds}",
            report(found, best, options.rates, options.seeds),
        )


def report(found: dict[str, Runs], best: dict[str, float], rates: Sequence[float], seeds: Sequence[int]) -> str:
    """The section's text: all runs, the means at each side's ``best`` rate, and what is to be known about them."""
    rows = [
        [
            f"{rate:g}",
            str(seed),
            *(f"{runs[rate, seed].loss:.4f}" if (rate, seed) in runs else "" for runs in found.values()),
        ]
        for rate, seed in sorted({key for runs in found.values() for key in runs})
    ]
    values = {side: [runs[best[side], seed].loss for seed in seeds] for side, runs in found.items()}
    means = {side: statistics.mean(one) for side, one in values.items()}
    gap = means["asynchronous"] - means["synchronous"]
    sides = "; ".join(
        f"{side} {means[side]:.4f} at rate {best[side]:g} (seeds from {min(one):.4f} to {max(one):.4f})"
        for side, one in values.items()
    )
    words = [
        f"Mean of {len(seeds)} seeds at each side's best rate: {sides}.",
        f"The gap is {gap:+.4f} nat, {100 * gap / means['synchronous']:+.2f} %.",
        *(
            f"The best {side} rate, {rate:g}, lies at the edge of the grid: a better one may lie beyond it."
            for side, rate in best.items()
            if rate in (min(rates), max(rates))
        ),
    ]
    for side, runs in found.items():
        made: dict[str, list[str]] = {}
        for run in runs.values():
            made.setdefault(run.commit, []).append(run.date)
        when = "; ".join(f"{len(dates)} were made with commit {one} ({min(dates)})" for one, dates in made.items())
        words.append(f"Of the {side} runs {when}.")
    return f"{table(['learning rate', 'seed', *found], rows)}\n\n{' '.join(words)}"


def _runs(
    memory: RunMemory,
    side: str,
    measure: Callable[[Sequence[Sequence[str]]], list[float]],
    wanted: Sequence[tuple[float, int]],
) -> Runs:
    """The runs of ``wanted`` (rate, seed), made two at a time where they are not remembered."""
    known = {key: memory.find(side, *key) for key in wanted}
    missing = [key for key, run in known.items() if run is None]
    results: Runs = {key: run for key, run in known.items() if run is not None}
    for start in range(0, len(missing), 2):
        part = missing[start : start + 2]
        losses = measure(
            [[f"train.optimizer.lr={rate}", f"train.seed={seed}", "checkpoint.every=null"] for rate, seed in part]
        )
        for (rate, seed), loss in zip(part, losses, strict=True):
            results[rate, seed] = memory.add(side, rate, seed, loss)
    return results


def _plain(runs: Sequence[Sequence[str]]) -> list[float]:
    return [float(one["validation"]["loss"]) for one in synchronous([(STDLIB_LM, overrides) for overrides in runs])]


def _layerwise(runs: Sequence[Sequence[str]]) -> list[float]:
    return [float(train(STDLIB_LM, *overrides)["validation"]["loss"]) for overrides in runs]
