"""Validation loss of ``examples/stdlib-lm.yaml``, asynchronous beside synchronous: same samples, optimizer and grid of rates.

    python -m benchmarks convergence [--rates 0.01 0.02 0.04] [--seeds 1 2 3] [--only synchronous|asynchronous]

The best rate of each side is chosen with the first seed; the other seeds run at it. Synchronous is the plain PyTorch loop,
two runs at a time with one thread each. Finished runs are remembered in ``build/convergence.json`` (delete it to measure
anew), so a measurement that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import table, write_section
from benchmarks.runs import ROOT, STDLIB_LM, synchronous, train

MEMORY = ROOT / "build" / "convergence.json"
Runs = dict[tuple[float, int], float]


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks convergence")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.04])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=["synchronous", "asynchronous"])
    options = parser.parse_args(arguments)
    found: dict[str, Runs] = {}
    best: dict[str, float] = {}
    for side, measure in (("synchronous", _plain), ("asynchronous", _layerwise)):
        if options.only not in (None, side):
            continue
        runs = _remembered(side, measure, [(rate, options.seeds[0]) for rate in options.rates])
        best[side] = min(options.rates, key=lambda rate: runs[rate, options.seeds[0]])
        found[side] = runs | _remembered(side, measure, [(best[side], seed) for seed in options.seeds[1:]])
    if options.only is None:
        _write(found, best, options.seeds, arguments)


def _write(found: dict[str, Runs], best: dict[str, float], seeds: Sequence[int], arguments: Sequence[str]) -> None:
    wanted = sorted(found["synchronous"].keys() | found["asynchronous"].keys())
    rows = [
        [
            f"{rate:g}",
            str(seed),
            *(f"{runs[rate, seed]:.4f}" if (rate, seed) in runs else "" for runs in found.values()),
        ]
        for rate, seed in wanted
    ]
    values = {side: [runs[best[side], seed] for seed in seeds] for side, runs in found.items()}
    means = {side: statistics.mean(one) for side, one in values.items()}
    gap = means["asynchronous"] - means["synchronous"]
    sides = "; ".join(
        f"{side} {means[side]:.4f} at rate {best[side]:g} (seeds from {min(one):.4f} to {max(one):.4f})"
        for side, one in values.items()
    )
    text = table(["learning rate", "seed", *found], rows)
    text += f"\n\nMean of {len(seeds)} seeds at each side's best rate: {sides}. "
    text += f"The gap is {gap:+.4f} nat, {100 * gap / means['synchronous']:+.2f} %."
    write_section(
        "Validation loss of stdlib-lm", f"python -m benchmarks convergence {' '.join(arguments)}".strip(), text
    )


def _remembered(
    side: str, measure: Callable[[Sequence[Sequence[str]]], list[float]], wanted: Sequence[tuple[float, int]]
) -> Runs:
    """The losses of ``wanted`` (rate, seed), two runs at a time where they are not known yet."""
    results: Runs = {}
    missing = []
    known = _load(MEMORY)
    for rate, seed in wanted:
        key = f"{side} {rate:g} {seed}"
        if key in known:
            results[rate, seed] = known[key]
        else:
            missing.append((rate, seed))
    for start in range(0, len(missing), 2):
        part = missing[start : start + 2]
        losses = measure(
            [[f"train.optimizer.lr={rate}", f"train.seed={seed}", "checkpoint.every=null"] for rate, seed in part]
        )
        for (rate, seed), loss in zip(part, losses, strict=True):
            results[rate, seed] = loss
            MEMORY.parent.mkdir(exist_ok=True)
            MEMORY.write_text(json.dumps(_load(MEMORY) | {f"{side} {rate:g} {seed}": loss}, indent=2))
    return results


def _load(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _plain(runs: Sequence[Sequence[str]]) -> list[float]:
    return [float(one["validation"]["loss"]) for one in synchronous([(STDLIB_LM, overrides) for overrides in runs])]


def _layerwise(runs: Sequence[Sequence[str]]) -> list[float]:
    return [float(train(STDLIB_LM, *overrides)["validation"]["loss"]) for overrides in runs]
