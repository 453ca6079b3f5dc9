"""Soaks: ten minutes with a random kill every 15 seconds, and ten calm ones in which no memory may grow."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.chaos_standing import MARK, ROLES, standing_job
from benchmarks.open_files import OpenFiles, listening_sockets
from benchmarks.report import table, write_section
from layerwise.chaos.log_facts import read_log_facts
from layerwise.job_audit import audit_job

SAMPLE_SECONDS = 1.0


def with_kills(command: str, seconds: float, every: float, roles: Sequence[str] = ROLES) -> None:
    """Kill a random process of a random role every so often; count samples, sockets and open files, and what is left afterwards."""
    rng = random.Random("soak")
    before = _resources()
    folder = Path(tempfile.mkdtemp(prefix="layerwise-soak-"))
    killed = []
    files = OpenFiles()
    with standing_job(folder) as standing:
        standing.wait_for_version(10)
        end, following = time.monotonic() + seconds, time.monotonic() + every
        socket_folder = Path(standing.cluster.coordinator_address.removeprefix("unix:")).parent
        listening = len(listening_sockets(socket_folder))
        while (now := time.monotonic()) < end:
            files.sample(standing.cluster.pids, now)
            if now >= following:
                killed.append(standing.kill(rng.choice(roles), rng))
                following += every
            standing.look_until(min(now + SAMPLE_SECONDS, following, end))
        standing.wait_for_version(standing.tail.lowest_version + 1)
        standing.wait_for_everybody()
        listening_at_end = len(listening_sockets(socket_folder))
        outcomes = standing.watch.outcomes(standing.tail.layers)
        document = standing.stop()
    audit = audit_job(standing.directory, document)
    facts = read_log_facts(standing.directory)
    ledger = document["ledger"]
    rows = [
        ["seconds", f"{seconds:.0f}"],
        [
            "processes killed",
            f"{len(killed)} ({', '.join(f'{sum(one.startswith(role) for one in killed)} {role}' for role in ROLES)})",
        ],
        ["updates of every layer", f"{document['steps']}"],
        ["samples leased", f"{ledger['samples_leased']}"],
        ["samples applied on every layer", f"{ledger['samples_applied']}"],
        ["samples dropped", f"{ledger['samples_dropped']}"],
        ["lost", f"{ledger['samples_leased'] - ledger['samples_applied'] - ledger['samples_dropped']}"],
        ["doubled (audit: exactly once)", f"{audit.check('exactly-once').num_failures}"],
        ["audit", "clean" if audit.passed else "; ".join(audit.lines())],
        ["new lives of blocks", f"{len(facts.rewinds)}"],
        ["longest rewind", f"{facts.rewind_updates} updates"],
        ["samples redone", f"{facts.samples_redone}"],
        ["longest stall after a kill", _longest([one.stall_seconds for one in outcomes])],
        ["sockets listened on, begin and end", f"{listening}, {listening_at_end}"],
        *([f"files open in a {role}, begin and end", _change(files, role, seconds)] for role in ROLES),
        *([what, found] for what, found in _leaks(before, socket_folder).items()),
    ]
    write_section("Chaos: soak with kills", command, table(["", ""], rows))
    shutil.rmtree(folder)


def for_memory(command: str, seconds: float) -> None:
    """The same job without faults: resident memory and open files of each process in its first and last minute."""
    files = OpenFiles()
    folder = Path(tempfile.mkdtemp(prefix="layerwise-soak-"))
    samples: dict[str, list[tuple[float, float]]] = {}
    with standing_job(folder) as standing:
        standing.wait_for_version(50)  # the first updates fill caches
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            files.sample(standing.cluster.pids, now)
            for name, pid in standing.cluster.pids.items():
                samples.setdefault(name, []).append((now - began, psutil.Process(pid).memory_info().rss / 1e6))
            standing.look_until(now + SAMPLE_SECONDS)
        standing.stop()
    minute = min(60.0, seconds / 4)
    rows = []
    for name, found in samples.items():
        first = statistics.mean(size for at, size in found if at < minute)
        last = statistics.mean(size for at, size in found if at > seconds - minute)
        rows.append([name, f"{first:.1f} MB", f"{last:.1f} MB", f"{100 * (last / first - 1):+.1f} %"])
    text = table(["process", "first minute", "last minute", "change"], rows)
    text += "\n\nFiles open in the process of a role with most, in the first and the last minute: "
    text += "; ".join(f"{role} {_change(files, role, seconds)}" for role in ROLES) + "."
    write_section("Chaos: memory of a calm soak", command, f"{seconds:.0f} s of training without faults.\n\n{text}")
    shutil.rmtree(folder)


def _resources() -> dict[str, set[str]]:
    shared = Path("/dev/shm")
    return {
        "files open in the parent": set(os.listdir("/proc/self/fd")),
        "threads in the parent": {thread.name for thread in threading.enumerate()},
        "shared-memory segments": {path.name for path in shared.iterdir()} if shared.is_dir() else set(),
    }


def _leaks(before: dict[str, set[str]], socket_folder: Path) -> dict[str, str]:
    """What is there that was not, after the cluster has ended."""
    found = {f"leaked {what}": str(len(after - before[what])) for what, after in _resources().items()}
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(os.getpid()):
                left.append(process.pid)
        except psutil.Error:
            continue  # ended meanwhile, or somebody else's
    sockets = len(listening_sockets(socket_folder))
    return {"leaked processes": str(len(left)), "leaked sockets that are listened on": str(sockets), **found}


def _change(files: OpenFiles, role: str, seconds: float) -> str:
    first, last = files.change(role, min(60.0, seconds / 4))
    return f"{first}, {last}"


def _longest(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{max(found):.2f} s (median {statistics.median(found):.2f} s)" if found else "-"
