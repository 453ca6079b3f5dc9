"""Which lives a replay goes through, and where it can begin.

A pass that was under way at a cut has read weights from before it, which no cut holds. So a replay begins where nothing
was under way: at the initial weights, at a cut from which every layer began a life, or at a cut at which no ticket was
open on any layer (always so at window 1 and in synchronous mode).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import CorruptError, NotFoundError
from layerwise.log_header import name_of
from layerwise.log_reader import find_logs
from layerwise.replay.life_index import LifeIndex, Owners, index_life


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Begin with ``lives``, one for each block, at ``version``.

    ``inside``: not at their beginning but behind the cut.
    """

    version: int
    lives: tuple[LifeIndex, ...]
    inside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The lives of a job that have done something, oldest first."""

    job: str
    num_layers: int
    lives: tuple[LifeIndex, ...]

    def starts(self, saved: Iterable[int]) -> list[Start]:
        """Where a replay can begin, by version; ``saved`` are the versions of cuts that are on disk."""
        on_disk = set(saved)
        found: dict[int, Start] = {}
        for life in self.lives:
            # Every layer's first life from here on: if all begin at one version, nothing was under way between them.
            lives = self._first_lives(life.header.life)
            versions = {one.version for one in lives}
            covered = sum(one.header.stop - one.header.start for one in lives)
            whole = not any(one.trimmed for one in lives)
            if whole and len(versions) == 1 and covered == self.num_layers and (versions == {0} or versions <= on_disk):
                version = versions.pop()
                found.setdefault(version, Start(version=version, lives=lives))
        for start in self._inside(on_disk):
            found.setdefault(start.version, start)
        return [found[version] for version in sorted(found)]

    def joint(self, life: LifeIndex) -> tuple[LifeIndex, ...]:
        """The lives that the whole job began with ``life``, as after a resume; just ``life`` if it began alone.

        Two blocks that were restored at one version one after the other look the same.
        """
        lives = self._first_lives(life.header.life)
        numbers = sorted(one.header.life for one in lives)
        covered = sum(len(layers_of(one)) for one in lives)
        together = numbers == list(range(numbers[0], numbers[0] + len(lives))) or len(set(numbers)) == 1
        if together and covered == self.num_layers and len({one.version for one in lives}) == 1:
            return tuple(sorted(lives, key=lambda one: one.header.start))
        return (life,)

    def after(self, start: Start) -> tuple[LifeIndex, ...]:
        """The lives that follow those of ``start``, oldest first."""
        first = {life.folder: life for life in start.lives}
        by_layer = {layer: life.header.life for life in start.lives for layer in layers_of(life)}
        return tuple(
            life
            for life in self.lives
            if life.folder not in first and all(life.header.life > by_layer[layer] for layer in layers_of(life))
        )

    def _first_lives(self, life: int) -> tuple[LifeIndex, ...]:
        found: dict[int, LifeIndex] = {}
        for one in self.lives:
            if one.header.life >= life:
                for layer in layers_of(one):
                    found.setdefault(layer, one)
        return tuple({one.folder: one for one in found.values()}.values())

    def _inside(self, on_disk: set[int]) -> Iterable[Start]:
        for version in sorted(on_disk):
            lives: dict[int, LifeIndex] = {}
            for one in self.lives:
                for layer in layers_of(one):
                    if (layer, version) in one.quiet_cuts:
                        lives[layer] = one
            chosen = tuple({one.folder: one for one in lives.values()}.values())
            whole = all((layer, version) in one.quiet_cuts for one in chosen for layer in layers_of(one))
            if len(lives) == self.num_layers and whole and sum(map(len, map(layers_of, chosen))) == self.num_layers:
                yield Start(version=version, lives=chosen, inside=True)


def layers_of(life: LifeIndex) -> range:
    """The layers of its block."""
    return range(life.header.start, life.header.stop)


def read_history(directory: str | Path, owners: Owners) -> History:
    """Index every log of a job.

    Raises:
        NotFoundError: there is none.
        CorruptError: one can't be read, or they are of different jobs.
    """
    lives: list[LifeIndex] = []
    for folder in find_logs(directory):
        try:
            found = index_life(folder, owners)
        except NotFoundError:
            continue  # a crash came before the first line, so this life did nothing
        if found.complete:
            lives.append(found)
    if not lives:
        raise NotFoundError(
            f"no event logs in {Path(directory) / 'events'}: is this a job's directory, and has training begun?"
        )
    jobs = {(name_of(one.header.job), one.header.num_layers) for one in lives}
    if len(jobs) > 1:
        raise CorruptError(f"the event logs in {directory} are of different jobs: {sorted(jobs)}")
    newest = max(lives, key=lambda one: one.header.life).header
    return History(job=newest.job, num_layers=newest.num_layers, lives=tuple(lives))


def last_at(lives: Sequence[LifeIndex], layer: int, version: int) -> LifeIndex | None:
    """The newest of ``lives`` in which ``layer`` was at ``version``."""
    for one in reversed(lives):
        if layer in one.restored and one.restored[layer].version <= version <= one.last[layer]:
            return one
    return None


def begins_with(life: LifeIndex) -> set[tuple[int, int]]:
    """The layers of its block, and the version that each begins with."""
    return {(layer, event.version) for layer, event in life.restored.items()}


def choose_start(history: History, saved: Sequence[int], version: int | None) -> Start:
    """Where to begin: at ``version``, or by default at the newest place not after the oldest of the ``saved`` cuts.

    Where a single cut is saved, before it: there would be nothing to execute again.

    Raises:
        NotFoundError: there is no such place.
    """
    starts = [one for one in history.starts(saved) if _can_go_on(history, saved, one)]
    possible = ", ".join(str(one.version) for one in starts) or "none"
    if version is not None:
        for one in starts:
            if one.version == version:
                return one
        raise NotFoundError(
            f"the replay can't begin at version {version}: a pass that was under way there has read weights that no cut "
            f"holds, or the cut is not on disk, or the log was removed; possible are {possible}"
        )
    oldest = min(saved) if len(saved) > 1 else saved[0] - 1
    fitting = [one for one in starts if one.version <= oldest] or starts[:1]
    if not fitting:
        raise NotFoundError(
            f"the event logs of {history.job} do not reach back to where a replay can begin: the initial weights, a "
            f"saved cut from which a life began, or one at which nothing was under way"
        )
    return fitting[-1]


def _can_go_on(history: History, saved: Sequence[int], start: Start) -> bool:
    """Whether the logs of later lives are whole, and the cuts from which they begin will be there."""
    return all(
        not life.trimmed and (version >= start.version or version in saved)
        for life in history.after(start)
        for _, version in begins_with(life)
    )
