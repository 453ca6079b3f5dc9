"""How many updates of a job are compared with the plain loop."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.data import load_dataset
from layerwise.job import parse_job
from layerwise.verify import updates_to_verify


@pytest.mark.parametrize(
    ("train", "most", "updates"),
    [
        ({"steps": 6}, 20, 6),
        ({"steps": 60}, 20, 20),
        ({"epochs": 1}, 20, 4),
        ({"epochs": 2}, 20, 8),
        ({"epochs": 2}, 5, 5),
        ({}, 20, 4),
    ],
)
def test_no_more_updates_are_compared_than_the_job_has(train: dict[str, Any], most: int, updates: int) -> None:
    job = parse_job({"name": "small", "model": "mlp", "data": {"name": "digits", "batch": 400}, "train": train})
    assert 1200 < len(load_dataset(job.data).train) <= 1600
    assert updates_to_verify(job, most) == updates
