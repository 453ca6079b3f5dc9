"""Jobs of every kind train asynchronously on the standing cluster, with a complete ledger and a clean audit each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.cluster import LocalCluster
from layerwise.job_result import JobResult
from tests.integration.jobs import MODELS, OPTIMIZERS, OWN_CODE, finish, image_data, job, text_data

ASYNCHRONOUS: dict[str, Any] = {"async": {"window": 6, "accumulation": 2, "delay_policy": "inverse"}}
TRAIN: dict[str, Any] = {"steps": 8, "seed": 3, "optimizer": OPTIMIZERS["muon"]}


def check_facts(result: JobResult, num_layers: int | None = None) -> None:
    """What the document says of a finished job fits together."""
    layers = result.staleness["layers"]
    assert num_layers is None or len(layers) == num_layers
    assert [one["layer"] for one in layers] == list(range(len(layers)))
    assert all(one["name"].startswith(f"{one['layer']}-") for one in layers)
    assert all(one["max"] <= result.document["max_staleness"] for one in layers)
    assert result.staleness["max"] == max(one["max"] for one in layers)
    assert result.validation is not None
    assert result.validation["version"] == result.steps
    assert result.samples_per_second is not None
    assert result.samples_per_second == pytest.approx(result.samples / result.seconds)


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("model", list(MODELS))
def test_every_model_family_trains(
    cluster: LocalCluster, tmp_path: Path, images: Path, model: str, shards: int
) -> None:
    data = text_data() if model == "transformer-lm" else image_data(images)
    values = job(tmp_path, data, MODELS[model], train=TRAIN, cluster={"shards": shards, "forward": 2}, **ASYNCHRONOUS)
    result = finish(cluster, values)
    check_facts(result)
    assert len(result.document["blocks"]) == shards
    assert (result.window, result.accumulation) == (6, 2)


@pytest.mark.parametrize("weights", ["latest", "stashed", "recompute"])
def test_every_weight_mode_trains(cluster: LocalCluster, tmp_path: Path, images: Path, weights: str) -> None:
    asynchrony = {"window": 6, "accumulation": 2, "backward_weights": weights}
    cluster_section = {"shards": 4, "slots": 2}
    values = job(
        tmp_path, image_data(images), MODELS["cnn"], train=TRAIN, cluster=cluster_section, **{"async": asynchrony}
    )
    result = finish(cluster, values)
    check_facts(result)
    assert result.backward_weights == weights


@pytest.mark.parametrize("attached", [False, True], ids=["detached only", "mixed"])
@pytest.mark.parametrize("model", ["cnn", "transformer-lm"])
def test_detached_backward_workers_train(
    cluster: LocalCluster, tmp_path: Path, images: Path, model: str, attached: bool
) -> None:
    data = text_data() if model == "transformer-lm" else image_data(images)
    backward = {"attached": attached, "detached": 2}
    values = job(
        tmp_path,
        data,
        MODELS[model],
        train=TRAIN,
        cluster={"shards": 2, "forward": 2, "backward": backward},
        **ASYNCHRONOUS,
    )
    result = finish(cluster, values)
    check_facts(result)
    assert result.backward_weights == "recompute"
    assert len(result.document["backward_workers"]) == 2


@pytest.mark.parametrize("function", ["tuples", "frozen_below"])
def test_a_users_own_layers_train(cluster: LocalCluster, tmp_path: Path, function: str) -> None:
    """On a data set and with a loss of the user's own too; detached workers beside the attached ones."""
    model = {"import": f"{OWN_CODE}:{function}", "features": 64, "width": 8, "outputs": 4}
    data = {"import": f"{OWN_CODE}:ramp", "samples": 44, "validation_samples": 12, "batch": 16}
    values = job(
        tmp_path,
        data,
        model,
        loss={"import": f"{OWN_CODE}:smooth_loss"},
        metrics=["accuracy", {"name": "accuracy", "top": 2}],
        train=TRAIN,
        cluster={"shards": 4, "backward": {"attached": True, "detached": 2}},
        **ASYNCHRONOUS,
    )
    result = finish(cluster, values)
    check_facts(result, 7)
    assert result.validation is not None
    assert 0 <= result.validation["accuracy"] <= result.validation["accuracy_top_2"] <= 1


def test_bf16_trains(cluster: LocalCluster, tmp_path: Path) -> None:
    train = {**TRAIN, "precision": "bf16", "clip": 1.0}
    check_facts(finish(cluster, job(tmp_path, text_data(), MODELS["transformer-lm"], train=train, **ASYNCHRONOUS)))


def test_the_digits_are_learned(cluster: LocalCluster, tmp_path: Path) -> None:
    """With every default of the job file, and evaluations on the way."""
    values = {
        "name": "digits",
        "model": "mlp",
        "data": {"name": "digits", "batch": 64},
        "train": {"epochs": 2, "evaluate_every": 20},
        "checkpoint": {"path": str(tmp_path)},
    }
    result = finish(cluster, values)
    check_facts(result, 3)
    assert result.epochs == 2
    assert [one["version"] for one in result.evaluations] == [20, 40, result.steps]
    assert result.validation is not None
    assert result.validation["accuracy"] > 0.8
    assert result.document["delay_policy"] == "constant"
