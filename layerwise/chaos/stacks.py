"""The stacks of every process of a cluster, for a run that hangs."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from layerwise.cluster import LocalCluster

STACK_SIGNAL = signal.SIGUSR1
"""Every service answers it with the stacks of its threads, on standard error."""
WRITE_SECONDS = 5.0
SETTLE_SECONDS = 0.2


def dump_stacks(cluster: LocalCluster) -> dict[str, str]:
    """Have every process write its stacks into its log; gives what each has written. Paused ones go on."""
    pids = dict(cluster.pids)
    before = {name: _size(cluster.logs / f"{name}.log") for name in pids}
    for name, pid in pids.items():
        cluster.unpause(name)
        try:
            os.kill(pid, STACK_SIGNAL)
        except ProcessLookupError:
            continue
    pause, waited = threading.Event(), 0.0
    sizes: dict[str, int] = {}
    while waited < WRITE_SECONDS:
        pause.wait(SETTLE_SECONDS)
        waited += SETTLE_SECONDS
        seen, sizes = sizes, {name: _size(cluster.logs / f"{name}.log") for name in pids}
        if sizes == seen and all(sizes[name] > before[name] for name in pids):
            break
    return {name: _text(cluster.logs / f"{name}.log", before[name]) for name in pids}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _text(path: Path, start: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", errors="replace")
