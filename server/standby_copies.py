"""What the coordinator knows of standby copies, and which of them a lost block goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerwise.messages import LayerFile, StandbyHeld, StandbySource
from layerwise.server.job_record import JobRecord
from layerwise.server.preparation import Prepared
from layerwise.server.shard_places import ShardPlaces
from layerwise.server.standby_role import KEPT_COPIES


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCopy:
    """A copy of ``block`` at ``version``, made in ``life``, in the memory of process ``holder``."""

    holder: str
    block: int
    life: int
    version: int
    files: tuple[LayerFile, ...]

    def source(self, places: ShardPlaces) -> StandbySource:
        """The same for a shard that is to fetch it."""
        return StandbySource(
            holder=self.holder, address=places.of(self.holder).address, life=self.life, files=self.files
        )


class StandbyCopies:
    """The copies of one run. Nothing of it is stored: a copy is gone with its process. Not thread-safe.

    A copy counts while its history is that of its block: from when a life begins at a version, copies of older lives count up
    to that version only, as files in cuts do (see `layerwise.fences`).
    """

    def __init__(self) -> None:
        self._held: list[HeldCopy] = []

    def hold(self, holder: str, message: StandbyHeld, places: ShardPlaces) -> bool:
        """``holder`` says that it has a copy whole. False for one that does not count."""
        if not 0 <= message.block < len(places) or message.life != places[message.block].life:
            return False
        copy = HeldCopy(
            holder=holder, block=message.block, life=message.life, version=message.version, files=message.files
        )
        if copy not in self._held:
            self._held.append(copy)
            older = [one for one in self._held if (one.holder, one.block) == (holder, copy.block)][:-KEPT_COPIES]
            self._held = [one for one in self._held if one not in older]
        return True

    def newest(self, block: int) -> int:
        """The newest version of ``block`` that somebody holds (0: none)."""
        return max((one.version for one in self._held if one.block == block), default=0)

    def lose(self, holder: str) -> None:
        """A process is gone, with all that it held."""
        self._held = [one for one in self._held if one.holder != holder]

    def refuse(self, block: int, version: int) -> bool:
        """The copy of ``block`` at ``version`` could not be had; False where that is known."""
        before = len(self._held)
        self._held = [one for one in self._held if (one.block, one.version) != (block, version)]
        return len(self._held) < before

    def begin(self, block: int, version: int) -> None:
        """A new life of ``block`` begins at ``version``."""
        self._held = [one for one in self._held if one.block != block or one.version <= version]

    def choose(
        self, blocks: Iterable[int], places: ShardPlaces, *, above: int, until: int | None = None
    ) -> dict[int, HeldCopy]:
        """For each of ``blocks`` the newest copy of a version above ``above`` (and not past ``until``), if there is one.

        Only of processes that have a place in the run: others have left the job, and forgotten it.
        """
        found: dict[int, HeldCopy] = {}
        for block in blocks:
            usable = [
                one
                for one in self._held
                if one.block == block
                and one.version > above
                and (until is None or one.version <= until)
                and one.holder in places
                and one.holder != places[block].process
            ]
            if usable:
                found[block] = max(usable, key=lambda one: (one.version, one.life))
        return found


def next_evaluation(record: JobRecord, prepared: Prepared) -> int | None:
    """The lowest version that may be evaluated next: a block that went on beyond it could not be evaluated there."""
    every = prepared.spec.train.evaluate_every
    if every is None or not prepared.profile.num_validation_samples:
        return None
    evaluated = max((one["version"] for one in record.evaluations), default=0)
    return int(evaluated // every + 1) * every


def first_whole_cut(begun: Sequence[int], durable: int) -> int:
    """The lowest version of which every block can have a cut, where ``begun`` are the versions at which their lives began.

    A block that began above a cut that is not ``durable`` passes that cut by.
    """
    return max([durable, *begun])
