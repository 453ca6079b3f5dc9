"""Whether runs under faults have learned what runs without them learn. Pure: the figures are arguments.

No two asynchronous runs on real clocks end alike, so equal figures can't be asked for. What is asked for:

    one run beside one without      accuracy at most 5 percentage points lower; where none is measured, the loss at most
                                    a quarter higher
    many runs beside many without   their mean no worse than the worst run without, and no single one more than 5
                                    standard deviations (of the runs without) below the mean of those
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACCURACY = "accuracy"
ACCURACY_MARGIN = 0.05
LOSS_MARGIN = 0.25
MOST_DEVIATIONS = 5.0
SMALLEST_DEVIATION = 0.002
"""A few runs may by chance end alike, to less than one sample in a validation set of some hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run under faults beside one without. ``limit``: the worst ``metric`` that will do."""

    metric: str
    with_faults: float
    without: float
    limit: float

    @classmethod
    def of(cls, document: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Comparison | None:
        """Of two jobs' documents; ``None``: nothing was measured in both."""
        found, calm = _measured(document), _measured(baseline or {})
        known = [
            name
            for name in (ACCURACY, "loss", "train_loss")
            if name in found and math.isfinite(calm.get(name, math.nan))
        ]
        metric = next(iter(known), None)
        if metric is None:
            return None
        without = calm[metric]
        limit = without - ACCURACY_MARGIN if metric == ACCURACY else without + LOSS_MARGIN * abs(without)
        return cls(metric=metric, with_faults=found[metric], without=without, limit=limit)

    @property
    def passed(self) -> bool:
        """The run under faults is good enough; one whose loss is no number is not."""
        return self.with_faults >= self.limit if self.metric == ACCURACY else self.with_faults <= self.limit

    def __str__(self) -> str:
        allowed = f"at {'least' if self.metric == ACCURACY else 'most'} {self.limit:.4g}"
        return f"{self.metric} {self.with_faults:.4g} with faults, {self.without:.4g} without ({allowed} will do)"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("metric", "with_faults", "without", "limit", "passed")
        return {name: getattr(self, name) for name in names}


def worse_than_calm(with_faults: Sequence[float], without: Sequence[float]) -> tuple[str, ...]:
    """Why these accuracies under faults are worse than those without, one sentence each; empty: they are not.

    At least two of each are needed.
    """
    mean, calm = statistics.mean(with_faults), statistics.mean(without)
    deviation = max(statistics.stdev(without), SMALLEST_DEVIATION)
    limit = calm - MOST_DEVIATIONS * deviation
    found = []
    if mean < min(without):
        found.append(f"the mean accuracy {mean:.4f} is below the worst of the runs without faults, {min(without):.4f}")
    if min(with_faults) < limit:
        found.append(
            f"an accuracy of {min(with_faults):.4f} is more than {MOST_DEVIATIONS:.0f} standard deviations below "
            f"{calm:.4f}, the mean without faults; expected at least {limit:.4f}"
        )
    return tuple(found)


def _measured(document: Mapping[str, Any]) -> dict[str, float]:
    # Documents have null where a figure was not finite.
    validation = {
        name: math.nan if value is None else value for name, value in (document.get("validation") or {}).items()
    }
    values = {**validation, "train_loss": document.get("train_loss")}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
