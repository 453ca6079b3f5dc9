"""The cuts of one block: at which versions its layers copy themselves, and what the coordinator is told of the copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerwise.messages import CutSaved, CutTaken, LayerFile, StopAt
from layerwise.roles import Effect, Send
from layerwise.server.admission import MAX_PENDING_CUTS
from layerwise.server.block_context import BlockContext
from layerwise.server.cut_schedule import CutSchedule


class BlockCuts:
    """Schedules as many cuts ahead of the layers as may be pending, and keeps what was told of those before.

    ``schedule`` says where cuts are. ``version`` is the one that the block begins with, ``from_cut`` or from a standby copy. Called by
    `ShardRole` and its parts only.
    """

    def __init__(self, context: BlockContext, schedule: CutSchedule, *, version: int, from_cut: bool) -> None:
        self._context = context
        self._schedule = schedule
        self._version = version
        self._from_cut = from_cut
        self._told: dict[int, CutSaved | None] = {}
        """By version, of each cut that is taken: what came of saving it, once that is over."""

    def begin(self) -> list[Effect]:
        """The block's state is built or restored: tell of the cut that is here already, if there is one."""
        version = self._version
        self._schedule_after(version)
        if not self._from_cut:
            # Cuts of which there are copies only are not durable yet: this one may become so, those before it can't any more.
            if version in self._schedule:
                self._cut_at(version)
            return []
        if not version:
            return []
        # The copy that was restored is here still, in case the version has not been evaluated.
        self._told[version] = None
        return [self._taken(version)]

    def is_final(self, version: int) -> bool:
        """Whether training ends at ``version``."""
        return version == self._schedule.final

    def on_taken(self, version: int) -> list[Effect]:
        """Every layer of the block is copied at ``version``."""
        self._told.setdefault(version, None)
        self._schedule_after(version)
        return [self._taken(version)]

    def on_saved(self, version: int, files: Sequence[LayerFile], error: str) -> list[Effect]:
        """The block's files of the cut are on disk, or ``error`` says why not."""
        context = self._context
        saved = CutSaved(job=context.job, block=context.block, version=version, files=tuple(files), error=error)
        self._told[version] = saved
        for old in sorted(self._told)[: -2 * (MAX_PENDING_CUTS + 1)]:
            del self._told[old]
        return [Send(context.coordinator, saved)]

    def tell_again(self, durable: int) -> list[Effect]:
        """Tell once more of the cuts from version ``durable`` on: the training that begins anew does not know of them."""
        effects: list[Effect] = []
        for version, saved in sorted(self._told.items()):
            if version >= durable:
                effects.append(self._taken(version))
                effects += [Send(self._context.coordinator, saved)] if saved is not None else []
        return effects

    def release(self, version: int) -> None:
        """Let copies of versions up to ``version`` go once they are saved."""
        self._context.compute.release_cut(version)

    def on_stop_at(self, message: StopAt) -> list[Effect]:
        """Training ends at a version that lies ahead; the block after is told.

        Raises:
            ValueError: A layer is past that version.
        """
        context = self._context
        reached = max(layer.version for layer in context.compute.report())
        if message.version < reached:
            raise ValueError(f"training can't stop at version {message.version}, the block is at version {reached}")
        self._schedule.stop_at(message.version)
        self._cut_at(message.version)
        downstream = context.downstream
        return [] if downstream is None else [Send(downstream.shard, replace(message, life=downstream.life))]

    def _taken(self, version: int) -> Send:
        context = self._context
        return Send(context.coordinator, CutTaken(job=context.job, block=context.block, version=version))

    def _schedule_after(self, version: int) -> None:
        # Admission stays within MAX_PENDING_CUTS of the durable one, and nothing is durable before it is taken here.
        for cut in self._schedule.following(version, MAX_PENDING_CUTS + 1):
            self._cut_at(cut)

    def _cut_at(self, version: int) -> None:
        # The copy stays until the coordinator releases it: only it knows whether the version is to be evaluated.
        self._context.compute.hold_cut(version)
        self._context.compute.cut_at(version)
