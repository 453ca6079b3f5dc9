"""The route of a run, generation after generation: who has been told of it, who is ready for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from layerwise.applied import AppliedSet
from layerwise.ids import Microbatch
from layerwise.messages import (
    Assignment,
    BlockPlace,
    BlockReport,
    CutSaved,
    CutTaken,
    Message,
    Ready,
    Reroute,
    Role,
    StandbySource,
    Workers,
)
from layerwise.roles import Effect, Send
from layerwise.server.job_record import JobRecord, PlacementRecord
from layerwise.server.rollback import course_after
from layerwise.server.shard_places import ShardPlaces
from layerwise.server.standby_copies import HeldCopy


class Routing:
    """What the processes of one run know of its route.

    A process that knows the job keeps what it has and gets a `Reroute`; one that does not, or whose block is restored,
    gets an `Assignment`. All of them answer `Ready`. Not thread-safe.
    """

    def __init__(self, shards: ShardPlaces) -> None:
        self.generation = 0
        """0: there is no route yet."""
        self.route: tuple[BlockPlace, ...] = ()
        self.cut = 0
        """The version of the cut that blocks are restored from in this generation; see `version_of`."""
        self._shards = shards
        self._copies: dict[int, HeldCopy] = {}
        self._informed: set[str] = set()
        self._ready: dict[str, Ready] = {}
        self._told: dict[str, tuple[str, ...]] = {}
        """By shard the workers of its block that it knows of."""
        self._early: list[tuple[str, Message]] = []

    def begin(self, record: JobRecord, restored: Sequence[int], copies: Mapping[int, HeldCopy] | None = None) -> int:
        """A new generation, in which ``restored`` blocks begin new lives; gives the next life.

        They begin at the newest durable cut, but for those that have standby ``copies``.
        """
        self._copies = dict(copies or {})
        self.cut = record.durable_cut.version if record.durable_cut is not None else 0
        self.generation = record.next_life
        for place, block in enumerate(restored):
            self._shards.give_life(block, self.generation + place)
            self._informed.discard(self._shards[block].process)
        self.route = self._shards.route(record.blocks)
        self._ready.clear()
        self._early.clear()
        return self.generation + max(len(restored), 1)

    def version_of(self, block: int) -> int:
        """The version that ``block`` is restored at, if it is, in this generation."""
        copy = self._copies.get(block)
        return self.cut if copy is None else copy.version

    @property
    def begun(self) -> tuple[int, ...]:
        """The version at which each block's life began; all shards are ready."""
        return tuple(self._ready[place.shard].version for place in self.route)

    def recall(self, record: JobRecord) -> None:
        """The route of an earlier coordinator, as far as its record tells; nobody is known to be there."""
        self.route = self._shards.route(record.blocks)

    def inform(self, name: str, block: int, record: JobRecord) -> Send:
        """Tell a process of the route; ``block`` is the one it holds or works for (-1: all)."""
        if name in self._informed:
            durable = record.durable_cut
            reroute = Reroute(
                job=record.job,
                route=self.route,
                block=block,
                generation=self.generation,
                durable=durable.version if durable is not None else 0,
            )
            return Send(name, reroute)
        self._informed.add(name)
        self._told.pop(name, None)
        copy = self._copies.get(block) if 0 <= block < len(self.route) and self.route[block].shard == name else None
        assignment = Assignment(
            job=record.job,
            spec_json=record.spec_json,
            settings_json=record.settings_json,
            profile_json=record.profile_json,
            route=self.route,
            block=block,
            cut=self.cut if copy is None else copy.version,
            directory=record.directory,
            generation=self.generation,
            course=course_after(record.rollbacks),
            rollbacks_json=json.dumps([dict(one) for one in record.rollbacks]) if record.rollbacks else "",
            standby=StandbySource() if copy is None else copy.source(self._shards),
        )
        return Send(name, assignment)

    def inform_shards(self, record: JobRecord) -> list[Effect]:
        """Tell all of them."""
        return [self.inform(place.shard, block, record) for block, place in enumerate(self.route)]

    def tell_workers(self, job: str, workers: Sequence[PlacementRecord]) -> list[Effect]:
        """Tell the shards that are ready who works for their blocks, where they do not know it yet."""
        effects: list[Effect] = []
        for block, place in enumerate(self.route):
            names = tuple(
                one.process for one in workers if one.block == block or (block == 0 and one.role is Role.FORWARD)
            )
            if place.shard in self._ready and self._told.get(place.shard) != names:
                self._told[place.shard] = names
                effects.append(Send(place.shard, Workers(job=job, names=names)))
        return effects

    def knows(self, name: str) -> None:
        """A process is back with what it had been told before."""
        self._informed.add(name)

    def forget(self, name: str) -> None:
        """A process is gone."""
        self._informed.discard(name)
        self._told.pop(name, None)
        self._ready.pop(name, None)

    # Getting ready ---------------------------------------------------------------------------------------------------

    def take_ready(self, name: str, message: Ready, *, stop: int) -> bool:
        """``name`` is ready; False for a generation that is not this one.

        Raises:
            ValueError: its sets are none of ``stop`` microbatches, or not those of the layers that it holds.
        """
        if not self.generation or message.generation != self.generation:
            return False
        place = next((one for one in self.route if one.shard == name), None)
        expected = place.stop - place.start if place is not None else 0
        if len(message.applied_json) != expected:
            raise ValueError(f"it brings the sets of {len(message.applied_json)} layers, {name} holds {expected}")
        for text in message.applied_json:
            AppliedSet.parse(text, stop=stop)
        self._ready[name] = message
        return True

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of ``names`` are not ready."""
        return [name for name in names if name not in self._ready]

    def mismatch(self) -> str:
        """What is wrong with what the shards are ready with, in one sentence; empty when nothing is."""
        for block, place in enumerate(self.route):
            found = self._ready[place.shard]
            asked = self.version_of(block)
            if not self._shards[block].holds and found.version != asked:
                return f"shard {place.shard} restored version {found.version}, and version {asked} was asked for"
        return ""

    def applied_sets(self) -> list[AppliedSet]:
        """What each layer has, in order."""
        texts = (text for place in self.route for text in self._ready[place.shard].applied_json)
        return [AppliedSet.from_json(json.loads(text)) for text in texts]

    def drops(self) -> dict[Microbatch, str]:
        """What the blocks have dropped, and why, as far as their processes know."""
        ready = (self._ready[place.shard] for place in self.route)
        return {one.attempt.microbatch: one.reason for message in ready for one in message.drops}

    def keep(self, name: str, message: Message) -> None:
        """Keep what shard ``name`` tells before training begins, if the coming training has to hear of it.

        That is about its cuts and its layers. A block that is being restored tells only of the cut that it is restored
        from; all else is about the life before.
        """
        place = self._shards.of(name)
        if place.holds or name in self._ready:
            wanted = isinstance(message, CutTaken | CutSaved | BlockReport)
        else:
            wanted = isinstance(message, CutTaken) and message.version == self.version_of(place.block)
        if wanted:
            self._early.append((name, message))

    def take_early(self) -> list[tuple[str, Message]]:
        """What was kept of shards that are still there, the oldest cut first.

        A shard may have told of its newest cut just before it was asked to tell of all; cuts are committed in their order.
        """
        early, self._early = self._early, []
        there = [(name, message) for name, message in early if name in self._shards]
        return sorted(there, key=lambda one: getattr(one[1], "version", 0))
