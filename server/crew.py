"""The processes of one run: their places, what they know of the route, what they hold for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from layerwise.job import JobSpec
from layerwise.messages import Role
from layerwise.server.job_record import PlacementRecord
from layerwise.server.membership import Process
from layerwise.server.placement import Places, Vacancy
from layerwise.server.routing import Routing
from layerwise.server.shard_places import ShardPlaces
from layerwise.server.standby_copies import StandbyCopies
from layerwise.server.worker_places import WorkerPlaces


class Crew:
    """Who works for a run. Those of ``places`` that are not among ``processes`` leave their places empty. Not thread-safe."""

    def __init__(self, spec: JobSpec, places: Places, processes: Mapping[str, Process], now: float) -> None:
        self.shards = ShardPlaces(places.shards, processes, now)
        self.workers = WorkerPlaces(spec, places, processes)
        self.routing = Routing(self.shards)
        self.standby = StandbyCopies()
        self.room: dict[str, int] = {}
        """By worker how many leases it can hold, as it said since the route was last changed."""
        self.leaving: set[str] = set()
        """Processes that have to leave at the next update."""
        self._dismissed: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Every process that works for the run."""
        return (*self.shards.names, *self.workers.names)

    @property
    def needed(self) -> tuple[str, ...]:
        """Those that training waits for: what joined gets ready in its own time."""
        return (*self.shards.names, *self.workers.placed)

    @property
    def placement(self) -> tuple[PlacementRecord, ...]:
        """Who is where, as the job's record keeps it."""
        return (*self.shards.records(self.routing.route), *self.workers.records)

    def vacancies(self, *, without_workers: bool = False) -> list[Vacancy]:
        """Places that nobody fills; ``without_workers``: only those of shards."""
        shards = [
            Vacancy(
                role=Role.SHARD,
                block=one.block,
                expected="" if one.sent_away else one.process,
                since=one.empty_since or 0.0,
            )
            for one in self.shards.empty
        ]
        if without_workers:
            return shards
        return [*shards, *(Vacancy(role=role, block=block) for role, block in self.workers.vacancies())]

    def remove_worker(self, name: str) -> PlacementRecord:
        """A worker is gone; gives the place that it leaves."""
        self.room.pop(name, None)
        return self.workers.empty(name)

    def dismiss(self, names: Iterable[str]) -> None:
        """They are told to leave."""
        self._dismissed += names

    def take_dismissed(self) -> list[str]:
        """Who was told to leave since the last call."""
        dismissed, self._dismissed = self._dismissed, []
        return dismissed
