"""Soaks: ten minutes with a random kill every 15 seconds, and ten calm ones in which no memory may grow."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import table, write_section
from layerwise.chaos.faults import process_named
from layerwise.chaos.log_facts import read_log_facts
from layerwise.chaos.log_tail import LogTail
from layerwise.chaos.recovery import RecoveryWatch
from layerwise.chaos.status_watch import StatusWatch
from layerwise.cluster import LocalCluster
from layerwise.errors import RetryableError
from layerwise.job import JobSpec
from layerwise.job_audit import audit_job
from layerwise.overrides import read_job

MARK = "LAYERWISE_SOAK"
POLL_SECONDS = 0.02
ROLES = ("shard", "forward", "backward", "coordinator")


def long_job(directory: Path) -> JobSpec:
    """A job that never comes to its end by itself: a network whose updates take long enough to be counted."""
    return read_job(
        {
            "name": "soak",
            "model": {"name": "cnn", "channels": [32, 64, 64]},
            "data": {"name": "digits", "batch": 64},
            "train": {
                "steps": 1_000_000,
                "seed": 1,
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "schedule": {"name": "constant"},
            },
            "cluster": {"shards": 2, "forward": 2, "backward": {"attached": True, "detached": 2}},
            "checkpoint": {"every": 25, "path": str(directory)},
            "timeouts": {"heartbeat": 3.0, "task": 5.0, "lease": 10.0},
        }
    )


@dataclass
class Standing:
    """A long job on a cluster, looked at."""

    cluster: LocalCluster
    status: StatusWatch
    tail: LogTail
    watch: RecoveryWatch
    directory: Path
    job: str
    problems: list[str] = field(default_factory=list)

    def look(self) -> float:
        """Poll once; gives the time."""
        over = self.status.wait(POLL_SECONDS)
        now = time.monotonic()
        if over:
            raise SystemExit(f"the job has ended: {self.status.document.get('message')}")
        self.tail.poll(now)
        self.watch.observe(self.tail.layers, self.tail.lowest_version, now)
        return now

    def look_until(self, moment: float) -> None:
        """Poll up to that time."""
        while self.look() < moment:
            pass

    def wait_for_version(self, version: int, seconds: float = 120.0) -> None:
        """Poll until all layers have reached it."""
        limit = time.monotonic() + seconds
        while self.tail.lowest_version < version:
            if self.look() > limit:
                raise SystemExit(f"version {version} was not reached in {seconds:.0f} s")

    def wait_for_everybody(self, seconds: float = 120.0) -> None:
        """Poll until every process has presented itself and a spare is ready; who stopped looking meanwhile would falsify the times."""
        limit = time.monotonic() + seconds
        with self.cluster.client() as client:
            while True:
                try:
                    here = {node["name"] for node in client.list_nodes()} | {"coordinator"}
                except RetryableError:
                    here = set()
                if here >= set(self.cluster.names) and self.cluster.spare_pid is not None:
                    return
                self.look_until(time.monotonic() + 0.2)
                if time.monotonic() > limit:
                    missing = sorted(set(self.cluster.names) - here)
                    raise SystemExit(f"not everybody is there after {seconds:.0f} s; missing: {missing or 'the spare'}")

    def kill(self, role: str, rng: random.Random) -> str:
        """Kill a process of this role that works for the job; gives its name."""
        document = self.status.document
        targets = [role] if role == "coordinator" else [f"{role}:{index}" for index in range(2)]
        name = process_named(rng.choice(targets), document)
        while name is None or name not in self.cluster.pids:
            self.look()
            name = process_named(rng.choice(targets), self.status.document)
        self.cluster.kill(name)
        now = time.monotonic()
        self.tail.poll(now)
        self.watch.begin(
            fault=f"kill {name}",
            kind=role,
            process=name,
            version=self.tail.lowest_version,
            layers=self.tail.layers,
            now=now,
        )
        return name

    def stop(self) -> dict[str, Any]:
        """Have the job stop at its next update; gives its last document."""
        self.cluster.wait_for_nodes()
        with self.cluster.client() as client:
            client.cancel(self.job)
        limit = time.monotonic() + 60.0
        while not self.status.wait(POLL_SECONDS):
            self.tail.poll(time.monotonic())
            if time.monotonic() > limit:
                raise SystemExit(f"the job does not stop: {self.status.document.get('message')}")
        return self.status.document


@contextmanager
def standing_job(folder: Path, *, restart: bool = True) -> Iterator[Standing]:
    """The long job on a cluster of two processes of each role with a warm spare."""
    with (
        LocalCluster(
            shards=2,
            forward=2,
            backward=2,
            directory=folder / "cluster",
            threads=1,
            serve_metrics=False,
            restart=restart,
            spare=True,
            environment={MARK: str(os.getpid())},
        ) as cluster,
        cluster.client() as client,
    ):
        cluster.wait_for_nodes()
        cluster.wait_for_spare()
        submitted = client.submit(long_job(folder / "run").to_json())
        job, directory = str(submitted["job"]), Path(str(submitted["directory"]))
        with StatusWatch(cluster.coordinator_address, job) as status:
            tail = LogTail(directory)
            try:
                yield Standing(cluster, status, tail, RecoveryWatch(time.monotonic()), directory, job)
            finally:
                tail.close()


def with_kills(command: str, seconds: float, every: float, roles: Sequence[str] = ROLES) -> None:
    """Kill a random process of a random role every so often; count samples and leaks afterwards."""
    rng = random.Random("soak")
    before = _resources()
    folder = Path(tempfile.mkdtemp(prefix="layerwise-soak-"))
    killed = []
    with standing_job(folder) as standing:
        standing.wait_for_version(10)
        end, following = time.monotonic() + seconds, time.monotonic() + every
        while following < end:
            standing.look_until(following)
            killed.append(standing.kill(rng.choice(roles), rng))
            following += every
        standing.look_until(end)
        version = standing.tail.lowest_version
        standing.wait_for_version(version + 1)
        outcomes = standing.watch.outcomes(standing.tail.layers)
        document = standing.stop()
        socket_folder = Path(standing.cluster.coordinator_address.removeprefix("unix:")).parent
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
        *([what, found] for what, found in _leaks(before, socket_folder).items()),
    ]
    write_section("Chaos: soak with kills", command, table(["", ""], rows))
    shutil.rmtree(folder)


def for_memory(command: str, seconds: float) -> None:
    """The same job without faults: resident memory of each role in its first and last minute."""
    folder = Path(tempfile.mkdtemp(prefix="layerwise-soak-"))
    samples: dict[str, list[tuple[float, float]]] = {}
    with standing_job(folder) as standing:
        standing.wait_for_version(50)  # the first updates fill caches
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            for name, pid in standing.cluster.pids.items():
                samples.setdefault(name, []).append((now - began, psutil.Process(pid).memory_info().rss / 1e6))
            standing.look_until(now + 1.0)
        standing.stop()
    minute = min(60.0, seconds / 4)
    rows = []
    for name, found in samples.items():
        first = statistics.mean(size for at, size in found if at < minute)
        last = statistics.mean(size for at, size in found if at > seconds - minute)
        rows.append([name, f"{first:.1f} MB", f"{last:.1f} MB", f"{100 * (last / first - 1):+.1f} %"])
    text = table(["process", "first minute", "last minute", "change"], rows)
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
    return {"leaked processes": str(len(left)), "leaked sockets": str(int(socket_folder.exists())), **found}


def _longest(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{max(found):.2f} s (median {statistics.median(found):.2f} s)" if found else "-"
