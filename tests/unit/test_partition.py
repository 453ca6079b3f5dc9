from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import ConfigError
from layerwise.partition import layer_cost, layer_costs, partition
from layerwise.profile import LayerProfile, Profile


def profile(costs: list[float], shares: dict[int, tuple[int, ...]] | None = None) -> Profile:
    layers = tuple(
        LayerProfile(
            index=index,
            name=f"{index}-kind-{index}",
            parameters=1,
            trainable=1,
            parameter_bytes=4,
            state_bytes=4,
            forward_seconds=cost / 4,
            backward_seconds=cost * 3 / 4,
            activation_bytes=1,
            output_bytes=1,
            output_shapes=((1,),),
            shares_with=(shares or {}).get(index, ()),
        )
        for index, cost in enumerate(costs)
    )
    return Profile(layers=layers, num_train_samples=1, num_validation_samples=0, microbatch_samples=1, input_bytes=1)


def largest(one: Profile, blocks: tuple[tuple[int, int], ...], recompute: bool) -> float:
    return max(sum(layer_cost(layer, recompute=recompute) for layer in one.layers[a:b]) for a, b in blocks)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=9),
    st.integers(1, 9),
    st.booleans(),
)
def test_the_largest_block_is_as_cheap_as_any_split_allows(
    costs: list[float], num_blocks: int, recompute: bool
) -> None:
    num_blocks = min(num_blocks, len(costs))
    one = profile(costs)
    found = partition(one, num_blocks, recompute=recompute)
    assert [start for start, _ in found] == [0, *[stop for _, stop in found[:-1]]]
    assert found[-1][1] == len(costs)
    assert all(start < stop for start, stop in found)
    best = min(
        largest(one, tuple(zip((0, *cuts), (*cuts, len(costs)), strict=True)), recompute)
        for cuts in combinations(range(1, len(costs)), num_blocks - 1)
    )
    assert largest(one, found, recompute) == pytest.approx(best, abs=1e-9)


def test_layers_that_share_parameters_stay_together() -> None:
    one = profile([1, 1, 1, 9], {0: (2,), 2: (0,)})
    assert partition(one, 2) == ((0, 3), (3, 4))


def test_a_split_that_sharing_forbids_is_refused_with_the_layers() -> None:
    with pytest.raises(ConfigError, match=r"layers 0, 2 share parameters .* at most 2 blocks"):
        partition(profile([1, 1, 1, 1], {0: (2,), 2: (0,)}), 3)


def test_more_shards_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shards is 3, but the model has only 2 layers"):
        partition(profile([1, 1]), 3)


def test_layers_of_one_kind_count_as_the_cheapest_measurement_of_them() -> None:
    noisy = profile([1, 1, 5, 1])
    same = tuple(replace(layer, name=f"{layer.index}-block") for layer in noisy.layers)
    assert partition(noisy, 2) == ((0, 2), (2, 4))
    assert layer_costs(same)[1:] == [1, 1, 1]
    assert partition(replace(noisy, layers=same), 2) == ((0, 2), (2, 4))
