"""Where a replay is to stop: behind an update, or behind a sample."""

from __future__ import annotations

import re
from dataclasses import dataclass

from layerwise.errors import ConfigError
from layerwise.plan import TrainingPlan

_SAMPLE = re.compile(r"(\d+):(\d+)(?:-\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Until:
    """``update``: when every layer has been at that version. Else: when every layer has taken the sample in.

    The sample stands at ``position`` in the order of ``epoch``.
    """

    update: int | None = None
    epoch: int = 0
    position: int = 0

    def index(self, plan: TrainingPlan) -> int:
        """The index of the sample's microbatch; ``ConfigError`` when the run has no such sample."""
        index = self.epoch * plan.microbatches_per_epoch + self.position // plan.microbatch_samples
        if self.position >= plan.num_samples or index >= plan.num_microbatches:
            raise ConfigError(
                f"--until {self.epoch}:{self.position}: the run has {plan.num_samples} samples an epoch and ends after "
                f"{plan.num_updates} updates"
            )
        return index

    def __str__(self) -> str:
        return f"update {self.update}" if self.update is not None else f"sample {self.epoch}:{self.position}"


def parse_until(text: str) -> Until:
    """``120`` is an update; ``2:64`` the sample at position 64 of epoch 2, ``2:64-72`` (as in logs) the same.

    Raises:
        ConfigError: it is neither.
    """
    if text.isdecimal():
        return Until(update=int(text))
    match = _SAMPLE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--until {text}: expected an update such as 120, or EPOCH:POSITION of a sample such as 2:64")
    return Until(epoch=int(match[1]), position=int(match[2]))
