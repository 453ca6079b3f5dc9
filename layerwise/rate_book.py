"""The learning rates that the logs say were used, compared with what they must have been and with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isclose, isfinite
from statistics import median_low

from layerwise.audit_report import Findings
from layerwise.events import UpdateEvent

LearningRate = Callable[[int, int, int], float]
"""``learning_rate(layer, samples_before, staleness)`` is what an update must use."""

_SAME_RATIO = 1e-9


@dataclass(slots=True)
class RateBook:
    """The learning rate of each (samples before, staleness) on each layer, over all lives.

    Layers may have base rates of their own, as when an optimizer treats matrices and vectors differently; what the
    schedule and the delay policy make of them must be the same on every layer.
    """

    findings: Findings
    expected: LearningRate | None = None
    rates: dict[int, dict[tuple[int, int], float]] = field(default_factory=dict)

    def take(self, event: UpdateEvent, used: float, factor: float) -> None:
        """``event``'s step ``used`` a rate that is ``factor`` (a power of a half) times what the schedule says."""
        layer, key = event.layer, (event.samples_before, event.staleness)
        where = f"layer {layer} made version {event.version} with learning rate {used!r}"
        where += "" if factor == 1.0 else f" in a life with {factor!r} of it"
        rate = used / factor
        known = self.rates.setdefault(layer, {}).setdefault(key, rate)
        if not isfinite(rate) or rate < 0:
            self.findings.fail("learning-rates", f"{where}, which is no learning rate")
        elif event.gradients == 0:
            self.findings.fail("learning-rates", f"{where}, but there was no gradient to step with")
        elif self.expected is not None and rate != self.expected(layer, *key):
            self.findings.fail("learning-rates", f"{where}; {_after(key)} it must be {self.expected(layer, *key)!r}")
        elif rate != known:
            self.findings.fail("learning-rates", f"{where}; {_after(key)} an earlier life used {known!r}")

    def finish(self) -> None:
        """Compare the layers with each other."""
        layers = sorted(self.rates)
        for layer in layers[1:]:
            first, mine = self.rates[layers[0]], self.rates[layer]
            shared = sorted(first.keys() & mine.keys())
            ratios = [mine[key] / first[key] for key in shared if first[key] > 0]
            usual = median_low(ratios) if ratios else 1.0
            for key in shared:
                if not isclose(mine[key], usual * first[key], rel_tol=_SAME_RATIO):
                    self.findings.fail(
                        "learning-rates",
                        f"layer {layer} used learning rate {mine[key]!r} {_after(key)}; as layer {layers[0]} used "
                        f"{first[key]!r}, it must be {usual * first[key]!r}",
                    )


def _after(key: tuple[int, int]) -> str:
    return f"after {key[0]} samples at staleness {key[1]}"
