"""The command lines of docker-compose.yml, run as processes in the order in which compose starts them, train a job.

Each service gets a loopback address of its own in place of its container, free ports there in place of the written
ones; nothing else of a command line is changed. The image is not built: that needs a Docker daemon.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml

JOB = """
name: compose-start
model: {name: mlp, hidden: [16, 16]}
data: {name: digits, batch: 64}
train: {steps: 6, seed: 1, optimizer: {name: sgd, lr: 0.1}}
cluster: {shards: 2}
checkpoint: {every: 3, path: runs/compose-start}
"""

HEALTHY_SECONDS = 60.0
CHECK_SECONDS = 0.5
JOB_SECONDS = 90.0
STOP_SECONDS = 20.0
ROOM = 16


class ComposeProcesses:
    """The services of the profiles ``cpu`` and ``detached``, as processes of this machine in one folder."""

    def __init__(self, repository: Path, folder: Path) -> None:
        services = yaml.safe_load((repository / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
        self.services: dict[str, Any] = {
            name: service
            for name, service in services.items()
            if set(service.get("profiles", ["cpu"])) <= {"cpu", "detached"}
        }
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.healthy: set[str] = set()
        # 127.0.0.0/8 is all loopback: a network that no other run of this test is on.
        network = f"127.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}"
        self.hosts = {name: f"{network}.{number}" for number, name in enumerate(self.services, start=1)}
        self.ports: dict[tuple[str, str], int] = {}

    def order(self) -> list[str]:
        """The services, each behind those that it depends on."""
        return list(
            TopologicalSorter(
                {name: list(service.get("depends_on", {})) for name, service in self.services.items()}
            ).static_order()
        )

    def address(self, host: str, port: str) -> str:
        """What stands for ``host:port`` here; the same answer whenever it is asked for.

        Behind each port of a host there is room for those that a node counts up to.
        """
        if (host, port) not in self.ports:
            taken = [number for (other, _), number in self.ports.items() if other == host]
            with socket.socket() as probe:
                probe.bind((self.hosts[host], taken[-1] + ROOM if taken else 0))
                self.ports[host, port] = probe.getsockname()[1]
        return f"{self.hosts[host]}:{self.ports[host, port]}"

    def words(self, name: str, words: list[str]) -> list[str]:
        """A command line of the service, translated to this machine."""

        def translate(match: re.Match[str]) -> str:
            host = name if match["host"] in ("0.0.0.0", "127.0.0.1") else match["host"]
            return self.address(host, match["port"])

        hosts = "|".join(re.escape(host) for host in ["0.0.0.0", "127.0.0.1", *self.services])
        translated = [re.sub(rf"\b(?P<host>{hosts}):(?P<port>\d+)\b", translate, word) for word in words]
        translated = [word.replace("/var/lib/layerwise", str(self.folder / "state")) for word in translated]
        program = {"layerwise": str(Path(sys.executable).with_name("layerwise")), "python": sys.executable}
        return [program[translated[0]], *translated[1:]]

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                self.words(name, self.services[name]["command"]),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def check_health(self, name: str) -> bool:
        """Run the service's health check once, as compose does every few seconds."""
        test = self.services[name]["healthcheck"]["test"]
        assert test[0] == "CMD"
        checked = subprocess.run(
            self.words(name, test[1:]), cwd=self.folder, capture_output=True, check=False, timeout=HEALTHY_SECONDS
        )
        return checked.returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        """Check again and again, until the service is healthy, has ended, or the test's time limit is reached."""
        while name not in self.healthy:
            if self.check_health(name):
                self.healthy.add(name)
                return
            # Each check is a process, which takes from the service what that needs to start.
            with suppress(subprocess.TimeoutExpired):
                status = self.running[name].wait(CHECK_SECONDS)
                pytest.fail(f"{name} ended with {status}:\n{self.log(name)}")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str) -> int:
        """End the service as ``docker stop`` does; its exit status."""
        self.running[name].send_signal(signal.SIGTERM)
        return self.running[name].wait(STOP_SECONDS)


@pytest.fixture
def compose(repository: Path, tmp_path: Path) -> Iterator[ComposeProcesses]:
    processes = ComposeProcesses(repository, tmp_path)
    yield processes
    for process in processes.running.values():
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.timeout(HEALTHY_SECONDS + JOB_SECONDS + STOP_SECONDS)
def test_the_services_start_in_order_train_a_job_and_stop_cleanly(compose: ComposeProcesses) -> None:
    assert compose.order()[0] == "coordinator"
    for name in compose.order():
        for other, condition in compose.services[name].get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            compose.wait_until_healthy(other)
        compose.start(name)
    for name in compose.order():
        compose.wait_until_healthy(name)

    (compose.folder / "job.yaml").write_text(JOB, encoding="utf-8")
    coordinator = compose.address("coordinator", "7070")
    submit = ["layerwise", "submit", "--coordinator", coordinator, "--follow", "--output", "json", "job.yaml"]
    submitted = subprocess.run(
        compose.words("coordinator", submit),
        cwd=compose.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=JOB_SECONDS,
    )
    assert submitted.returncode == 0, submitted.stderr + compose.log("coordinator")
    result = json.loads(submitted.stdout.splitlines()[-1])
    assert (result["state"], result["steps"]) == ("done", 6)
    assert result["ledger"]["samples_leased"] == result["ledger"]["samples_applied"] > 0
    assert list((compose.folder / "runs/compose-start").rglob("*.safetensors"))

    for name in compose.services:
        port = re.search(r"--metrics=\S+:(\d+)", " ".join(compose.services[name]["command"]))
        assert port
        with urllib.request.urlopen(f"http://{compose.address(name, port[1])}/metrics", timeout=10) as answer:
            assert b"layerwise_" in answer.read(), name

    for name in reversed(compose.order()):
        assert compose.stop(name) == 0, compose.log(name)
