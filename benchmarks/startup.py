"""Start-up: from nothing to the first update of ``examples/digits.yaml``, phase by phase; and the memory of each role after start.

python -m benchmarks startup [--repeats N]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import spread, table, write_section
from benchmarks.runs import DIGITS
from layerwise.cluster import LocalCluster
from layerwise.overrides import read_job

PHASES = ("command line loaded", "coordinator answers", "measuring", "assigning", "training begins", "first update")
CAUSES = """
The command line imports neither torch nor gRPC's server. Between "coordinator answers" and "measuring" every process imports torch (about a second
of processor time each, on two cores). "measuring" to "assigning" is the probe: the model is built and run a few times. "assigning" to "training
begins" builds the blocks and loads the data in the forward worker.
"""


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks startup")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    memory: dict[str, list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for phase, value in _one(Path(folder)).items():
                seconds[phase].append(value)
            _remember(Path(folder), memory)
    rows = [[phase, spread(found, 2)] for phase, found in seconds.items()]
    text = table(["reached after", "seconds"], rows) + "\n" + CAUSES + "\n"
    text += table(
        ["role", "resident memory"],
        [[role, f"{statistics.median(found):.0f} MB"] for role, found in sorted(memory.items())],
    )
    write_section("Start-up and memory", f"python -m benchmarks startup --repeats {repeats}", text)


def _one(folder: Path) -> dict[str, float]:
    began = time.time()
    subprocess.run([sys.executable, "-m", "layerwise", "train", "--help"], check=True, capture_output=True)
    reached = {"command line loaded": time.time() - began}
    job = read_job(DIGITS, ["train.steps=400", f"checkpoint.path={folder}/run"])
    loaded = time.time()
    with LocalCluster(shards=2, forward=1) as cluster, cluster.client() as client:
        reached["coordinator answers"] = reached["command line loaded"] + time.time() - loaded
        name = str(client.submit(job.to_json())["job"])
        for event in client.follow_events(name):
            for phase in ("measuring", "assigning", "training begins"):
                if event.message.startswith(phase):
                    reached[phase] = reached["command line loaded"] + event.time - loaded
            if "training begins" in reached:
                break
        while client.get_job(name)["steps"] < 1:
            time.sleep(0.01)
        reached["first update"] = reached["command line loaded"] + time.time() - loaded
    return reached


def _remember(folder: Path, memory: dict[str, list[float]]) -> None:
    """What each role takes at the end of a short job, one with a backward worker of its own."""
    job = read_job(DIGITS, ["train.steps=100", "cluster.backward.detached=1", f"checkpoint.path={folder}/memory"])
    with LocalCluster(shards=2, forward=1, backward=1) as cluster, cluster.client() as client:
        name = str(client.submit(job.to_json())["job"])
        while client.get_job(name)["state"] != "done":
            time.sleep(0.05)
        for node in client.list_nodes():
            memory.setdefault(str(node["role"]), []).append(node["resident_bytes"] / 1e6)
