"""How one block enters a route, loses a neighbour on it, and changes it for a new one.

A `Reroute` keeps the layers and begins everything else anew. Once all blocks are ready the coordinator starts the new generation:

    coordinator              this block
      Reroute ───────────►   forget what waits; slots compute what they have begun to its end
                             abort what is open, take the route, link to the next shard
              ◄───────────   CutTaken, CutSaved (those that may not be durable)
              ◄───────────   Ready
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from layerwise.applied import AppliedSet
from layerwise.messages import LinkDown, Ready, Reroute
from layerwise.roles import Connect, Disconnect, Effect, Send
from layerwise.server.block_context import BlockContext
from layerwise.server.block_cuts import BlockCuts
from layerwise.server.block_evaluations import BlockEvaluations
from layerwise.server.block_passes import BlockPasses
from layerwise.server.detached_tasks import DetachedTasks
from layerwise.server.first_shard import FirstShard


class BlockRoute:
    """The route as one block of it sees it. Called by `ShardRole` and its parts only.

    ``version`` is the one that the block begins with. What ``first``, ``passes``, ``detached`` and ``evaluations`` have under way is given up
    with the route; what ``cuts`` knows stays.
    """

    def __init__(
        self,
        context: BlockContext,
        *,
        version: int,
        first: FirstShard | None,
        passes: BlockPasses,
        detached: DetachedTasks,
        evaluations: BlockEvaluations,
        cuts: BlockCuts,
    ) -> None:
        self._context = context
        self._version = version
        self._first = first
        self._passes = passes
        self._detached = detached
        self._evaluations = evaluations
        self._cuts = cuts
        self._next: Reroute | None = None

    @property
    def changing(self) -> bool:
        """A new route waits until no slot computes any more; whatever belongs to the old one is being given up."""
        return self._next is not None

    def begin(self, applied: Sequence[AppliedSet]) -> list[Effect]:
        """The block's state is built or restored; ``applied`` has each layer's set."""
        return [*self._connect(), *self._cuts.begin(), self._ready(applied)]

    def on_neighbour_lost(self, peer: str) -> list[Effect]:
        """The link to the shard of the block before or after is gone for good. The coordinator finds out what it means."""
        context = self._context
        if context.routed:
            return [Send(context.coordinator, LinkDown(job=context.job, peer=peer, generation=context.generation))]
        # Nothing has gone over it in this generation: it was the link to an earlier incarnation of that shard.
        return self._connect() if context.is_downstream(peer) else []

    def on_reroute(self, message: Reroute) -> list[Effect]:
        """The job goes on over another route. It is taken at once where no slot computes, else by `rest`."""
        context = self._context
        if context.failure is not None:
            return [Send(context.coordinator, context.failure)]  # who asks for more has not heard of it
        if message.generation <= context.generation:
            return []
        place = message.route[context.block] if len(message.route) == context.num_blocks else None
        if message.block != context.block or place is None or place.life != context.life:
            return context.refuse(context.coordinator, message, f"it does not lead over block {context.block}")
        context.generation = message.generation
        self._next = message
        context.queue.purge()
        return self.rest()

    def rest(self) -> list[Effect]:
        """Once no slot computes any more: abort what is open, take the new route, say so."""
        context, message = self._context, self._next
        if message is None or context.queue.num_running:
            return []
        self._next = None
        before = context.downstream
        context.take_route(message.route, message.generation)
        self._passes.abort_all()
        self._detached.abort_all()
        self._evaluations.forget_all()
        effects: list[Effect] = self._first.begin_anew(message.durable) if self._first is not None else []
        after = context.downstream
        if before is not None and after is not None and before.shard != after.shard:
            effects.append(Disconnect(before.shard))
        effects += self._connect()
        effects += self._cuts.tell_again(message.durable)
        # Last: with the last one that is ready training begins, and must know of the cuts.
        return [*effects, self._ready(context.compute.applied())]

    def _connect(self) -> list[Effect]:
        downstream = self._context.downstream
        return [] if downstream is None else [Connect(downstream.shard, downstream.address)]

    def _ready(self, applied: Sequence[AppliedSet]) -> Send:
        context = self._context
        ready = Ready(
            job=context.job,
            block=context.block,
            generation=context.generation,
            applied_json=tuple(json.dumps(one.to_json()) for one in applied),
            version=self._version,
            drops=self._passes.drops,
        )
        return Send(context.coordinator, ready)
