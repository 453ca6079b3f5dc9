"""What a job comes to once its model is measured, and what is refused then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerwise.errors import ConfigError
from layerwise.job import JobSpec, parse_job
from layerwise.profile import LayerProfile, Profile
from layerwise.server.preparation import prepare

GIB = 1 << 30


def spec(backward: Any = "auto", *, batch: int = 8, steps: int = 4) -> JobSpec:
    return parse_job(
        {
            "name": "toy",
            "model": {"name": "mlp"},
            "data": {"name": "digits", "batch": batch},
            "train": {"steps": steps},
            "cluster": {"shards": 2, "backward": backward},
            "async": {"window": 1, "accumulation": 4},
        }
    )


PROFILE = Profile(
    layers=tuple(
        LayerProfile(
            index=index,
            name=f"layer-{index}",
            parameters=10,
            trainable=10,
            parameter_bytes=40,
            state_bytes=80,
            forward_seconds=0.001,
            backward_seconds=0.002,
            activation_bytes=100,
            output_bytes=100,
            output_shapes=((2, 10),),
        )
        for index in range(2)
    ),
    num_train_samples=64,
    num_validation_samples=0,
    microbatch_samples=2,
    input_bytes=100,
)


def wide(**sizes: int) -> Profile:
    return replace(PROFILE, layers=tuple(replace(layer, **sizes) for layer in PROFILE.layers))


def test_an_ordinary_job_is_prepared() -> None:
    assert prepare(spec(), PROFILE).blocks == ((0, 1), (1, 2))


def test_an_activation_too_large_for_a_message_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch: what layer 0 hands on has .* bytes for 2 samples"):
        prepare(spec(), wide(output_bytes=GIB))


def test_evaluation_counts_with_the_whole_batch_that_it_takes() -> None:
    profile = wide(output_bytes=GIB // 3)
    prepare(spec(), profile)
    with pytest.raises(ConfigError, match="for 8 samples"):
        prepare(spec(), replace(profile, num_validation_samples=100))


def test_blocks_that_detached_workers_could_not_pull_are_refused() -> None:
    profile = wide(parameter_bytes=GIB)
    prepare(spec(), profile)
    with pytest.raises(ConfigError, match=r"cluster\.backward: the parameters of layers 0-0"):
        prepare(spec({"attached": False, "detached": 2}), profile)


def test_a_microbatch_of_one_sample_is_refused_where_the_model_fails_on_it() -> None:
    fails = replace(PROFILE, single_sample_error="layer 1 fails: one value is too few", num_train_samples=65)
    with pytest.raises(ConfigError, match=r"the last one of an epoch has a single sample, .* one value is too few"):
        prepare(spec(steps=100), fails)
    prepare(spec(steps=100), replace(fails, num_train_samples=66))
    prepare(spec(), fails)  # ends before the epoch does
    prepare(spec(steps=100), replace(fails, single_sample_error=""))


def test_batch_norm_on_microbatches_of_two_samples_is_warned_of() -> None:
    normalised = replace(PROFILE, layers=tuple(replace(layer, batch_statistics=True) for layer in PROFILE.layers))
    [warning] = prepare(spec(), normalised).settings.warnings
    assert "microbatches of 2 samples" in warning
    assert "layers 0, 1" in warning
    assert not prepare(spec(), PROFILE).settings.warnings
    assert not prepare(spec(batch=16), normalised).settings.warnings
