"""The training loss as a number to show: a running average, and a plain mean over the last stretch."""

from __future__ import annotations

import math
from collections import deque

from layerwise.plan import TrainingPlan

SPAN_UPDATES = 50
"""The averages reach back about so many updates, or one epoch where that is shorter."""


class TrainingLoss:
    """Averages the losses of closed microbatches, weighted by their samples. Not thread-safe."""

    def __init__(self, plan: TrainingPlan) -> None:
        span = min(SPAN_UPDATES * plan.accumulation, plan.microbatches_per_epoch)
        self._recent: deque[tuple[int, float]] = deque(maxlen=max(span, 1))
        self._decay = 1 - 1 / max(span / 2, 1)
        self._sum = 0.0
        self._weight = 0.0

    def add(self, loss: float, num_samples: int) -> None:
        """A microbatch of ``num_samples`` closed with this mean loss."""
        self._recent.append((num_samples, loss))
        self._sum = self._decay * self._sum + num_samples * loss
        self._weight = self._decay * self._weight + num_samples

    @property
    def running(self) -> float | None:
        """Exponential average; None before the first loss."""
        return self._sum / self._weight if self._weight else None

    @property
    def recent(self) -> float | None:
        """Mean over the last 50 updates, or the last epoch's worth of microbatches where that is less."""
        samples = sum(num for num, _ in self._recent)
        return math.fsum(num * loss for num, loss in self._recent) / samples if samples else None
