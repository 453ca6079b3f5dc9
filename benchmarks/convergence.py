"""Validation loss of ``examples/stdlib-lm.yaml``, asynchronous beside synchronous: same samples, same optimizer, one grid of learning rates.

    python -m benchmarks convergence [--rates 0.01 0.02 0.04] [--seeds 1 2 3] [--steps N]

The best rate of each side is chosen with the first seed; the other seeds run at it. Synchronous is the plain PyTorch loop.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.report import table, write_section
from benchmarks.runs import STDLIB_LM, synchronous, train


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks convergence")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.04])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=None)
    options = parser.parse_args(arguments)
    steps = [] if options.steps is None else [f"train.steps={options.steps}"]

    def overrides(rate: float, seed: int) -> list[str]:
        return [f"train.optimizer.lr={rate}", f"train.seed={seed}", "checkpoint.every=100000", *steps]

    first, *others = options.seeds
    plain = [(rate, first) for rate in options.rates]
    sync = dict(zip(plain, _plain([overrides(*one) for one in plain]), strict=True))
    asynchronous = {(rate, first): _layerwise(overrides(rate, first)) for rate in options.rates}
    best_sync = min(options.rates, key=lambda rate: sync[rate, first])
    best_async = min(options.rates, key=lambda rate: asynchronous[rate, first])
    rest = [(best_sync, seed) for seed in others]
    sync.update(zip(rest, _plain([overrides(*one) for one in rest]), strict=True))
    asynchronous.update({(best_async, seed): _layerwise(overrides(best_async, seed)) for seed in others})
    rows = [
        [
            f"{rate:g}",
            str(seed),
            *(f"{found[rate, seed]:.4f}" if (rate, seed) in found else "" for found in (sync, asynchronous)),
        ]
        for rate, seed in sorted(sync.keys() | asynchronous.keys())
    ]
    means = [
        statistics.mean(found[rate, seed] for seed in options.seeds)
        for found, rate in ((sync, best_sync), (asynchronous, best_async))
    ]
    gap = means[1] - means[0]
    text = table(["learning rate", "seed", "synchronous", "asynchronous"], rows)
    text += (
        f"\n\nMean of {len(options.seeds)} seeds at each side's best rate: synchronous {means[0]:.4f} (rate {best_sync:g}), asynchronous "
        f"{means[1]:.4f} (rate {best_async:g}); the gap is {gap:+.4f} nat, {100 * gap / means[0]:+.2f} %."
    )
    command = f"python -m benchmarks convergence {' '.join(arguments)}".strip()
    write_section("Validation loss of stdlib-lm", command, text)


def _plain(runs: Sequence[Sequence[str]]) -> list[float]:
    """Two at a time, one thread each."""
    losses: list[float] = []
    for start in range(0, len(runs), 2):
        found = synchronous([(STDLIB_LM, one) for one in runs[start : start + 2]])
        losses += [float(one["validation"]["loss"]) for one in found]
    return losses


def _layerwise(overrides: Sequence[str]) -> float:
    return float(train(STDLIB_LM, *overrides)["validation"]["loss"])
