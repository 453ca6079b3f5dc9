"""How far each cut of a run is: taken, saved and committed, block by block."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerwise.messages import LayerFile


@dataclass(slots=True)
class _Cut:
    taken: set[int] = field(default_factory=set)
    files: dict[int, tuple[LayerFile, ...]] = field(default_factory=dict)


class CutLedger:
    """The cuts of one run over ``num_blocks`` blocks; ``keep`` durable ones stay on disk.

    ::

        every block takes its copy ──► taken          (may be evaluated)
        every block saves its files ─► saved ─► commit asked ─► durable
                     └── one block can't ──────────────└──► given up: the older cut stands, training goes on

    Repeats change nothing. Not thread-safe.
    """

    def __init__(self, num_blocks: int, *, keep: int, durable: tuple[int, ...] = (), first_whole: int = 0) -> None:
        """Below version ``first_whole`` some block has no copy any more and will not make one: no cut there is ever whole."""
        self._num_blocks = num_blocks
        self._first_whole = first_whole
        self._keep = keep
        self._durable = sorted(durable)
        self.pinned: frozenset[int] = frozenset()
        """Durable versions that are kept however old they are."""
        self._keeping: frozenset[int] | None = None
        self._given_up: dict[int, str] = {}
        self._cuts: dict[int, _Cut] = {}
        self._committing: int | None = None

    @property
    def durable(self) -> tuple[int, ...]:
        """Durable versions that are kept, oldest first."""
        return tuple(self._durable)

    def newest_until(self, version: int) -> int | None:
        """The newest durable version up to ``version`` that is not about to be deleted."""
        return max((one for one in self._durable if one <= version and self.stays(one)), default=None)

    def pin(self, version: int) -> None:
        """Keep the newest durable cut up to ``version``, and the oldest above it, which is to take its place one day."""
        newer = min((one for one in self._durable if one > version), default=None)
        self.pinned = frozenset(one for one in (self.newest_until(version), newer) if one is not None)

    def stays(self, version: int) -> bool:
        """Whether a durable cut is not about to be deleted by a commit whose answer is awaited."""
        return self._keeping is None or version in self._keeping

    def is_durable(self, version: int) -> bool:
        """Whether the cut of ``version`` is on disk."""
        return version in self._durable

    def given_up(self, version: int) -> str | None:
        """Why the cut of ``version`` will not become durable (``None``: it may)."""
        return self._given_up.get(version)

    @property
    def committing(self) -> int | None:
        """The cut whose commit was asked for and is not answered yet."""
        return self._committing

    @property
    def saving(self) -> bool:
        """Some cut is being written: by a block that took it, or by the first shard, which was asked to commit it."""
        return self._committing is not None or any(
            len(cut.files) < self._num_blocks and not self._settled(version) for version, cut in self._cuts.items()
        )

    def take(self, block: int, version: int) -> bool:
        """A block copied itself at ``version``; True when it was the last one to."""
        cut = self._cuts.setdefault(version, _Cut())
        if block in cut.taken or not 0 <= block < self._num_blocks:
            return False
        cut.taken.add(block)
        return len(cut.taken) == self._num_blocks

    def save(self, block: int, version: int, files: tuple[LayerFile, ...]) -> None:
        """A block's files are on disk."""
        if 0 <= block < self._num_blocks and not self._settled(version):
            self._cuts.setdefault(version, _Cut()).files.setdefault(block, files)

    def give_up(self, version: int, reason: str) -> bool:
        """The cut can't become durable; True when that is news."""
        if self._committing == version:
            self._committing = self._keeping = None
        if self._settled(version):
            return False
        self._given_up[version] = reason
        self._cuts.pop(version, None)
        return True

    def next_commit(self, until: int | None = None) -> tuple[int, tuple[LayerFile, ...], tuple[int, ...]] | None:
        """The cut to commit now, with its files and the versions to keep; one at a time, oldest first, none above ``until``.

        The newest durable one is always kept: if the first shard dies before its answer is here, that is the one to go on from.
        """
        if self._committing is not None:
            return None
        for version in sorted(self._cuts):
            if until is not None and version > until:
                return None
            cut = self._cuts[version]
            if len(cut.files) == self._num_blocks and not self._settled(version):
                self._committing = version
                files = sorted(
                    (one for part in cut.files.values() for one in part), key=lambda one: (one.layer, one.name)
                )
                keep = sorted({*self._durable[-1:], *self._kept_with(version)})
                self._keeping = frozenset(keep)
                return version, tuple(files), tuple(keep)
        return None

    def commit(self, version: int) -> bool:
        """The manifest of ``version`` is on disk; True when that is news, False when this ledger did not ask for it."""
        if version != self._committing:
            return False
        # What was pinned since the commit was asked for may be deleted already.
        kept = [one for one in self._kept_with(version) if self.stays(one)]
        self._committing = self._keeping = None
        self._durable = kept
        self._cuts = {other: cut for other, cut in self._cuts.items() if other > version}
        return True

    def _kept_with(self, version: int) -> tuple[int, ...]:
        every = sorted({*self._durable, version})
        return tuple(one for one in every if one in every[-self._keep :] or one in self.pinned)

    def _settled(self, version: int) -> bool:
        # A cut older than a durable one is never committed after it: it would be deleted as one of the oldest, or worse.
        return version <= max(self._durable, default=-1) or version < self._first_whole or version in self._given_up
