"""The arithmetic of a training run: which microbatches exist, and which update each gradient belongs to.

Everything here follows from five numbers, so every process computes the same answers without asking anybody.
Microbatches are numbered by their *index* in position order over all epochs; updates are numbered from 0, and update
``u`` turns version ``u`` into version ``u + 1``. An update never spans two epochs: the last one of an epoch may be
short.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from layerwise.ids import Microbatch


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """``num_samples`` of training data; ``batch`` samples an update in ``accumulation`` microbatches; ``num_updates``.

    ``batch`` is a multiple of ``accumulation``. The run ends after ``num_updates`` updates, in mid-epoch if need be.
    """

    num_samples: int
    batch: int
    accumulation: int
    num_updates: int

    def __post_init__(self) -> None:
        if min(self.num_samples, self.batch, self.accumulation) < 1 or self.num_updates < 0:
            raise ValueError(f"plan needs positive numbers, got {self}")
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch {self.batch}")

    @property
    def microbatch_samples(self) -> int:
        """Samples in a full microbatch."""
        return self.batch // self.accumulation

    @cached_property
    def updates_per_epoch(self) -> int:
        """Updates in one epoch, a short last one included."""
        return -(-self.num_samples // self.batch)

    @cached_property
    def microbatches_per_epoch(self) -> int:
        """Microbatches in one epoch, a short last one included."""
        return -(-self.num_samples // self.microbatch_samples)

    @cached_property
    def num_microbatches(self) -> int:
        """Microbatches of the whole run."""
        return self.gradients_before(self.num_updates)

    @cached_property
    def num_epochs(self) -> int:
        """Epochs begun, the last one perhaps cut short."""
        return -(-self.num_updates // self.updates_per_epoch)

    def gradients_before(self, update: int) -> int:
        """How many gradients close all updates before ``update``."""
        epoch, inside = divmod(update, self.updates_per_epoch)
        return epoch * self.microbatches_per_epoch + min(inside * self.accumulation, self.microbatches_per_epoch)

    def count(self, update: int) -> int:
        """How many gradients close ``update``."""
        return self.gradients_before(update + 1) - self.gradients_before(update)

    def update_of(self, gradient: int) -> int:
        """The update that the ``gradient``-th gradient taken in (from 0) belongs to."""
        epoch, inside = divmod(gradient, self.microbatches_per_epoch)
        return epoch * self.updates_per_epoch + inside // self.accumulation

    def microbatch(self, index: int) -> Microbatch:
        """The microbatch at ``index`` in position order."""
        epoch, inside = divmod(index, self.microbatches_per_epoch)
        start = inside * self.microbatch_samples
        return Microbatch(epoch, start, min(start + self.microbatch_samples, self.num_samples))

    def index(self, microbatch: Microbatch) -> int:
        """The inverse of `microbatch`; ``ValueError`` when the range is not one that this plan cuts."""
        inside, rest = divmod(microbatch.start, self.microbatch_samples)
        index = microbatch.epoch * self.microbatches_per_epoch + inside
        if rest or not 0 <= index < self.num_microbatches or self.microbatch(index) != microbatch:
            raise ValueError(f"{microbatch} is not a microbatch of this plan")
        return index

    def samples_before(self, update: int) -> int:
        """Samples in all updates before ``update`` when every gradient comes in position order."""
        epoch, inside = divmod(update, self.updates_per_epoch)
        return epoch * self.num_samples + min(inside * self.batch, self.num_samples)

    def samples_in(self, stop: int) -> int:
        """Samples of the microbatches at indices below ``stop``."""
        epoch, inside = divmod(stop, self.microbatches_per_epoch)
        return epoch * self.num_samples + min(inside * self.microbatch_samples, self.num_samples)

    @cached_property
    def total_samples(self) -> int:
        """Samples of the whole run, each epoch's counted anew."""
        return self.samples_before(self.num_updates)

    def max_staleness(self, window: int) -> int:
        """The promise for ``window``: the most updates that ``2 (window - 1)`` consecutive gradients can close."""
        span = 2 * (window - 1)
        if span == 0:
            return 0
        # Whole epochs close the same number wherever the span begins; what is left is shorter than an epoch. It closes
        # most when it begins just before an update closes; the epoch's last full one, when a short one follows.
        epochs, rest = divmod(span, self.microbatches_per_epoch)
        short = self.microbatches_per_epoch % self.accumulation
        most = -(-rest // self.accumulation)
        if 0 < short < rest and self.updates_per_epoch > 1:
            most = max(most, 2 + (rest - 1 - short) // self.accumulation)
        return epochs * self.updates_per_epoch + most

    def expected_staleness(self, window: int) -> int:
        """The largest staleness with in-order arrival."""
        return -(-(window - 1) // self.accumulation)

    def largest_window(self, max_staleness: int) -> int:
        """The largest window whose promise is at most ``max_staleness`` updates (at least 1)."""
        low, high = 1, self.accumulation * (max_staleness + 1) + 2
        return low - 1 + bisect_right(range(low, high), max_staleness, key=self.max_staleness)
