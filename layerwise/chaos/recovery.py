"""What each fault cost: how long until training went on, how far it fell back. Pure: times are arguments."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from layerwise.chaos.log_tail import LayerProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOutcome:
    """A fault that happened, and what came of it. Times are seconds, ``at`` counts from the job's submission.

    ``version``: what all layers had reached. ``recovery_seconds``: from the fault until every layer has made another
    update; ``None`` when the job ended before. ``caught_up_seconds``: until every layer was at ``version`` again.
    ``stall_seconds``: the longest time that any layer went without an update between this fault and the next one.
    ``replaced``: whether a paused process had lost its place to another one when it went on; ``None``: it was not
    paused, or the job ended before that, or it was the coordinator.
    """

    fault: str
    kind: str
    process: str
    at: float
    version: int | None = None
    recovery_seconds: float | None = None
    caught_up_seconds: float | None = None
    stall_seconds: float | None = None
    replaced: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class _Watched:
    outcome: FaultOutcome
    begun: float
    updates_before: dict[int, int]
    num_layers: int


@dataclass(slots=True)
class RecoveryWatch:
    """Watches the layers after each fault. ``started``: when the job was submitted, on the clock of all times here."""

    started: float
    _watched: list[_Watched] = field(default_factory=list)

    def begin(
        self, *, fault: str, kind: str, process: str, version: int, layers: Mapping[int, LayerProgress], now: float
    ) -> None:
        """A fault has happened at ``now``, when every layer had reached ``version``."""
        outcome = FaultOutcome(fault=fault, kind=kind, process=process, at=now - self.started, version=version)
        updates = {index: len(layer.updated_at) for index, layer in layers.items()}
        self._watched.append(_Watched(outcome, now, updates, len(layers)))

    def observe(self, layers: Mapping[int, LayerProgress], lowest_version: int, now: float) -> None:
        """The layers have been looked at again."""
        for one in self._watched:
            outcome = one.outcome
            if outcome.recovery_seconds is None:
                made = [
                    layer.updated_at[one.updates_before.get(index, 0)]
                    for index, layer in layers.items()
                    if len(layer.updated_at) > one.updates_before.get(index, 0)
                ]
                if made and len(made) >= one.num_layers:
                    one.outcome = outcome = replace(outcome, recovery_seconds=max(made) - one.begun)
            if (
                outcome.recovery_seconds is not None
                and outcome.caught_up_seconds is None
                and lowest_version >= (outcome.version or 0)
            ):
                one.outcome = replace(outcome, caught_up_seconds=now - one.begun)

    def note_replaced(self, process: str, *, replaced: bool) -> None:
        """The newest fault of ``process``, a pause, is over."""
        one = next(one for one in reversed(self._watched) if process in one.outcome.process.split(", "))
        one.outcome = replace(one.outcome, replaced=replaced)

    @property
    def injected(self) -> tuple[str, ...]:
        """The faults so far."""
        return tuple(one.outcome.fault for one in self._watched)

    @property
    def all_recovered(self) -> bool:
        """Every layer has made an update after each fault."""
        return all(one.outcome.recovery_seconds is not None for one in self._watched)

    def outcomes(self, layers: Mapping[int, LayerProgress]) -> tuple[FaultOutcome, ...]:
        """All faults, in order, with their stalls."""
        begun = [one.begun for one in self._watched] + [float("inf")]
        return tuple(
            replace(one.outcome, stall_seconds=longest_stall(layers, one.begun, end))
            for one, end in zip(self._watched, begun[1:], strict=True)
        )


def time_to_updates(layers: Mapping[int, LayerProgress], begun: float) -> float | None:
    """Seconds from ``begun`` until every layer had made an update after it; ``None``: one never did."""
    following = [bisect_right(layer.updated_at, begun) for layer in layers.values()]
    if not layers or any(
        place == len(layer.updated_at) for place, layer in zip(following, layers.values(), strict=True)
    ):
        return None
    return max(layer.updated_at[place] for place, layer in zip(following, layers.values(), strict=True)) - begun


def longest_stall(layers: Mapping[int, LayerProgress], begin: float, end: float) -> float | None:
    """The longest time that a layer was without an update in ``[begin, end)``, counted from its last one before.

    ``None``: no two updates of a layer surround any of that time.
    """
    gaps = [
        min(later, end) - earlier
        for layer in layers.values()
        for earlier, later in pairwise(layer.updated_at)
        if later > begin and earlier < end
    ]
    return max(gaps, default=None)
