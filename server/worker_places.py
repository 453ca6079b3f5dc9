"""The places for workers that a run has, and who fills them; and who works for it beyond them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container

from layerwise.job import JobSpec
from layerwise.messages import Role
from layerwise.server.job_record import PlacementRecord
from layerwise.server.placement import Places


class WorkerPlaces:
    """Forward workers, and backward workers each for one block. A lost one leaves a vacancy. Not thread-safe.

    Those that joined have no such place: they come and go, and nobody is missed.
    """

    def __init__(self, spec: JobSpec, places: Places, present: Container[str]) -> None:
        """Of the workers of ``places`` only those that are ``present`` fill theirs."""
        self._num_forward = spec.cluster.forward
        self._num_blocks = spec.cluster.shards
        self._num_backward = spec.cluster.num_detached
        self._attached = spec.cluster.attached
        self._filled: dict[str, PlacementRecord] = {}
        self._joined: dict[str, PlacementRecord] = {}
        for name in places.forward:
            if name in present:
                self.fill(name, Role.FORWARD, -1)
        for name, block in places.backward:
            if name in present:
                self.fill(name, Role.BACKWARD, block)

    def __contains__(self, name: str) -> bool:
        return name in self._filled or name in self._joined

    @property
    def names(self) -> tuple[str, ...]:
        """Who works for the run."""
        return (*self._filled, *self._joined)

    @property
    def placed(self) -> tuple[str, ...]:
        """Who fills a place."""
        return tuple(self._filled)

    @property
    def joined(self) -> tuple[str, ...]:
        """Who works for the run beyond its places."""
        return tuple(self._joined)

    @property
    def records(self) -> tuple[PlacementRecord, ...]:
        """All of them, with the blocks that they work for."""
        return (*self._filled.values(), *self._joined.values())

    def introduce(self, name: str) -> str:
        """A worker as the beginning of a sentence about what it met; empty for who is none."""
        found = [one.role for one in self.records if one.process == name]
        return f"{found[0]} worker {name}: " if found else ""

    def of_role(self, role: Role) -> tuple[str, ...]:
        """The workers of one role."""
        return tuple(one.process for one in self.records if one.role is role)

    def fill(self, name: str, role: Role, block: int) -> None:
        """A process takes a place."""
        self._filled[name] = PlacementRecord(process=name, role=role, block=block)

    def join(self, name: str, role: Role, block: int | None = None) -> int:
        """A process works beyond the places, for ``block``: by default, if it is for one, that with the fewest workers."""
        if block is None:
            num_workers = Counter(one.block for one in self.records if one.role is Role.BACKWARD)
            block = min(range(self._num_blocks), key=lambda one: num_workers[one]) if role is Role.BACKWARD else -1
        self._joined[name] = PlacementRecord(process=name, role=role, block=block)
        return block

    def has_room(self, role: Role, block: int, *, joins: bool) -> bool:
        """Whether a process may work for ``block`` (-1: all): in a place that nobody fills, or, if it ``joins``, beyond them."""
        if not joins:
            return (role, block) in self.vacancies()
        return block == -1 if role is Role.FORWARD else 0 <= block < self._num_blocks and self._num_backward > 0

    def empty(self, name: str) -> PlacementRecord:
        """A process is gone; gives the place that it leaves."""
        return (self._joined if name in self._joined else self._filled).pop(name)

    def vacancies(self) -> list[tuple[Role, int]]:
        """Places that nobody fills, with the block they are for (-1: all)."""
        num_forward = sum(one.role is Role.FORWARD for one in self._filled.values())
        vacant = [(Role.FORWARD, -1)] * (self._num_forward - num_forward)
        blocks = [place % self._num_blocks for place in range(self._num_backward)]
        for one in self._filled.values():
            if one.role is Role.BACKWARD:
                blocks.remove(one.block)
        return vacant + [(Role.BACKWARD, block) for block in blocks]

    def missing(self, without: Collection[str] = ()) -> str:
        """Which kind of worker is missing altogether, as the beginning of a sentence; empty when none is.

        Workers in ``without`` are not counted.
        """
        left = [one for one in self.records if one.process not in without]
        if not any(one.role is Role.FORWARD for one in left):
            return "no forward worker is left"
        served = {one.block for one in left if one.role is Role.BACKWARD}
        alone = [] if self._attached else [block for block in range(self._num_blocks) if block not in served]
        return f"no backward worker is left for block {alone[0]}" if alone else ""
