"""Fences: which life of a layer began at which version, so that nothing of an older life counts beyond that.

A shard that was paused and replaced may go on at any instruction, with a cut half written or a manifest ready to be
renamed. It can't be stopped, so what it still writes must not count. Before a shard's new life does anything it leaves
an empty file whose name says all there is to say::

    cuts/fences/life-7.layers-4-8.from-100     from version 100 on, layers 4 to 7 are in life 7 or a later one

A layer's file of life L in a cut of version v counts unless some life above L of that layer begins below v: the history
of a layer is a line of lives, each from its beginning to the beginning of the next. Nobody compares clocks, and it does
not matter when the late one wakes up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layerwise import disk
from layerwise.errors import WrongLifeError

_NAME = re.compile(r"life-(\d+)\.layers-(\d+)-(\d+)\.from-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Layers ``[start, stop)`` are in ``life`` (or a later one) from ``version`` on."""

    life: int
    start: int
    stop: int
    version: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"life-{self.life}.layers-{self.start}-{self.stop}.from-{self.version}"

    def shuts_out(self, layer: int, life: int, version: int) -> bool:
        """Whether what ``life`` of ``layer`` has at ``version`` does not count any more."""
        return self.start <= layer < self.stop and life < self.life and version > self.version


def raise_fence(directory: str | Path, fence: Fence) -> None:
    """Let ``fence`` count, durably, before anything of its life does.

    Raises:
        WrongLifeError: a later life of one of its layers has begun.
        OSError: the disk refused.
    """
    for other in fences_in(directory):
        if other.life > fence.life and other.start < fence.stop and fence.start < other.stop:
            raise WrongLifeError(
                f"life {fence.life} of layers {fence.start} to {fence.stop - 1} can't begin: life {other.life} of "
                f"layers {other.start} to {other.stop - 1} has begun at version {other.version}"
            )
    path = _folder(directory) / fence.name
    disk.make_folder(path.parent, "fence")
    if not path.exists():
        disk.create_empty(path, "fence")
    disk.sync_folder(path.parent, "fence")


def fences_in(directory: str | Path) -> tuple[Fence, ...]:
    """The fences of the job in ``directory``, by life."""
    folder = _folder(directory)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            life, start, stop, version = map(int, match.groups())
            found.append(Fence(life=life, start=start, stop=stop, version=version))
    return tuple(sorted(found, key=lambda one: (one.life, one.start)))


def shut_out(fences: Iterable[Fence], layers: Iterable[tuple[int, int]], version: int) -> str:
    """Why a cut of ``version`` made of these (layer, life) does not count; empty when it does."""
    above = [fence for fence in fences if fence.version < version]
    for layer, life in layers if above else ():
        for fence in above:
            if fence.shuts_out(layer, life, version):
                return f"layer {layer} of life {life} was replaced by life {fence.life} from version {fence.version} on"
    return ""


def _folder(directory: str | Path) -> Path:
    return Path(directory) / "cuts" / "fences"
