"""Samples that can't be loaded, and losses that are not finite, on real processes."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import pytest

from layerwise.api import Connection
from layerwise.cluster import LocalCluster
from layerwise.cuts import load_manifest
from layerwise.job_audit import audit_job
from layerwise.job_result import JobResult
from tests.integration.jobs import OPTIMIZERS, OWN_CODE, check_audit, check_ledger, job, wait

SAMPLES, BATCH, EPOCHS = 44, 16, 2
TORN, EMPTY = 7, 30


def flawed(directory: Path, *, torn: int = TORN, empty: int = EMPTY, **train: Any) -> dict[str, Any]:
    """Two epochs over data with a torn and an empty sample; microbatches of 4."""
    return job(
        directory,
        {
            "import": f"{OWN_CODE}:flawed",
            "batch": BATCH,
            "samples": SAMPLES,
            "validation_samples": 12,
            "torn": torn,
            "empty": empty,
        },
        {"name": "mlp", "hidden": [16, 16, 16], "batchnorm": True, "outputs": 4},
        train={"epochs": EPOCHS, "seed": 3, "optimizer": OPTIMIZERS["momentum"], **train},
        cluster={"shards": 4, "forward": 2},
        **{"async": {"window": 4, "accumulation": 4}},
    )


def run(cluster: LocalCluster, values: Mapping[str, Any]) -> JobResult:
    with Connection(cluster.coordinator_address) as connection:
        return wait(connection.submit(values))


@pytest.mark.parametrize("mode", ["asynchronous", "synchronous"])
def test_bad_samples_are_dropped_once_in_each_epoch_and_listed_with_their_reason(
    cluster: LocalCluster, tmp_path: Path, mode: str
) -> None:
    values = flawed(tmp_path, on_bad_sample="drop", max_dropped=0.25)
    result = run(cluster, {**values, "mode": mode})
    assert result.state == "done", result.message
    check_ledger(result)
    check_audit(result)
    listed = result.ledger["dropped"]
    assert {one["epoch"] for one in listed} == {0, 1}
    for epoch in range(EPOCHS):
        reasons = sorted(one["reason"] for one in listed if one["epoch"] == epoch)
        torn = [one for one in reasons if f"the file of sample {TORN} is torn" in one]
        empty = [one for one in reasons if "its loss is not finite" in one]
        assert len(torn) == 1
        # Both may be in one microbatch, which can't be loaded then.
        assert len(empty) == len(reasons) - 1 <= 1
    assert all(one["missing_from"] is None for one in listed)
    assert result.ledger["samples_dropped"] == sum(one["stop"] - one["start"] for one in listed)
    assert result.train_loss is not None
    assert result.validation is not None
    assert isfinite(result.validation["loss"]), "the running statistics were spoilt"
    report = audit_job(result.directory, result.document)
    assert [(one.microbatch.epoch, one.microbatch.start) for one in report.dropped] == [
        (one["epoch"], one["start"]) for one in listed
    ]
    manifest = load_manifest(result.directory, result.steps)
    assert manifest["ledger"]["dropped"] == listed


def test_too_many_bad_samples_fail_the_job_with_the_last_reason(cluster: LocalCluster, tmp_path: Path) -> None:
    result = run(cluster, flawed(tmp_path, on_bad_sample="drop", max_dropped=0.05))
    assert result.state == "failed"
    assert "of the 44 samples of epoch " in result.message
    assert "had to be dropped, and train.max_dropped (0.05) allows 2; the last ones are " in result.message


@pytest.mark.parametrize(
    ("torn", "empty", "said"),
    [
        (TORN, -1, f"sample {TORN} of the training data can't be loaded: data.import: sample {TORN} of "),
        (-1, EMPTY, "is not finite: its input samples are not finite already"),
    ],
)
def test_by_default_a_bad_sample_fails_the_job(
    cluster: LocalCluster, tmp_path: Path, torn: int, empty: int, said: str
) -> None:
    result = run(cluster, flawed(tmp_path, torn=torn, empty=empty))
    assert result.state == "failed"
    assert said in result.message
