from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.data import microbatch_indices, permutation
from layerwise.data.sampling import split
from layerwise.ids import Microbatch


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_an_epoch_holds_every_sample_once(seed: int, epoch: int, num_samples: int) -> None:
    assert sorted(permutation(seed, epoch, num_samples)) == list(range(num_samples))


def test_the_order_never_changes_between_versions() -> None:
    assert permutation(1, 0, 8).tolist() == [4, 6, 1, 3, 2, 0, 5, 7]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_nobody_can_change_the_order_for_others() -> None:
    with pytest.raises(ValueError):
        permutation(0, 0, 5)[0] = 1


def test_a_microbatch_is_its_range_of_positions() -> None:
    order = permutation(3, 2, 10)
    parts = [microbatch_indices(3, Microbatch(2, start, min(start + 4, 10)), 10) for start in (0, 4, 8)]
    assert np.concatenate(parts).tolist() == order.tolist()
    with pytest.raises(ValueError, match="ends beyond the 10 samples"):
        microbatch_indices(3, Microbatch(2, 8, 12), 10)


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 5))
def test_a_split_puts_every_sample_in_one_part(num_samples: int, validation: float, seed: int) -> None:
    train, kept = split(num_samples, validation, seed)
    assert sorted([*train, *kept]) == list(range(num_samples))
    assert len(kept) == round(num_samples * validation)
