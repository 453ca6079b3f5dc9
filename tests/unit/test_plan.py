"""The plan's arithmetic against counting by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.ids import Microbatch
from layerwise.plan import TrainingPlan


@st.composite
def plans(draw: st.DrawFn) -> TrainingPlan:
    accumulation = draw(st.integers(1, 6))
    return TrainingPlan(
        num_samples=draw(st.integers(1, 60)),
        batch=accumulation * draw(st.integers(1, 4)),
        accumulation=accumulation,
        num_updates=draw(st.integers(0, 30)),
    )


def listed(plan: TrainingPlan) -> list[list[Microbatch]]:
    """The microbatches of each update, cut one by one."""
    updates: list[list[Microbatch]] = []
    epoch = 0
    while len(updates) < plan.num_updates:
        for first in range(0, plan.num_samples, plan.batch):
            last = min(first + plan.batch, plan.num_samples)
            size = plan.batch // plan.accumulation
            updates.append([Microbatch(epoch, start, min(start + size, last)) for start in range(first, last, size)])
        epoch += 1
    return updates[: plan.num_updates]


@given(plans())
def test_plan_cuts_the_microbatches_that_cutting_one_by_one_gives(plan: TrainingPlan) -> None:
    updates = listed(plan)
    every = [microbatch for update in updates for microbatch in update]
    assert [plan.count(update) for update in range(plan.num_updates)] == [len(update) for update in updates]
    assert plan.num_microbatches == len(every)
    assert [plan.microbatch(index) for index in range(len(every))] == every
    assert [plan.index(microbatch) for microbatch in every] == list(range(len(every)))
    assert plan.total_samples == sum(microbatch.num_samples for microbatch in every)
    assert plan.num_epochs == (every[-1].epoch + 1 if every else 0)


@given(plans())
def test_each_gradient_belongs_to_the_update_that_its_place_in_the_count_says(plan: TrainingPlan) -> None:
    places = [number for number in range(plan.num_updates) for _ in range(plan.count(number))]
    assert [plan.update_of(gradient) for gradient in range(plan.num_microbatches)] == places
    for update in range(plan.num_updates + 1):
        assert plan.gradients_before(update) == sum(place < update for place in places)


@given(plans())
def test_samples_before_an_update_are_those_of_the_microbatches_before_it(plan: TrainingPlan) -> None:
    samples = [0]
    for update in listed(plan):
        samples.append(samples[-1] + sum(microbatch.num_samples for microbatch in update))
    assert [plan.samples_before(update) for update in range(plan.num_updates + 1)] == samples
    for stop in range(plan.num_microbatches + 1):
        assert plan.samples_in(stop) == sum(plan.microbatch(index).num_samples for index in range(stop))


@given(plans(), st.integers(1, 20))
def test_promise_is_the_most_updates_that_any_such_run_of_gradients_closes(plan: TrainingPlan, window: int) -> None:
    span = 2 * (window - 1)
    starts = range(plan.microbatches_per_epoch)
    assert plan.max_staleness(window) == max(plan.update_of(start + span) - plan.update_of(start) for start in starts)
    assert plan.expected_staleness(window) <= plan.max_staleness(window)


@given(plans(), st.integers(0, 9))
def test_largest_window_keeps_the_promise_and_the_next_one_does_not(plan: TrainingPlan, allowed: int) -> None:
    window = plan.largest_window(allowed)
    assert plan.max_staleness(window) <= allowed < plan.max_staleness(window + 1)


def test_short_last_update_adds_to_the_promise() -> None:
    whole = TrainingPlan(num_samples=32, batch=4, accumulation=4, num_updates=80)
    short = TrainingPlan(num_samples=33, batch=4, accumulation=4, num_updates=80)
    assert whole.max_staleness(2) == 1
    assert short.max_staleness(2) == 2


@pytest.mark.parametrize(
    "microbatch",
    [
        Microbatch(0, 0, 3),
        Microbatch(0, 1, 3),
        Microbatch(0, 8, 12),
        Microbatch(0, 10, 12),
        Microbatch(1, 4, 6),
        Microbatch(3, 0, 2),
        Microbatch(0, 100, 102),
    ],
)
def test_range_that_the_plan_does_not_cut_has_no_index(microbatch: Microbatch) -> None:
    plan = TrainingPlan(num_samples=10, batch=4, accumulation=2, num_updates=4)
    with pytest.raises(ValueError, match="not a microbatch of this plan"):
        plan.index(microbatch)


@pytest.mark.parametrize(
    "numbers", [(0, 4, 2, 1), (10, 0, 1, 1), (10, 4, 0, 1), (10, 4, 2, -1), (10, 4, 3, 1)], ids=str
)
def test_impossible_plan_is_refused(numbers: tuple[int, int, int, int]) -> None:
    num_samples, batch, accumulation, num_updates = numbers
    with pytest.raises(ValueError, match=r"plan needs positive|does not divide"):
        TrainingPlan(num_samples=num_samples, batch=batch, accumulation=accumulation, num_updates=num_updates)
