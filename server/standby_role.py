"""Copies of blocks in the memory of other shards: who keeps whose, how they travel, how one comes back.

::

    block's own shard                        the shard that keeps its copies               a shard that takes the block over
    a copy is made ──── StandbyOffer ──────► fetches it part by part
                   ◄─── StandbyRequest ─────
                   ──── StandbyPart ───────►   ...
                   ◄─── StandbyHeld ────────  ─────► coordinator
          (lost)                                        ─────────── Assignment ───────────► fetches it in the same way
                                             ◄──────────────── StandbyRequest ─────────────
                                             ───────────────── StandbyPart ───────────────►   ...  restores it, in a new life

One request is under way at a time, and each asks for one part: however large a copy is, what trains does not wait behind it
for long, and a peer that never asks takes no memory. Nothing here is ever durable.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from layerwise.errors import CorruptError
from layerwise.ids import COORDINATOR
from layerwise.messages import (
    BlockPlace,
    LayerFile,
    Message,
    StandbyHeld,
    StandbyOffer,
    StandbyPart,
    StandbyRequest,
    StandbySource,
    Tensors,
)
from layerwise.roles import Connect, Effect, Send
from layerwise.server.standby_copy import StandbyBytes, StandbyCopy, StandbyPull, StandbySink

KEPT_COPIES = 2
"""Copies of one block that its keeper holds: while the newest one is being told of, the one before may be asked for."""

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Restore:
    """The copy with which the own block is to begin; ``done`` is told of its layers, or why there are none."""

    pull: StandbyPull
    done: Callable[[Mapping[int, StandbyBytes] | str], list[Effect]]
    patience: float
    heard_at: float


def holder_of(route: Sequence[BlockPlace], block: int) -> BlockPlace | None:
    """Who keeps the copies of ``block``: a shard on another host if there is one, else the next on the route.

    Blocks of one host are spread over the others. None where no other shard is.
    """
    if len(route) < 2:
        return None
    host = _host(route[block].address)
    others = [place for place in route if _host(place.address) != host]
    if not others:
        return route[(block + 1) % len(route)]
    rank = sum(_host(place.address) == host for place in route[:block])
    return others[rank % len(others)]


def _host(address: str) -> str:
    return "" if address.startswith("unix:") else address.rpartition(":")[0]


class StandbyRole:
    """The copies that one process has to do with in one job. Events in, effects out; never from two threads at once.

    ``sink`` makes room for a layer; ``limits`` are the most bytes that a copy of each block may have.
    """

    def __init__(
        self,
        *,
        job: str,
        block: int,
        route: Sequence[BlockPlace],
        sink: Callable[[LayerFile], StandbySink],
        limits: Sequence[int],
        coordinator: str = COORDINATOR,
    ) -> None:
        self._job = job
        self._block = block
        self._route = tuple(route)
        self._sink = sink
        self._limits = tuple(limits)
        self._coordinator = coordinator
        self._own: dict[int, StandbyCopy] = {}
        self._asked_for = -1
        self._held: dict[int, deque[StandbyCopy]] = {}
        self._pulls: dict[int, StandbyPull] = {}
        self._offers: dict[int, tuple[str, StandbyOffer]] = {}
        self._restore: _Restore | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of copies in this process: those that it keeps for others, and its own on their way."""
        kept = sum(copy.num_bytes for copies in self._held.values() for copy in copies)
        arriving = sum(pull.num_bytes for pull in self._pulls.values())
        restored = self._restore.pull.num_bytes if self._restore is not None else 0
        return kept + arriving + restored + sum(copy.num_bytes for copy in self._own.values())

    @property
    def held(self) -> tuple[StandbyCopy, ...]:
        """The copies that are kept for other blocks, each block's oldest first."""
        return tuple(copy for block in sorted(self._held) for copy in self._held[block])

    # The own block ---------------------------------------------------------------------------------------------------

    def assign(self, block: int, route: Sequence[BlockPlace]) -> None:
        """The process is to hold ``block`` anew: what it had of its own is void; what it keeps for others is not."""
        self._block = block
        self._own.clear()
        self._restore = None
        self.take_route(route)

    def take_route(self, route: Sequence[BlockPlace]) -> None:
        """The job goes on over ``route``; a copy that nobody has fetched yet is offered with the next one."""
        self._route = tuple(route)
        for block, (_, offer) in list(self._offers.items()):
            if self._route[block].life != offer.life:
                del self._offers[block]

    def offer(self, copy: StandbyCopy) -> list[Effect]:
        """The own block has copied itself."""
        place = self._route[self._block]
        holder = holder_of(self._route, self._block)
        if holder is None or copy.life != place.life:
            return []
        # The newest, and the one that is being fetched: what is neither would only take room.
        self._own = {version: one for version, one in self._own.items() if version == self._asked_for}
        self._own[copy.version] = copy
        offer = StandbyOffer(job=self._job, block=self._block, life=copy.life, version=copy.version, files=copy.files)
        return [Connect(holder.shard, holder.address), Send(holder.shard, offer)]

    def restore(
        self,
        source: StandbySource,
        version: int,
        done: Callable[[Mapping[int, StandbyBytes] | str], list[Effect]],
        *,
        patience: float,
        now: float,
    ) -> list[Effect]:
        """Fetch the copy with which the own block is to begin; whoever has it must answer each request within ``patience`` seconds."""
        pull = StandbyPull(
            job=self._job, peer=source.holder, block=self._block, life=source.life, version=version, files=source.files
        )
        self._restore = _Restore(pull=pull, done=done, patience=patience, heard_at=now)
        return [Connect(source.holder, source.address), pull.ask()]

    # Events ----------------------------------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message about copies arrived."""
        match message:
            case StandbyOffer():
                return self._on_offer(peer, message)
            case StandbyRequest():
                return self._on_request(peer, message)
            case StandbyPart():
                return self._on_part(peer, message, now)
            case StandbyHeld():
                if peer == getattr(holder_of(self._route, self._block), "shard", None) and message.block == self._block:
                    self._own = {version: one for version, one in self._own.items() if version > message.version}
        return []

    def on_lost(self, peer: str) -> list[Effect]:
        """The link to ``peer`` is gone for good: what was to come from it does not."""
        for block in [block for block, pull in self._pulls.items() if pull.peer == peer]:
            del self._pulls[block]
        for block in [block for block, (name, _) in self._offers.items() if name == peer]:
            del self._offers[block]
        if self._restore is not None and self._restore.pull.peer == peer:
            return self._fail_restore(f"the link to {peer} broke")
        return []

    def on_tick(self, now: float) -> list[Effect]:
        """Give up waiting for a copy that does not come."""
        restore = self._restore
        if restore is not None and now - restore.heard_at > restore.patience:
            return self._fail_restore(f"{restore.pull.peer} did not answer within {restore.patience:g} s")
        return []

    def tell_held(self) -> list[Effect]:
        """Tell a coordinator that may not know it which copies are here."""
        return [Send(self._coordinator, self._held_message(copy)) for copy in self.held]

    # Inside ----------------------------------------------------------------------------------------------------------

    def _on_offer(self, peer: str, offer: StandbyOffer) -> list[Effect]:
        why = self._why_not(peer, offer)
        if why:
            log.warning(
                "a copy of block %d at version %d is not fetched from %s: %s", offer.block, offer.version, peer, why
            )
            return []
        if any((one.life, one.version) == (offer.life, offer.version) for one in self._held.get(offer.block, ())):
            return []
        pull = self._pulls.get(offer.block)
        if pull is not None and pull.peer == peer and pull.life == offer.life:
            self._offers[offer.block] = peer, offer
            return []
        return self._begin_pull(peer, offer)

    def _why_not(self, peer: str, offer: StandbyOffer) -> str:
        if not 0 <= offer.block < len(self._route) or offer.block == self._block:
            return "it is of no other block"
        place = self._route[offer.block]
        if (peer, offer.life) != (place.shard, place.life):
            return f"it is of life {offer.life}; the block is held by {place.shard} in life {place.life}"
        if holder_of(self._route, offer.block) != self._route[self._block]:
            return "another shard keeps them"
        if [file.layer for file in offer.files] != list(range(place.start, place.stop)):
            return f"it has layers {[file.layer for file in offer.files]}"
        num_bytes = sum(max(file.num_bytes, 0) for file in offer.files)
        if num_bytes > self._limits[offer.block]:
            return f"it has {num_bytes} bytes, and at most {self._limits[offer.block]} are expected"
        return ""

    def _begin_pull(self, peer: str, offer: StandbyOffer) -> list[Effect]:
        self._offers.pop(offer.block, None)
        pull = StandbyPull(
            job=self._job, peer=peer, block=offer.block, life=offer.life, version=offer.version, files=offer.files
        )
        self._pulls[offer.block] = pull
        return [pull.ask()]

    def _on_request(self, peer: str, request: StandbyRequest) -> list[Effect]:
        copies = [*self._own.values(), *self._held.get(request.block, ())]
        if request.block == self._block:
            self._asked_for = request.version
        wanted = (request.block, request.life, request.version)
        found = next((one for one in copies if (one.block, one.life, one.version) == wanted), None)
        layer = found.layers.get(request.layer) if found is not None else None
        try:
            data = layer.part(request.offset) if layer is not None else Tensors.none()
        except ValueError:
            data = Tensors.none()
        part = StandbyPart(
            job=self._job,
            block=request.block,
            life=request.life,
            version=request.version,
            layer=request.layer,
            offset=request.offset,
            data=data,
        )
        return [Send(peer, part)]

    def _on_part(self, peer: str, part: StandbyPart, now: float) -> list[Effect]:
        restore = self._restore
        if restore is not None and restore.pull.awaits(peer, part):
            restore.heard_at = now
            return self._take_restored(restore, part)
        pull = self._pulls.get(part.block)
        if pull is None or not pull.awaits(peer, part):
            return []
        try:
            whole = pull.take(part, self._sink)
        except (ValueError, CorruptError) as error:
            log.warning(
                "the copy of block %d at version %d from %s is given up: %s", pull.block, pull.version, peer, error
            )
            del self._pulls[part.block]
            return self._fetch_next(part.block)
        if not whole:
            return [pull.ask()]
        del self._pulls[part.block]
        copy = pull.copy()
        copies = self._held.setdefault(pull.block, deque(maxlen=KEPT_COPIES))
        copies.append(copy)
        held = self._held_message(copy)
        return [Send(self._coordinator, held), Send(peer, held), *self._fetch_next(part.block)]

    def _fetch_next(self, block: int) -> list[Effect]:
        waiting = self._offers.pop(block, None)
        return self._begin_pull(*waiting) if waiting is not None else []

    def _take_restored(self, restore: _Restore, part: StandbyPart) -> list[Effect]:
        try:
            whole = restore.pull.take(part, self._sink)
        except (ValueError, CorruptError) as error:
            return self._fail_restore(str(error))
        if not whole:
            return [restore.pull.ask()]
        self._restore = None
        return restore.done(restore.pull.layers)

    def _fail_restore(self, why: str) -> list[Effect]:
        restore, self._restore = self._restore, None
        assert restore is not None
        return restore.done(why)

    def _held_message(self, copy: StandbyCopy) -> StandbyHeld:
        return StandbyHeld(job=self._job, block=copy.block, life=copy.life, version=copy.version, files=copy.files)
