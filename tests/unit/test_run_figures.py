from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.applied import AppliedSet
from layerwise.messages import LayerReport
from layerwise.plan import TrainingPlan
from layerwise.server.metrics import staleness_histogram
from layerwise.server.preparation import restored_sets
from layerwise.server.staleness_view import staleness_document, summarize
from layerwise.server.training_loss import TrainingLoss


def test_the_running_loss_follows_and_the_recent_one_is_a_plain_mean_over_an_epoch() -> None:
    loss = TrainingLoss(TrainingPlan(num_samples=8, batch=4, accumulation=2, num_updates=100))
    assert (loss.running, loss.recent) == (None, None)
    for _ in range(50):
        loss.add(5.0, 2)
    for value in (1.0, 2.0, 3.0, 4.0):
        loss.add(value, 2)
    assert loss.recent == 2.5
    assert loss.running is not None
    assert 2.5 < loss.running < 4.0


def test_a_short_microbatch_weighs_as_much_as_it_has_samples() -> None:
    loss = TrainingLoss(TrainingPlan(num_samples=5, batch=4, accumulation=1, num_updates=2))
    loss.add(1.0, 4)
    loss.add(6.0, 1)
    assert loss.recent == 2.0


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 20), max_size=12))
def test_the_summary_equals_that_of_the_sorted_list(histogram: dict[int, int]) -> None:
    values = sorted(value for value, count in histogram.items() for _ in range(count))
    summary = summarize(histogram)
    if not values:
        assert set(summary.values()) == {None}
        return
    assert summary["mean"] == pytest.approx(sum(values) / len(values))
    assert summary["max"] == values[-1]
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        below = sum(value <= summary[name] for value in values)
        assert below >= part * len(values)
        assert sum(value < summary[name] for value in values) < part * len(values)


def test_staleness_is_shown_per_layer_with_its_name_and_over_all_gradients() -> None:
    reports = [
        LayerReport(layer=layer, life=1, version=3, revision=3, staleness=counts, misalignment=(), learning_rate=0.1)
        for layer, counts in ((1, (1, 0, 1)), (0, (2,)))
    ]
    document = staleness_document(reports, ["embed", "head"])
    assert (document["mean"], document["max"]) == (0.5, 2)
    assert [(one["name"], one["mean"], one["gradients"]) for one in document["layers"]] == [
        ("embed", 0.0, 2),
        ("head", 1.0, 2),
    ]


@given(st.lists(st.integers(0, 50), max_size=80))
def test_histogram_buckets_are_cumulative_and_end_with_the_count(counts: list[int]) -> None:
    buckets, total = staleness_histogram(counts)
    for top, number in buckets:
        assert number == sum(count for value, count in enumerate(counts) if value <= float(top))
    assert total == sum(value * count for value, count in enumerate(counts))


def test_after_a_restore_what_all_layers_hold_and_what_any_holds_are_told_apart() -> None:
    layers = [AppliedSet(2, {4}), AppliedSet(3, {5}), AppliedSet(2, {3, 4})]
    done, held = restored_sets(layers)
    assert [index for index in range(8) if index in done] == [0, 1]
    assert [index for index in range(8) if index in held] == [0, 1, 2, 3, 4, 5]
    assert restored_sets([AppliedSet(), AppliedSet()]) == (AppliedSet(), AppliedSet())
