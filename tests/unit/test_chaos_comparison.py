"""What a run under faults must have learned, beside runs without."""

from __future__ import annotations

import math
from typing import Any

import pytest

from layerwise.chaos.comparison import Comparison, worse_than_calm


def measured(train_loss: float | None = None, **validation: float) -> dict[str, Any]:
    return {"train_loss": train_loss, "validation": validation or None}


@pytest.mark.parametrize(
    ("found", "calm", "metric", "passed"),
    [
        (measured(accuracy=0.91, loss=9.0), measured(accuracy=0.95, loss=0.1), "accuracy", True),
        (measured(accuracy=0.89), measured(accuracy=0.95), "accuracy", False),
        (measured(accuracy=0.99), measured(accuracy=0.95), "accuracy", True),
        (measured(loss=1.2), measured(loss=1.0), "loss", True),
        (measured(loss=1.3), measured(loss=1.0), "loss", False),
        (measured(loss=math.nan), measured(loss=1.0), "loss", False),
        (measured() | {"validation": {"loss": None}}, measured(loss=1.0), "loss", False),
        (measured(loss=-1.1), measured(loss=-1.0), "loss", True),
        (measured(2.0), measured(1.0), "train_loss", False),
        (measured(1.0), measured(1.0, loss=3.0), "train_loss", True),
    ],
)
def test_one_run_is_held_against_one_without_faults(
    found: dict[str, Any], calm: dict[str, Any], metric: str, passed: bool
) -> None:
    comparison = Comparison.of(found, calm)
    assert comparison is not None
    assert (comparison.metric, comparison.passed) == (metric, passed)
    assert comparison.to_json()["passed"] is passed


@pytest.mark.parametrize("baseline", [None, {}, measured()])
def test_nothing_is_compared_with_nothing(baseline: dict[str, Any] | None) -> None:
    assert Comparison.of(measured(accuracy=0.9), baseline) is None


CALM = (0.95, 0.957, 0.96, 0.969)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ((0.951, 0.96, 0.944), ""),
        ((0.99, 0.99), ""),
        ((0.949, 0.948, 0.95), "the mean accuracy 0.9490 is below"),
        ((0.97, 0.97, 0.97, 0.90), "an accuracy of 0.9000 is more than 5 standard deviations below 0.9590"),
    ],
)
def test_many_runs_are_held_against_the_spread_of_those_without(found: tuple[float, ...], sentence: str) -> None:
    said = worse_than_calm(found, CALM)
    assert len(said) == bool(sentence)
    assert sentence in "".join(said)


def test_runs_that_end_alike_by_chance_allow_for_a_sample() -> None:
    assert worse_than_calm((0.95, 0.9495), (0.949, 0.949)) == ()
