"""How the learning rate changes over a run: a factor that follows from the samples a layer has behind it."""

from __future__ import annotations

from math import cos, pi

from layerwise.sections import Cosine, ScheduleSpec, Step

WARMUP_START = 0.01
"""Factor of a warm-up's first update: not 0, which would waste it."""


def learning_rate_factor(schedule: ScheduleSpec, samples_done: int, total_samples: int) -> float:
    """The factor on the learning rate for the update that comes after ``samples_done`` of ``total_samples`` samples.

    During the warm-up it rises linearly from `WARMUP_START` to 1; a cosine's descent spans what is left after it, a
    step's milestones are parts of the whole run. Beyond ``total_samples`` it stays at its last value.
    """
    if total_samples < 1 or samples_done < 0:
        raise ValueError(f"no such point in a run: {samples_done} of {total_samples} samples")
    done = min(samples_done / total_samples, 1.0)
    if done < schedule.warmup:
        return WARMUP_START + (1 - WARMUP_START) * done / schedule.warmup
    if isinstance(schedule, Cosine):
        descent = (done - schedule.warmup) / (1 - schedule.warmup)
        return schedule.final + (1 - schedule.final) * (1 + cos(pi * descent)) / 2
    if isinstance(schedule, Step):
        return float(schedule.gamma ** sum(done >= milestone for milestone in schedule.milestones))
    return 1.0
