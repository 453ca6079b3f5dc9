"""Processes that keep accounts of their processor time: what `benchmarks.cpu` looks at. Python imports this at start where its folder is on the path.

Nothing of layerwise knows of it: functions are exchanged from outside when their module is loaded. On SIGUSR2 a process
writes what it has used into ``$ACCOUNTS_FOLDER/<process id>.json``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from accounts import snapshot, timed, timed_coroutine  # type: ignore[import-not-found]

FUNCTIONS = {
    "layerwise.layer_compute": {"LayerCompute._call": "forward", "LayerCompute.gradients": "backward"},
    "layerwise.block": {"run_head": "loss", "loss_gradients": "loss backward"},
    "layerwise.head": {"JobHead.metrics": "metrics"},
    "layerwise.gradient_sum": {"GradientSum.add": "gradient sums", "GradientSum.mean": "gradient sums"},
    "layerwise.layer": {
        "_laid_out": "gradient sums",
        "TrainedLayer._step": "optimizer step",
        "state_hash": "hashes",
        "TrainedLayer._copy": "cut copies",
    },
    "layerwise.event_log": {f"EventLog.{name}": "event log" for name in ("append", "flush", "sync")},
    "layerwise.proto.frames": {"FrameWriter.next_frame": "encode", "FrameReader.read": "decode"},
    "layerwise.transport": {"encode_message": "encode", "Transport.send": "links", "Transport._take": "links"},
    "layerwise.service": {"Service.guard": "role"},
    "layerwise.server.coordinator": {
        **{f"Coordinator.{name}": "role" for name in ("_on_message", "_on_lost", "_perform")},
        **{f"Coordinator.{name}": "clients' questions" for name in ("job", "jobs", "nodes")},
    },
}
COROUTINES = {
    "layerwise.streams": [f"{kind}.{name}" for kind in ("DialedStream", "AcceptedStream") for name in ("read", "write")]
}
"""Whose steps are gRPC's."""


def _exchange(module: ModuleType) -> None:
    for path, part in FUNCTIONS.get(module.__name__, {}).items():
        _wrap(module, path, part, timed)
    for path in COROUTINES.get(module.__name__, []):
        _wrap(module, path, "gRPC", timed_coroutine)


def _wrap(module: ModuleType, path: str, part: str, wrap: Any) -> None:
    """An `AttributeError` ends the process: accounts in which a part is missing would look very good."""
    *outer, name = path.split(".")
    holder: Any = module
    for one in outer:
        holder = getattr(holder, one)
    setattr(holder, name, wrap(part, getattr(holder, name)))


class _Handle:
    """What the event loop calls: gRPC's own callbacks and tasks are told from ours by where their code comes from."""

    def __init__(self) -> None:
        self._runs = {part: timed(part, asyncio.Handle._run) for part in ("gRPC", "tasks")}

    def run(self, handle: asyncio.Handle) -> None:
        callback: Any = handle._callback
        owner = getattr(callback, "__self__", None)
        what = owner.get_coro() if isinstance(owner, asyncio.Task) else callback
        code = f"{type(what).__module__} {type(what).__name__} {getattr(what, '__module__', '')}"
        self._runs["gRPC" if "cython" in code or "grpc" in code else "tasks"](handle)


class _AfterLoading(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _exchange(module)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._left = {*FUNCTIONS, *COROUTINES}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._left:
            return None
        self._left.remove(name)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterLoading(spec.loader)
        return spec


def _write(*_: object) -> None:
    path = Path(os.environ["ACCOUNTS_FOLDER"]) / f"{os.getpid()}.json"
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(snapshot()), encoding="utf-8")
    aside.rename(path)


if "ACCOUNTS_FOLDER" in os.environ:
    handles = _Handle()
    asyncio.Handle._run = lambda self: handles.run(self)  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR2, _write)
    sys.meta_path.insert(0, _Finder())
