"""Delay policies."""

from __future__ import annotations

import pytest

from layerwise.errors import ConfigError
from layerwise.policies import automatic_policy, delay_policy


def test_constant_policy_gives_the_learning_rate_back_bit_for_bit() -> None:
    assert [delay_policy("constant")(staleness, 0.1) for staleness in range(4)] == [0.1] * 4


def test_inverse_policy_divides_by_one_plus_staleness() -> None:
    assert [delay_policy("inverse")(staleness, 0.6) for staleness in range(3)] == [0.6, 0.3, 0.6 / 3]


def test_every_policy_leaves_fresh_gradients_alone() -> None:
    for name in ("constant", "inverse"):
        assert delay_policy(name)(0, 0.02) == 0.02


def test_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'linear'.*constant, inverse"):
        delay_policy("linear")


def test_auto_is_constant_up_to_staleness_one() -> None:
    assert [automatic_policy(staleness) for staleness in range(4)] == ["constant", "constant", "inverse", "inverse"]
