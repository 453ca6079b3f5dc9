"""Delay policies: what a layer's step size becomes when its gradients are stale.

A policy scales the step, never the gradient: optimizers that normalise by the gradient's size would undo a scaled
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from layerwise.errors import ConfigError

DelayPolicy = Callable[[int, float], float]
"""``policy(staleness, learning_rate)``: the step size of an update whose largest staleness is ``staleness`` updates."""


def constant(staleness: int, learning_rate: float) -> float:
    """The scheduled learning rate, whatever the staleness."""
    return learning_rate


def inverse(staleness: int, learning_rate: float) -> float:
    """``learning_rate / (1 + staleness)``: shrinks as the stable range of delayed gradient descent does."""
    return learning_rate / (1 + staleness)


_POLICIES: dict[str, DelayPolicy] = {"constant": constant, "inverse": inverse}


def delay_policy(name: str) -> DelayPolicy:
    """The policy called ``name``: "constant" or "inverse". `ConfigError` for any other name."""
    policy = _POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"no delay policy is called {name!r}: choose one of {', '.join(_POLICIES)}")
    return policy


def automatic_policy(staleness: int) -> Literal["constant", "inverse"]:
    """The name that ``auto`` stands for in a run whose expected staleness is ``staleness`` updates."""
    return "constant" if staleness <= 1 else "inverse"
