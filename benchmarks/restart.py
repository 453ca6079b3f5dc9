"""How long a killed process is missed: from SIGKILL until its successor has presented itself to the coordinator; the spare's cost.

python -m benchmarks restart [--repeats N]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import spread, table, write_section
from layerwise.cluster import LocalCluster
from layerwise.errors import RetryableError

ROLES = ("shard-0", "forward-0", "backward-0")
SECONDS = 60.0
STEADY_SECONDS = 10.5
"""Between kills: a process that dies sooner after its start counts as one that can't run."""


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks restart")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    load = os.getloadavg()[0]
    seconds: dict[tuple[str, bool], list[float]] = {}
    ready: list[float] = []
    resident: list[float] = []
    private: list[float] = []
    with LocalCluster(shards=1, forward=1, backward=1, restart=True) as cluster:
        cluster.wait_for_nodes()
        for spare in (False, True):
            for _ in range(repeats):
                for name in ROLES:
                    if spare:
                        asked = time.monotonic()
                        cluster.keep_spare()
                        pid = cluster.wait_for_spare(SECONDS)
                        ready.append(time.monotonic() - asked)
                        resident.append(_megabytes(pid, "Rss"))
                        private.append(_megabytes(pid, "Private_Dirty"))
                    seconds.setdefault((name, spare), []).append(_kill(cluster, name))
                time.sleep(STEADY_SECONDS)
        coordinator = []
        for _ in range(repeats):
            coordinator.append(_kill(cluster, "coordinator"))
            time.sleep(STEADY_SECONDS)
    rows = [[name.partition("-")[0], spread(seconds[name, False], 2), spread(seconds[name, True], 3)] for name in ROLES]
    rows.append(["coordinator, to its first answer", spread(coordinator, 2), "-"])
    text = table(["killed", "seconds without a spare", "seconds with a spare"], rows)
    text += f"""

The cluster had nothing else to do; the machine's load average was {load:.1f} at the start. A new spare is ready
{statistics.median(ready):.1f} s after the one before was used; it holds {statistics.median(resident):.0f} MB of memory, {statistics.median(private):.0f} MB
of them its own (the rest is files that all processes share).
"""
    write_section("Restarting a process", f"python -m benchmarks restart --repeats {repeats}", text)


def _kill(cluster: LocalCluster, name: str) -> float:
    """Kill ``name``; seconds until the coordinator knows its successor, or answers again itself."""
    pid = cluster.pids[name]
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with cluster.client() as client:
        if name == "coordinator":
            cluster.wait_for_restart(name, pid)
        while time.monotonic() < began + SECONDS:
            try:
                nodes = client.list_nodes()
            except RetryableError:
                continue
            if name == "coordinator" or any(node["name"] == name and node["pid"] != pid for node in nodes):
                return time.monotonic() - began
            time.sleep(0.002)
    raise SystemExit(f"{name} did not come back; its log: {cluster.log_of(name)}")


def _megabytes(pid: int, key: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1e3
    raise SystemExit(f"no memory figure for process {pid}")
