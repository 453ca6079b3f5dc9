"""Going back from a divergence: to which cut, and how training goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerwise.messages import Course

MOST_ROLLBACKS = 2
"""The second one stays synchronous; a third is no use."""
LEAST_SYNCHRONOUS = 50
"""Updates that are made synchronously after the first rollback, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """All layers went back from about version ``reached`` to ``version`` at ``time`` (unix seconds), because of ``why``."""

    time: float
    version: int
    reached: int
    why: str
    rate_factor: float
    synchronous_until: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the store, the job document and the manifests of cuts."""
        return asdict(self)


def roll_back(
    before: Sequence[Mapping[str, Any]],
    *,
    version: int,
    reached: int,
    num_updates: int,
    why: str,
    now: float,
) -> Rollback:
    """The next rollback after those ``before`` it: half the learning rate, synchronous for twice the way back.

    The last one that there can be is synchronous to the end.
    """
    until = version + max(2 * (reached - version), LEAST_SYNCHRONOUS)
    if len(before) + 1 >= MOST_ROLLBACKS:
        until = num_updates
    return Rollback(
        time=now,
        version=version,
        reached=reached,
        why=why,
        rate_factor=0.5 ** (len(before) + 1),
        synchronous_until=min(until, num_updates),
    )


def course_after(rollbacks: Sequence[Mapping[str, Any]]) -> Course:
    """How training goes on after all of them."""
    if not rollbacks:
        return Course()
    last = rollbacks[-1]
    return Course(version=last["version"], rate_factor=last["rate_factor"], synchronous_until=last["synchronous_until"])
