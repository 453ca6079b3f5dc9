"""A simulated disk that all nodes see: cuts are written slowly, sometimes not at all, and exist once their manifest is there."""

from __future__ import annotations

import random
from collections.abc import Iterable

from layerwise.messages import LayerFile
from tests.simulation.counting_block import LayerCopy


class Disk:
    """``delay`` is the mean time of a write in seconds, ``failure`` the probability that one fails."""

    def __init__(self, rng: random.Random, *, delay: float = 0.005, failure: float = 0.0) -> None:
        self._rng = rng
        self._delay = delay
        self._failure = failure
        self._files: dict[tuple[str, int, int, int], LayerCopy] = {}
        self._manifests: dict[tuple[str, int], dict[int, int]] = {}

    def seconds(self) -> float:
        """How long the next write takes."""
        return self._rng.expovariate(1 / self._delay)

    def versions(self, directory: str) -> list[int]:
        """The cuts that exist."""
        return sorted(version for folder, version in self._manifests if folder == directory)

    def save(self, directory: str, version: int, life: int, copies: dict[int, LayerCopy]) -> str:
        """Write a block's layers; the answer is why not, or empty."""
        if self._rng.random() < self._failure:
            return "no space left on the simulated disk"
        for layer, copy in copies.items():
            self._files[directory, version, life, layer] = copy
        return ""

    def commit(self, directory: str, version: int, files: Iterable[LayerFile], keep: Iterable[int]) -> str:
        """Write the manifest, delete what is not kept."""
        if self._rng.random() < self._failure:
            return "no space left on the simulated disk"
        lives = {file.layer: file.life for file in files}
        for layer, life in lives.items():
            assert (directory, version, life, layer) in self._files, (
                f"version {version} is committed without layer {layer}"
            )
        self._manifests[directory, version] = lives
        kept = {version, *keep}
        for other in self.versions(directory):
            if other not in kept:
                del self._manifests[directory, other]
        return ""

    def load(self, directory: str, version: int, layers: Iterable[int]) -> dict[int, LayerCopy]:
        """Read layers of a cut that exists."""
        lives = self._manifests[directory, version]
        return {layer: self._files[directory, version, lives[layer], layer] for layer in layers}
