"""A block's cuts in memory: gathered layer by layer, saved, kept for evaluation, let go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from layerwise.errors import NotFoundError
from layerwise.layer import LayerCopy
from layerwise.messages import LayerFile


class CutEvents(Protocol):
    """Who is told about cuts.

    Called from slot threads (under a layer's lock) and from the writer's: only note it, and return.
    """

    def cut_taken(self, version: int) -> None:
        """All layers of the block are copied at ``version``."""
        ...

    def cut_saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        """The block's files of the cut are durable; or, with ``error``, they are not."""
        ...


Save = Callable[[int, tuple[LayerCopy, ...], Callable[[tuple[LayerFile, ...], str], None]], None]
"""``save(version, copies, done)`` begins to save and returns; ``done(files, error)`` is called when that has ended."""


class CutShelf:
    """The copies of one block's layers by version. Any thread may call.

    A copy leaves when it is saved (or failed to be), not held, and older than the newest cut or released.
    """

    def __init__(self, num_layers: int, events: CutEvents, save: Save | None) -> None:
        """``save`` ``None``: cuts stay in memory only, and count as saved without files."""
        self._num_layers = num_layers
        self._events = events
        self._save = save
        self._lock = threading.Lock()
        self._copies: dict[int, dict[int, LayerCopy]] = {}
        self._unsaved: set[int] = set()
        self._held: set[int] = set()
        self._released = -1

    def put(self, copy: LayerCopy) -> None:
        """One layer's copy; the last one completes the cut."""
        version = copy.state.version
        with self._lock:
            layers = self._copies.setdefault(version, {})
            layers[copy.layer] = copy
            if len(layers) < self._num_layers:
                return
            copies = tuple(layers[index] for index in sorted(layers))
            self._unsaved.add(version)
            self._sweep()
        self._events.cut_taken(version)
        if self._save is None:
            self._saved(version, (), "")
        else:
            self._save(version, copies, lambda files, error: self._saved(version, files, error))

    def restore(self, copies: Sequence[LayerCopy]) -> None:
        """The block begins with these: they are on disk, and stay here until `release`, for evaluation. No event follows."""
        with self._lock:
            for copy in copies:
                self._copies.setdefault(copy.state.version, {})[copy.layer] = copy
                self._held.add(copy.state.version)

    def get(self, version: int) -> tuple[LayerCopy, ...]:
        """The copies of all layers, lowest first; ``NotFoundError`` when the cut is not held."""
        with self._lock:
            layers = self._copies.get(version, {})
            if len(layers) < self._num_layers:
                held = [one for one, layers in sorted(self._copies.items()) if len(layers) == self._num_layers]
                raise NotFoundError(f"no cut of version {version} is in memory here; there are {held or 'none'}")
            return tuple(layers[index] for index in sorted(layers))

    def hold(self, version: int) -> None:
        """Keep the cut of ``version`` until `release`."""
        with self._lock:
            if version > self._released:
                self._held.add(version)

    def release(self, version: int) -> None:
        """Cuts up to ``version`` may go once they are saved."""
        with self._lock:
            self._released = max(self._released, version)
            self._held = {one for one in self._held if one > version}
            self._sweep()

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters and moments held."""
        with self._lock:
            return sum(
                tensor.numel() * tensor.element_size()
                for layers in self._copies.values()
                for copy in layers.values()
                for tensor in (*copy.parameters.values(), *copy.moments.values())
            )

    def _saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        with self._lock:
            self._unsaved.discard(version)
            self._sweep()
        self._events.cut_saved(version, files, error)

    def _sweep(self) -> None:
        complete = [version for version, layers in self._copies.items() if len(layers) == self._num_layers]
        newest = max(complete, default=-1)
        for version in complete:
            wanted = version in self._held or (version == newest and version > self._released)
            if version not in self._unsaved and not wanted:
                del self._copies[version]
