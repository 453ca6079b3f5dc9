"""The staleness of a run, layer by layer and in all, from the shards' totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layerwise.messages import LayerReport


def summarize(histogram: Mapping[int, int]) -> dict[str, Any]:
    """Mean, median, 99th percentile and maximum in updates; None where nothing was counted.

    ``histogram[t]`` counts gradients whose staleness was ``t``. A percentile is the smallest value that so many are at
    or below.
    """
    total = sum(histogram.values())
    if not total:
        return {"mean": None, "p50": None, "p99": None, "max": None}
    return {
        "mean": sum(staleness * count for staleness, count in histogram.items()) / total,
        "p50": _percentile(histogram, total, 0.50),
        "p99": _percentile(histogram, total, 0.99),
        "max": max(staleness for staleness, count in histogram.items() if count),
    }


def staleness_document(layers: Iterable[LayerReport], names: Sequence[str]) -> dict[str, Any]:
    """The ``staleness`` part of the job document; ``names`` are those of all layers of the model."""
    together: Counter[int] = Counter()
    parts = []
    for report in sorted(layers, key=lambda one: one.layer):
        histogram = dict(enumerate(report.staleness))
        together.update(histogram)
        name = names[report.layer] if report.layer < len(names) else f"layer {report.layer}"
        parts.append({"layer": report.layer, "name": name, **summarize(histogram), "gradients": sum(report.staleness)})
    return {**summarize(together), "layers": parts}


def _percentile(histogram: Mapping[int, int], total: int, part: float) -> int:
    seen = 0
    for staleness in sorted(histogram):
        seen += histogram[staleness]
        if seen >= part * total:
            return staleness
    return max(histogram)
