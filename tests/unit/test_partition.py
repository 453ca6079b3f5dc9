"""The split of layers into blocks, beside every other split."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import ConfigError
from layerwise.partition import layer_costs, partition
from layerwise.profile import LayerProfile, Profile


def layer(index: int, seconds: float, *, kind: str = "", shares_with: tuple[int, ...] = ()) -> LayerProfile:
    return LayerProfile(
        index=index,
        name=f"{index}-{kind or index}",
        parameters=10,
        trainable=10,
        parameter_bytes=40,
        state_bytes=80,
        forward_seconds=seconds / 3,
        backward_seconds=2 * seconds / 3,
        activation_bytes=100,
        output_bytes=10,
        output_shapes=((4, 8),),
        shares_with=shares_with,
    )


def profile(layers: list[LayerProfile]) -> Profile:
    return Profile(
        layers=tuple(layers), num_train_samples=100, num_validation_samples=10, microbatch_samples=4, input_bytes=10
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 8))
def test_no_other_split_has_a_cheaper_most_expensive_block(costs: list[int], num_blocks: int) -> None:
    layers = [layer(index, float(cost)) for index, cost in enumerate(costs)]
    if num_blocks > len(layers):
        with pytest.raises(ConfigError, match="only"):
            partition(profile(layers), num_blocks)
        return
    found = partition(profile(layers), num_blocks)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == len(layers)
    best = min(
        max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), num_blocks - 1)
    )
    assert max(sum(costs[start:stop]) for start, stop in found) == best


def test_layers_that_share_a_parameter_stay_together() -> None:
    layers = [layer(0, 1.0), layer(1, 5.0, shares_with=(2,)), layer(2, 5.0, shares_with=(1,)), layer(3, 1.0)]
    assert partition(profile(layers), 2) in (((0, 1), (1, 4)), ((0, 3), (3, 4)))
    with pytest.raises(ConfigError, match="share parameters"):
        partition(profile(layers), 4)


def test_a_noisy_measurement_of_equal_layers_does_not_shift_the_split() -> None:
    layers = [layer(0, 1.0, kind="block"), *(layer(index, 1.0, kind="block") for index in range(1, 4))]
    layers[2] = layer(2, 9.0, kind="block")
    assert layer_costs(layers)[1:] == [pytest.approx(1.0)] * 3
    assert partition(profile(layers), 2) == ((0, 2), (2, 4))
