"""Window 1 and synchronous mode are plain training: every bit equals that of a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.cluster import LocalCluster
from tests.integration.jobs import (
    MODELS,
    OPTIMIZERS,
    OWN_CODE,
    check_equal_to_plain_loop,
    finish,
    image_data,
    job,
    text_data,
)


def data_for(model: str, images: Path) -> dict[str, Any]:
    return text_data() if model == "transformer-lm" else image_data(images)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer-lm"])
def test_window_1_equals_the_plain_loop(
    cluster: LocalCluster, tmp_path: Path, images: Path, model: str, optimizer: str, accumulation: int
) -> None:
    """Over an epoch's end with its short update; dropout and batch normalisation included."""
    values = job(
        tmp_path,
        data_for(model, images),
        MODELS[model],
        train={"steps": 5, "seed": 3, "optimizer": OPTIMIZERS[optimizer]},
        cluster={"shards": 4 if accumulation == 4 else 2},
        **{"async": {"window": 1, "accumulation": accumulation}},
    )
    result = finish(cluster, values)
    assert (result.window, result.accumulation) == (1, accumulation)
    assert result.staleness["max"] == 0
    check_equal_to_plain_loop(result)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_window_1_equals_the_plain_loop_for_resnet_18(
    cluster: LocalCluster, tmp_path: Path, images: Path, accumulation: int
) -> None:
    values = job(
        tmp_path,
        image_data(images),
        MODELS["resnet"],
        cluster={"shards": 4},
        **{"async": {"window": 1, "accumulation": accumulation}},
    )
    check_equal_to_plain_loop(finish(cluster, values))


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer-lm"])
def test_synchronous_mode_equals_the_plain_loop(
    cluster: LocalCluster, tmp_path: Path, images: Path, model: str
) -> None:
    """Several microbatches are on their way at once, and two forward workers bring them."""
    values = job(
        tmp_path,
        data_for(model, images),
        MODELS[model],
        mode="synchronous",
        train={"steps": 5, "seed": 3, "optimizer": OPTIMIZERS["muon"], "clip": 0.5},
        cluster={"shards": 4, "forward": 2},
        **{"async": {"accumulation": 4}},
    )
    result = finish(cluster, values)
    assert result.window == 4
    check_equal_to_plain_loop(result)


@pytest.mark.parametrize("weights", ["latest", "stashed", "recompute"])
def test_window_1_equals_the_plain_loop_whatever_weights_the_backward_pass_reads(
    cluster: LocalCluster, tmp_path: Path, images: Path, weights: str
) -> None:
    asynchrony = {"window": 1, "accumulation": 2, "backward_weights": weights}
    result = finish(cluster, job(tmp_path, image_data(images), MODELS["cnn"], **{"async": asynchrony}))
    assert result.backward_weights == weights
    check_equal_to_plain_loop(result)


def test_window_1_equals_the_plain_loop_with_detached_backward_workers_only(
    cluster: LocalCluster, tmp_path: Path, images: Path
) -> None:
    values = job(
        tmp_path,
        image_data(images),
        MODELS["cnn"],
        cluster={"shards": 2, "backward": {"attached": False, "detached": 2}},
        **{"async": {"window": 1, "accumulation": 4}},
    )
    result = finish(cluster, values)
    assert sorted(result.document["backward_workers"]) == ["backward-0", "backward-1"]
    check_equal_to_plain_loop(result)


@pytest.mark.parametrize("function", ["tuples", "frozen_below"])
def test_window_1_equals_the_plain_loop_for_unusual_layers(
    cluster: LocalCluster, tmp_path: Path, images: Path, function: str
) -> None:
    """Tuples between layers, frozen layers, layers without parameters, 0-d parameters, integer buffers."""
    model = {"import": f"{OWN_CODE}:{function}", "features": 64, "width": 8, "outputs": 4}
    values = job(
        tmp_path,
        image_data(images),
        model,
        cluster={"shards": 4},
        **{"async": {"window": 1, "accumulation": 4}},
    )
    check_equal_to_plain_loop(finish(cluster, values))


def test_window_1_equals_the_plain_loop_in_bf16(cluster: LocalCluster, tmp_path: Path, images: Path) -> None:
    train = {"steps": 5, "seed": 3, "optimizer": OPTIMIZERS["adamw"], "precision": "bf16"}
    asynchrony = {"window": 1, "accumulation": 4}
    values = job(tmp_path, image_data(images), MODELS["mlp"], train=train, **{"async": asynchrony})
    check_equal_to_plain_loop(finish(cluster, values))
