"""The guard trips on every collapse and on no healthy run, however noisy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from layerwise.server.divergence_guard import FIRST_UPDATES, Divergence, DivergenceGuard

Curve = Callable[[float], float]
Noise = Callable[[random.Random], float]

HEALTHY: dict[str, Curve] = {
    "decay": lambda part: 2.3 * math.exp(-8 * part) + 0.01,
    "slow": lambda part: 5.5 * (1 + 100 * part) ** -0.3,
    "plateau": lambda part: 1.0,
    "late": lambda part: 2.3 if part < 0.2 else 2.3 * math.exp(-6 * (part - 0.2)) + 0.05,
    "fine-tuning": lambda part: 0.3 + 0.05 * math.exp(-20 * part),
    "in steps": lambda part: (0.5 if part < 0.5 else 0.2) + 2 * math.exp(-30 * part),
}

NOISE: dict[str, Noise] = {
    "none": lambda rng: 1.0,
    "a little": lambda rng: max(1 + 0.1 * rng.gauss(0, 1), 0.0),
    "much": lambda rng: math.exp(0.6 * rng.gauss(0, 1) - 0.18),
    "very much": lambda rng: math.exp(rng.gauss(0, 1) - 0.5),
    "hard batches": lambda rng: math.exp(0.2 * rng.gauss(0, 1)) * (20 if rng.random() < 0.02 else 1),
    "heavy tails": lambda rng: abs(rng.gauss(0, 1)) / math.sqrt(rng.gammavariate(1.25, 0.8) + 1e-6),
}

COLLAPSE = 0.4
"""The part of the run after which it collapses."""


def collapsed(part: float, *, best: float, level: float, seconds: float = 0.05) -> float:
    """Learning towards ``best``; from `COLLAPSE` on up to ``level`` within that part of the run."""
    before = best + (2.3 - best) * math.exp(-10 * min(part, COLLAPSE))
    return before if part < COLLAPSE else min(level, before + (level - before) * (part - COLLAPSE) / seconds)


COLLAPSES: dict[str, Curve] = {
    "to chance": lambda part: collapsed(part, best=0.05, level=2.3),
    "half-way": lambda part: collapsed(part, best=0.05, level=1.2),
    "slowly": lambda part: collapsed(part, best=0.1, level=2.3, seconds=0.3),
    "out of bounds": lambda part: collapsed(part, best=0.1, level=1e6),
    "from little learned": lambda part: collapsed(part, best=1.6, level=2.35),
}


def watch(losses: Sequence[float], *, can_stall: bool = True, samples: int = 8) -> Divergence | None:
    guard = DivergenceGuard(len(losses), can_stall=can_stall)
    found = (guard.add(update, loss, samples) for update, loss in enumerate(losses))
    return next((one for one in found if one is not None), None)


def drawn(curve: Curve, noise: Noise, updates: int, seed: int) -> list[float]:
    rng = random.Random(f"{updates} {seed}")
    return [curve(update / updates) * noise(rng) for update in range(updates)]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("curve", HEALTHY)
def test_a_healthy_run_never_trips(curve: str, noise: str) -> None:
    for seed in range(12):
        for updates in (60, 300, 900):
            found = watch(drawn(HEALTHY[curve], NOISE[noise], updates, seed))
            assert found is None, f"seed {seed}, {updates} updates: {found}"


@pytest.mark.parametrize("updates", [150, 300, 1500])
@pytest.mark.parametrize("collapse", ["to chance", "half-way", "slowly", "out of bounds"])
def test_a_collapse_without_a_number_that_is_not_finite_trips_soon(collapse: str, updates: int) -> None:
    for seed in range(10):
        found = watch(drawn(COLLAPSES[collapse], NOISE["a little"], updates, seed))
        assert found is not None, f"seed {seed}"
        assert COLLAPSE * updates < found.version <= (COLLAPSE + 0.4) * updates
        assert 0 <= found.good_version <= COLLAPSE * updates, f"seed {seed}: {found}"
        assert "rose above 1.5 times its best" in found.why


def test_back_near_chance_after_little_was_learned_is_a_stall() -> None:
    losses = drawn(COLLAPSES["from little learned"], NOISE["none"], 600, 0)
    found = watch(losses)
    assert found is not None
    assert "is back where it started" in found.why
    assert found.good_version <= COLLAPSE * 600
    assert watch(losses, can_stall=False) is None


def test_a_run_that_is_worse_than_at_its_start_and_stays_there_is_a_stall() -> None:
    rng = random.Random(1)
    losses = [2.33 if update < 8 else 2.6 + 0.01 * rng.gauss(0, 1) for update in range(1000)]
    found = watch(losses)
    assert found is not None
    assert (found.version, found.good_version) == (250, 0)
    assert "never came below" in found.why


@pytest.mark.parametrize("calm", [3, FIRST_UPDATES])
@pytest.mark.parametrize("peak", [30.0, 1e8, 1e30])
@pytest.mark.parametrize("can_stall", [True, False])
def test_a_collapse_into_losses_that_are_thrown_about_trips_though_they_are_all_noise(
    *, can_stall: bool, peak: float, calm: int
) -> None:
    """They were their own excuse: no rise was beyond ten standard errors of losses like these, and no stall above five."""
    for seed in range(20):
        rng = random.Random(seed)
        losses = [2.3 + 0.1 * rng.gauss(0, 1) for _ in range(calm)]
        losses += [peak * rng.random() for _ in range(3)]
        losses += [30 * abs(1 + 0.6 * rng.gauss(0, 1)) for _ in range(300 - len(losses))]
        found = watch(losses, can_stall=can_stall)
        assert found is not None, f"seed {seed}"
        assert found.version < 100
        assert found.good_version == 0


def test_a_collapse_with_the_very_first_updates_is_not_taken_for_the_start() -> None:
    """Losses of a real run at a hopeless rate. It was thought to have learned a lot, coming from 3e13."""
    losses = [2.285, 7.16, 4153.0, 1.934e7, 1.501e14, 2.098e22, 2.552e17, 6.093e17, 2.771e8, 47.97, 71.28, 83.78, 77.22]
    rng = random.Random(1)
    losses += [28 + 7 * rng.gauss(0, 1) for _ in range(300 - len(losses))]
    found = watch(losses)
    assert found is not None
    assert found.version < 60


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_blew_up_before_there_was_a_start_trips_once_something_must_have_been_learned(seed: int) -> None:
    """Four of the first five losses were no better than what came after, and a job ended well with a loss of 27."""
    rng = random.Random(seed)
    losses = [2.31, *(rng.uniform(20, 60) for _ in range(8))]
    losses[1] = rng.choice([2.29, 7.16])
    losses += [28 + 7 * rng.gauss(0, 1) for _ in range(300 - len(losses))]
    found = watch(losses)
    assert found is not None
    assert (found.version <= 210, found.good_version) == (True, 0)
    assert "the loss, on average" in found.why


def test_where_it_costs_little_a_loss_that_does_not_fall_is_enough() -> None:
    for eager in (False, True):
        guard = DivergenceGuard(1000, eager=eager)
        found = [guard.add(update, 2.31 + 0.01 * (update % 2), 8) for update in range(1000)]
        assert [one.version for one in found if one is not None][:1] == ([250 + 3 * guard.span] if eager else [])


def test_learning_rate_warm_up_delays_that_verdict() -> None:
    losses = [2.33 if update < 8 else 2.6 for update in range(400)]
    guard = DivergenceGuard(400, warmup=150)
    found = [guard.add(update, loss, 8) for update, loss in enumerate(losses)]
    assert next(one.version for one in found if one is not None) == 350


def test_one_hard_batch_after_another_does_not_trip_it() -> None:
    losses = [0.01 if update % 25 else 30.0 for update in range(500)]
    assert watch([2.3] * 10 + losses) is None


def test_microbatches_of_one_update_count_once_by_their_samples() -> None:
    guard = DivergenceGuard(100)
    for update in range(3):
        for loss, samples in ((1.0, 3), (5.0, 1)):
            guard.add(update, loss, samples)
    assert guard.average == pytest.approx(2.0)


def test_losses_in_a_row_that_are_not_finite_trip_it() -> None:
    guard = DivergenceGuard(100, most_not_finite=3)
    for update in range(30):
        assert guard.add(update, 1.0, 8) is None
    assert guard.add(30, math.nan, 8) is None
    assert guard.add(30, math.inf, 8) is None
    assert guard.add(30, 1.0, 8) is None
    assert [guard.add(31, math.nan, 8) is None for _ in range(3)] == [True, True, False]


def test_what_was_learned_a_while_before_a_sudden_end_is_good() -> None:
    guard = DivergenceGuard(200)
    for update in range(100):
        guard.add(update, 2.3 * math.exp(-update / 20) + 0.1, 8)
    assert guard.good_version(100) == 100 - guard.span
    for update in range(100, 106):
        guard.add(update, 2.0, 8)
    assert guard.good_version(106) <= 101 - guard.span  # the rise began before it was plain


def test_after_a_restart_the_average_begins_anew_and_the_start_is_remembered() -> None:
    guard = DivergenceGuard(200)
    for update in range(60):
        guard.add(update, 2.3 if update < 10 else 0.2, 8)
    guard.restart()
    assert (guard.average, guard.best) == (None, None)
    trips = [guard.add(update, 0.9, 8) for update in range(60, 100)]
    assert trips == [None] * 40  # higher than the best before, and yet where it goes on from
    found = [guard.add(update, 1.2, 8) for update in range(100, 150)]
    assert found == [None] * 50  # by less than a quarter of what was gained since the very start


def test_after_a_rollback_a_loss_that_stays_near_the_start_is_a_stall_once_the_window_is_open() -> None:
    guard = DivergenceGuard(400, first=2.3)
    guard.be_wary(50)
    trips = [guard.add(update, 2.29, 8) for update in range(200)]
    found = next(one for one in trips if one is not None)
    assert found.version == 50 + 3 * guard.span
    assert found.good_version == 50
    assert "stays near the 2.3 that it started with" in found.why
    learns = DivergenceGuard(400, first=2.3)
    learns.be_wary(50)
    assert all(learns.add(update, 2.3 * math.exp(-update / 300), 8) is None for update in range(200))


@pytest.mark.parametrize("updates", range(FIRST_UPDATES + 2))
def test_nothing_trips_in_the_first_updates(updates: int) -> None:
    assert watch([10.0**update for update in range(updates)]) is None
