"""Who holds each block of a run: which process, in which life, and since when a place is empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.messages import BlockPlace, Role
from layerwise.server.job_record import PlacementRecord
from layerwise.server.membership import Process


@dataclass(slots=True)
class ShardPlace:
    """The place of one block. ``process`` is the one that fills it, or that filled it last and may come back.

    ``life`` is the newest that was given out for the block (0: none). ``holds``: the process has the block's layers in that life.
    ``sent_away``: the place is empty because its process had to leave it.
    """

    block: int
    process: str
    address: str = ""
    device: str = ""
    life: int = 0
    holds: bool = False
    empty_since: float | None = None
    why: str = ""
    sent_away: bool = False


class ShardPlaces:
    """One place a block, in the blocks' order. Not thread-safe."""

    def __init__(self, names: Sequence[str], processes: Mapping[str, Process], now: float) -> None:
        """Processes that are not among ``processes`` leave their places empty."""
        self._places = [ShardPlace(block, name) for block, name in enumerate(names)]
        for place in self._places:
            if place.process in processes:
                self.fill(place.block, processes[place.process])
            else:
                place.empty_since, place.why = now, "it has not come back yet"

    def __contains__(self, name: str) -> bool:
        return any(place.process == name and place.empty_since is None for place in self._places)

    def __getitem__(self, block: int) -> ShardPlace:
        return self._places[block]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> tuple[str, ...]:
        """Who fills a place, in the blocks' order."""
        return tuple(place.process for place in self._places if place.empty_since is None)

    @property
    def filled(self) -> tuple[ShardPlace, ...]:
        """The places that somebody fills."""
        return tuple(place for place in self._places if place.empty_since is None)

    @property
    def empty(self) -> tuple[ShardPlace, ...]:
        """The places that nobody fills."""
        return tuple(place for place in self._places if place.empty_since is not None)

    @property
    def lacking(self) -> tuple[int, ...]:
        """The blocks whose process does not have their layers."""
        return tuple(place.block for place in self._places if not place.holds)

    @property
    def oldest_life(self) -> int:
        """The oldest of the blocks' lives; 0 while some block has none."""
        return min(place.life for place in self._places)

    def of(self, name: str) -> ShardPlace:
        """The place that ``name`` fills; ``KeyError`` when it fills none."""
        for place in self._places:
            if place.process == name and place.empty_since is None:
                return place
        raise KeyError(name)

    def fill(self, block: int, process: Process, *, holds: bool = False) -> None:
        """``process`` takes the place; ``holds``: it still has the block's layers in the newest life."""
        place = self._places[block]
        place.process, place.address, place.device = process.name, process.hello.address, process.hello.device
        place.holds, place.empty_since, place.why, place.sent_away = holds, None, "", False

    def vacate(self, name: str, why: str, now: float) -> ShardPlace:
        """``name`` is gone from its place. It may yet come back with its layers."""
        place = self.of(name)
        place.holds, place.empty_since, place.why = False, now, why
        return place

    def send_away(self, name: str, now: float) -> None:
        """``name`` has to leave its place, and does not come back."""
        self.vacate(name, "its node is drained", now).sent_away = True

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could come into an empty place."""
        for place in self.empty:
            assert place.empty_since is not None
            place.empty_since = min(place.empty_since + seconds, now)

    def give_life(self, block: int, life: int) -> None:
        """The block is to be restored in ``life``."""
        self._places[block].life, self._places[block].holds = life, False

    def remember(self, records: Sequence[PlacementRecord]) -> None:
        """The lives that an earlier coordinator gave out."""
        for record in records:
            self._places[record.block].life = record.life

    def route(self, blocks: Sequence[tuple[int, int]]) -> tuple[BlockPlace, ...]:
        """The route over the places, all filled; ``blocks`` are their layers."""
        return tuple(
            BlockPlace(start=start, stop=stop, shard=place.process, address=place.address, life=place.life)
            for (start, stop), place in zip(blocks, self._places, strict=True)
        )

    def records(self, route: Sequence[BlockPlace]) -> tuple[PlacementRecord, ...]:
        """The places on ``route``, as the job's record keeps them."""
        return tuple(
            PlacementRecord(
                process=one.shard, role=Role.SHARD, block=block, start=one.start, stop=one.stop, life=one.life
            )
            for block, one in enumerate(route)
        )
