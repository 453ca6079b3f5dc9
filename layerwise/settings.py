"""What the ``auto`` values of a job come to, once the number of shards and of training samples is known."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

from layerwise.errors import ConfigError, MalformedMessageError
from layerwise.plan import TrainingPlan
from layerwise.policies import automatic_policy
from layerwise.sections import Muon, Sgd

if TYPE_CHECKING:
    from layerwise.job import JobSpec

AUTO_CUTS = 10
"""Cuts in a run, where the job does not say."""
LARGEST_AUTO_INTERVAL = 1000
"""Updates between cuts at most, where the job does not say."""
CHEAP_HOP = 0.05
"""A hop below this part of a block's forward time does not need a longer window."""
LARGEST_NU_BELOW_WINDOW = 0.4
STANDBY_FRACTION = 10
"""Standby copies between two cuts, where the job does not say."""
LEAST_STANDBY_INTERVAL = 10
"""Updates between standby copies at least, where the job does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSettings:
    """A job's settings without any ``auto`` left. Fixed before the first lease, and used again when the job is resumed.

    ``cut_intervals`` and ``standby_every`` (0: there are no standby copies) are in updates.

    ``max_staleness`` is the promise that the audit checks; ``expected_staleness`` is the largest value with in-order
    arrival. Both are in updates, and 0 in synchronous mode.
    """

    mode: Literal["asynchronous", "synchronous"]
    window: int
    accumulation: int
    backward_weights: Literal["latest", "stashed", "recompute"]
    delay_policy: Literal["constant", "inverse"]
    max_staleness: int
    expected_staleness: int
    steps: int
    epochs: int
    plan: TrainingPlan
    cut_intervals: tuple[int, ...] = ()
    standby_every: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Microbatches go in position order, one update after the other, so that training equals a plain loop."""
        return self.mode == "synchronous" or self.window == 1

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives back equal settings."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ResolvedSettings:
        """The inverse of `to_json`; ``MalformedMessageError`` for anything else."""
        try:
            values = json.loads(text)
            values["plan"] = TrainingPlan(**values["plan"])
            values["cut_intervals"] = tuple(values["cut_intervals"])
            values["warnings"] = tuple(values["warnings"])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise MalformedMessageError(f"not the settings of a job ({error}): {text[:200]!r}") from error


def resolve(
    spec: JobSpec, num_train_samples: int, num_blocks: int, hop_fraction: float | None = None
) -> ResolvedSettings:
    """Decide every ``auto`` of ``spec``. Pure: the same arguments give the same answer everywhere.

    Args:
        spec: The job.
        num_train_samples: Samples in one epoch.
        num_blocks: Shards on a microbatch's route.
        hop_fraction: A hop's latency in forward times of one block, where it was measured.

    Raises:
        ConfigError: the settings contradict each other or the data.
    """
    batch = spec.data.batch
    if num_train_samples < 1:
        raise ConfigError("data: no training samples are left, expected at least 1; lower data.validation")
    if batch > num_train_samples:
        raise ConfigError(
            f"data.batch: got {batch}, expected at most the number of training samples, {num_train_samples}"
        )
    synchronous = spec.mode == "synchronous"
    wanted = _window(spec, num_blocks, hop_fraction)
    accumulation = _accumulation(spec, wanted)
    updates_per_epoch = ceil(num_train_samples / batch)
    steps = spec.train.steps or (spec.train.epochs or 1) * updates_per_epoch
    plan = TrainingPlan(num_samples=num_train_samples, batch=batch, accumulation=accumulation, num_updates=steps)
    if synchronous:
        window = wanted if spec.asynchrony.window != "auto" else 2 * num_blocks
        window = min(window, accumulation)
    else:
        window = _bounded(spec, wanted, plan)
    expected = 0 if synchronous else plan.expected_staleness(window)
    promised = 0 if synchronous else plan.max_staleness(window)
    cuts = _cut_intervals(spec, steps)
    standby, standby_warnings = _standby(spec, steps, cuts, plain=synchronous or window == 1)
    weights = spec.asynchrony.backward_weights
    policy = spec.asynchrony.delay_policy
    return ResolvedSettings(
        mode=spec.mode,
        window=window,
        accumulation=accumulation,
        backward_weights=weights if weights != "auto" else ("recompute" if spec.cluster.num_detached else "latest"),
        delay_policy=policy if policy != "auto" else automatic_policy(expected),
        max_staleness=promised,
        expected_staleness=expected,
        steps=steps,
        epochs=plan.num_epochs,
        plan=plan,
        cut_intervals=cuts,
        standby_every=standby,
        warnings=(
            *(() if synchronous else _warnings(spec, window, accumulation, expected, num_blocks)),
            *standby_warnings,
        ),
    )


