"""A long job on a standing cluster, for what is done to it over and over: looked at all the time, with a limit on everything."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from layerwise.chaos.faults import process_named
from layerwise.chaos.log_tail import LogTail
from layerwise.chaos.recovery import RecoveryWatch
from layerwise.chaos.stacks import dump_stacks
from layerwise.chaos.status_watch import StatusWatch
from layerwise.chaos.watchdog import Stand, Watchdog, silent_seconds, waiting_seconds
from layerwise.client import CoordinatorClient
from layerwise.cluster import LocalCluster
from layerwise.errors import RetryableError
from layerwise.ids import COORDINATOR
from layerwise.job import JobSpec
from layerwise.overrides import read_job

MARK = "LAYERWISE_SOAK"
POLL_SECONDS = 0.01
ASK_SECONDS = 0.1
ROLES = ("shard", "forward", "backward", COORDINATOR)
LIMIT_SECONDS = 120.0
"""Beyond this nothing is waited for: something hangs."""


def long_job(directory: Path, **timeouts: float) -> JobSpec:
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
            "timeouts": {"heartbeat": 3.0, "task": 5.0, "lease": 10.0, **timeouts},
        }
    )


@dataclass
class Standing:
    """A long job on a cluster, looked at. ``paused``: processes that are stopped, and until when."""

    cluster: LocalCluster
    status: StatusWatch
    tail: LogTail
    watch: RecoveryWatch
    directory: Path
    job: str
    watchdog: Watchdog
    paused: dict[str, float] = field(default_factory=dict)

    def look(self) -> float:
        """Poll once, let go on who was paused for long enough, and see that something moves; gives the time."""
        over = self.status.wait(POLL_SECONDS)
        now = time.monotonic()
        if over:
            self.give_up(f"the job has ended: {self.status.error or self.status.document.get('message')}")
        due = [name for name, until in self.paused.items() if now >= until]
        for name in due:
            del self.paused[name]
            self.cluster.unpause(name)
        self.tail.poll(now)
        self.watch.observe(self.tail.layers, self.tail.lowest_version, now)
        stand = Stand(num_updates=self.tail.num_updates, phase=str(self.status.document.get("message")))
        if self.watchdog.observe(stand, now, acted=bool(due)):
            self.give_up(f"nothing has moved for {self.watchdog.silence(now):.0f} s ({stand.phase})")
        return now

    def look_until(self, moment: float) -> None:
        """Poll up to that time."""
        while self.look() < moment:
            pass

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS) -> None:
        """Poll until that is so."""
        limit = time.monotonic() + seconds
        while not reached():
            if self.look() > limit:
                self.give_up(f"{what} did not come about in {seconds:.0f} s")

    def wait_for_version(self, version: int) -> None:
        """Poll until all layers have reached it."""
        self.wait_until(lambda: self.tail.lowest_version >= version, f"version {version}")

    def wait_for_everybody(self, *, spare: bool = True) -> None:
        """Poll until every process works for the job again, and a spare is ready; who stopped looking meanwhile would falsify the times."""
        limit = time.monotonic() + LIMIT_SECONDS
        with self.cluster.client() as client:
            while self.paused or not self._complete(client):
                if self.look() > limit:
                    self.give_up(f"not everybody works for the job again after {LIMIT_SECONDS:.0f} s")
                self.look_until(time.monotonic() + ASK_SECONDS)
        if spare:
            self.wait_until(lambda: self.cluster.spare_pid is not None, "a spare process")

    def kill(self, role: str, rng: random.Random) -> str:
        """Kill a process of this role that works for the job; gives its name."""
        name = self._chosen(role, rng)
        self.cluster.kill(name)
        self._begin(f"kill {name}", role, name)
        return name

    def pause(self, role: str, seconds: float, rng: random.Random) -> str:
        """Stop one for so long, see `look`; gives its name."""
        name = self._chosen(role, rng)
        self.cluster.pause(name)
        self.paused[name] = time.monotonic() + seconds
        self._begin(f"pause {name} for {seconds:.1f} s", role, name)
        return name

    def stop(self) -> dict[str, Any]:
        """Have the job stop at its next update; gives its last document."""
        self.cluster.wait_for_nodes()
        with self.cluster.client() as client:
            client.cancel(self.job)
        limit = time.monotonic() + LIMIT_SECONDS
        while not self.status.wait(POLL_SECONDS):
            self.tail.poll(time.monotonic())
            if time.monotonic() > limit:
                self.give_up(f"the job does not stop: {self.status.document.get('message')}")
        return self.status.document

    def give_up(self, sentence: str) -> NoReturn:
        """End the benchmark with the stacks of all processes in a file."""
        path = self.cluster.directory / "stacks.txt"
        stacks = dump_stacks(self.cluster)
        path.write_text("\n".join(f"==== {name}\n{text}" for name, text in stacks.items()), encoding="utf-8")
        raise SystemExit(f"{sentence}; the stacks of all processes are in {path}")

    def _chosen(self, role: str, rng: random.Random) -> str:
        targets = [role] if role == COORDINATOR else [f"{role}:{index}" for index in range(2)]
        found: list[str] = []

        def here() -> bool:
            name = process_named(rng.choice(targets), self.status.document)
            if name is not None and name in self.cluster.pids and name not in self.paused:
                found.append(name)
            return bool(found)

        self.wait_until(here, f"a {role} to be hit")
        return found[0]

    def _begin(self, fault: str, kind: str, name: str) -> None:
        now = time.monotonic()
        self.tail.poll(now)
        version, layers = self.tail.lowest_version, self.tail.layers
        self.watch.begin(fault=fault, kind=kind, process=name, version=version, layers=layers, now=now)
        stand = Stand(num_updates=self.tail.num_updates, phase=str(self.status.document.get("message")))
        self.watchdog.observe(stand, now, acted=True)

    def _complete(self, client: CoordinatorClient) -> bool:
        cluster = self.cluster
        try:
            known = {(node["name"], node["pid"]) for node in client.list_nodes()}
            document = client.get_job(self.job)
        except RetryableError:
            return False
        pids = {(name, cluster.pids.get(name)) for name in cluster.names if name != COORDINATOR}
        wanted = (cluster.shards, cluster.forward, cluster.backward)
        places = (document["blocks"], document["forward_workers"], document["backward_workers"])
        return known >= pids and tuple(map(len, places)) == wanted and document["message"] == "training"


@contextmanager
def standing_job(folder: Path, **timeouts: float) -> Iterator[Standing]:
    """The long job on a cluster of two processes of each role with a warm spare."""
    with (
        LocalCluster(
            shards=2,
            forward=2,
            backward=2,
            directory=folder / "cluster",
            threads=1,
            serve_metrics=False,
            restart=True,
            spare=True,
            environment={MARK: str(os.getpid())},
        ) as cluster,
        cluster.client() as client,
    ):
        cluster.wait_for_nodes()
        cluster.wait_for_spare()
        spec = long_job(folder / "run", **timeouts)
        submitted = client.submit(spec.to_json())
        job, directory = str(submitted["job"]), Path(str(submitted["directory"]))
        with StatusWatch(cluster.coordinator_address, job) as status:
            tail, now = LogTail(directory), time.monotonic()
            watchdog = Watchdog(silent_seconds(spec.timeouts), now, waiting=waiting_seconds(spec.timeouts))
            try:
                yield Standing(cluster, status, tail, RecoveryWatch(now), directory, job, watchdog)
            finally:
                tail.close()
