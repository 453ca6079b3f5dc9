"""A simulated disk that all nodes see: cuts are written slowly, sometimes not at all, and exist once their manifest is there.

A process that is killed while it writes leaves some of its files; a file may be damaged later, which is found when it is read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any

from layerwise.errors import CorruptError
from layerwise.messages import LayerFile
from tests.simulation.counting_block import LayerCopy


class Disk:
    """``delay`` is the mean time of a write in seconds, ``failure`` the probability that one fails.

    ``damage`` is the probability that one file of a cut can't be read back.
    """

    def __init__(self, rng: random.Random, *, delay: float = 0.005, failure: float = 0.0, damage: float = 0.0) -> None:
        self._rng = rng
        self._delay = delay
        self._failure = failure
        self._damage = damage
        self._damaged: set[tuple[str, int, int, int]] = set()
        self._files: dict[tuple[str, int, int, int], LayerCopy] = {}
        self._manifests: dict[tuple[str, int], dict[int, int]] = {}
        self._texts: dict[tuple[str, int], str] = {}
        self._fences: list[tuple[str, int, int, int]] = []

    def seconds(self) -> float:
        """How long the next write takes."""
        return self._rng.expovariate(1 / self._delay)

    def versions(self, directory: str) -> list[int]:
        """The cuts that exist."""
        return sorted(
            version
            for (folder, version), lives in self._manifests.items()
            if folder == directory and not self._shut_out(directory, version, lives)
        )

    def begin_life(self, directory: str, version: int, life: int, layers: Iterable[int]) -> None:
        """From ``version`` on nothing counts of older lives of these layers."""
        self._fences += [(directory, layer, life, version) for layer in layers]

    def _shut_out(self, directory: str, version: int, lives: Mapping[int, int]) -> bool:
        fences = [fence for fence in self._fences if fence[0] == directory and fence[3] < version]
        return any(lives[layer] < life for _, layer, life, _ in fences if layer in lives)

    def cuts(self, directory: str) -> dict[int, list[tuple[int, int]]]:
        """By version the layers of each cut, with the lives that saved them."""
        return {version: sorted(self._manifests[directory, version].items()) for version in self.versions(directory)}

    def save(self, directory: str, version: int, life: int, copies: dict[int, LayerCopy]) -> str:
        """Write a block's layers; the answer is why not, or empty."""
        if self._rng.random() < self._failure:
            return "no space left on the simulated disk"
        for layer, copy in copies.items():
            self._files[directory, version, life, layer] = copy
        return ""

    def tear(self, directory: str, version: int, life: int, copies: dict[int, LayerCopy]) -> None:
        """The process ended in the middle of `save`: some files are there, none of which was told of."""
        for layer, copy in copies.items():
            if self._rng.random() < 0.5:
                self._files[directory, version, life, layer] = copy

    def manifest(self, directory: str, version: int) -> dict[str, Any]:
        """What the manifest of a cut says."""
        said: dict[str, Any] = json.loads(self._texts[directory, version])
        return said

    def commit(self, directory: str, version: int, text: str, files: Iterable[LayerFile], keep: Iterable[int]) -> str:
        """Write ``text``, the manifest, and delete what is not kept."""
        if self._rng.random() < self._failure:
            return "no space left on the simulated disk"
        lives = {file.layer: file.life for file in files}
        if self._shut_out(directory, version, lives):
            return "a life in it was replaced"
        for layer, life in lives.items():
            assert (directory, version, life, layer) in self._files, (
                f"version {version} is committed without layer {layer}"
            )
        self._manifests[directory, version] = lives
        self._texts[directory, version] = text
        if self._damage and self._rng.random() < self._damage:
            layer = self._rng.choice(sorted(lives))
            self._damaged.add((directory, version, lives[layer], layer))
        kept = {version, *keep}
        for other in [one for folder, one in self._manifests if folder == directory and one < min(kept)]:
            del self._manifests[directory, other]
        return ""

    def load(self, directory: str, version: int, layers: Iterable[int]) -> dict[int, LayerCopy]:
        """Read layers of a cut that is thought to exist; ``CorruptError`` when it does not, or a file is damaged."""
        lives = self._manifests.get((directory, version), {})
        assert lives, f"version {version} was chosen, and is not there"
        assert not self._shut_out(directory, version, lives), f"version {version} was chosen, and a life in it replaced"
        layers = list(layers)
        for layer in layers:
            if (directory, version, lives[layer], layer) in self._damaged:
                raise CorruptError(f"the file of layer {layer} in the cut at version {version} is damaged")
        return {layer: self._files[directory, version, lives[layer], layer] for layer in layers}