def _window(spec: JobSpec, num_blocks: int, hop_fraction: float | None) -> int:
    """Microbatches in flight that keep every block busy: one each, and more where hops take their time."""
    if spec.asynchrony.window != "auto":
        return spec.asynchrony.window
    if hop_fraction is None or hop_fraction < CHEAP_HOP:
        return num_blocks
    filled = ceil(1.3 * (3 * num_blocks + 2 * (num_blocks - 1) * hop_fraction) / 3)
    return min(max(filled, num_blocks), 2 * num_blocks)


def _accumulation(spec: JobSpec, window: int) -> int:
    """Microbatches in an update: two windows where the batch can be cut so, else one, else single samples."""
    if spec.asynchrony.accumulation != "auto":
        return spec.asynchrony.accumulation
    divisors = [number for number in range(1, spec.data.batch + 1) if spec.data.batch % number == 0]
    for least in (2 * window, window):
        enough = [number for number in divisors if number >= least]
        if enough:
            return enough[0]
    return spec.data.batch


def _cut_intervals(spec: JobSpec, steps: int) -> tuple[int, ...]:
    """Cuts are at the multiples of each, and at the end: those that are kept, and those that are evaluated."""
    every = spec.checkpoint.every
    if every == "auto":
        every = min(max(steps // AUTO_CUTS, 1), LARGEST_AUTO_INTERVAL)
    return tuple(sorted({one for one in (every, spec.train.evaluate_every) if one is not None}))


def _standby(spec: JobSpec, steps: int, cuts: tuple[int, ...], *, plain: bool) -> tuple[int, tuple[str, ...]]:
    """Updates between standby copies (0: there are none), and what is to be said about them."""
    if not spec.checkpoint.standby:
        return 0, ()
    if plain:
        # A layer that is ahead of another would not be plain training: all blocks go back together, to a cut.
        return 0, (
            "checkpoint.standby: without effect in synchronous mode and with a window of 1, where all blocks go back to "
            "the newest cut together; lower checkpoint.every instead",
        )
    between = min(cuts, default=steps)
    every = spec.checkpoint.standby_every
    if every == "auto":
        return max(between // STANDBY_FRACTION, LEAST_STANDBY_INTERVAL), ()
    if every >= between:
        return every, (
            f"checkpoint.standby_every: {every} is no less than the {between} updates between cuts, so that standby copies "
            f"are of little use; lower it",
        )
    return every, ()


def _bounded(spec: JobSpec, window: int, plan: TrainingPlan) -> int:
    """``window``, held to what ``max_staleness`` allows."""
    limit = spec.asynchrony.max_staleness
    if limit == "auto" or plan.max_staleness(window) <= limit:
        return window
    largest = plan.largest_window(limit)
    if spec.asynchrony.window != "auto":
        raise ConfigError(
            f"async.window: got {window}, expected at most {largest}: with accumulation {plan.accumulation} a larger "
            f"one can lead to a staleness of {plan.max_staleness(window)} updates, and async.max_staleness is {limit}"
        )
    return largest


def _warnings(spec: JobSpec, window: int, accumulation: int, expected: int, num_blocks: int) -> list[str]:
    """Settings that train well synchronously and badly here."""
    found = []
    optimizer = spec.train.optimizer
    if isinstance(optimizer, Sgd) and expected > 1:
        found.append(
            f"train.optimizer: sgd with a staleness of {expected} updates often diverges or learns nothing; raise "
            f"async.accumulation (now {accumulation}) to at least {max(window - 1, 1)}, or use muon"
        )
    if isinstance(optimizer, Muon) and accumulation < window and optimizer.nu > LARGEST_NU_BELOW_WINDOW:
        found.append(
            f"train.optimizer.nu: {optimizer.nu:g} with async.accumulation {accumulation} below the window of {window} "
            f"costs accuracy; use {LARGEST_NU_BELOW_WINDOW:g}, or a larger accumulation"
        )
    if window > 2 * num_blocks:
        found.append(
            f"async.window: {window} is more than twice the {num_blocks} shards: it adds staleness, not speed; use at "
            f"most {2 * num_blocks}"
        )
    return found
