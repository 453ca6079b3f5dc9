"""Shards without event log and hashes: what `benchmarks.guarantees` compares with. Python imports this at start where its folder is on the path.

Nothing of layerwise knows of it: the classes are exchanged from outside once ``layerwise.build`` is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TARGET = "layerwise.build"
NO_HASH = "0" * 32


class NoEventLog:
    """Takes records and forgets them."""

    num_bytes = 0
    shortage = ""
    full = False

    def __init__(self, *arguments: Any) -> None:
        pass

    def append(self, event: object) -> None:
        """Forget it."""

    def flush(self) -> None:
        """Nothing to do."""

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def _take_out(build: Any) -> None:
    from layerwise import layer

    build.EventLog = NoEventLog
    layer.state_hash = lambda *tensors: NO_HASH


class _AfterLoading(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _take_out(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterLoading(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
