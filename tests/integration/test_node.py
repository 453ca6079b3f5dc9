"""``layerwise node`` with real processes: it restarts what dies, ends with all that it started, and says what can't run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from layerwise.cluster import LocalCluster
from tests.integration.command import Command
from tests.integration.jobs import ask_until

SECONDS = 60.0


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A coordinator alone: nodes bring the rest."""
    with LocalCluster(shards=0, forward=0, directory=tmp_path_factory.mktemp("coordinator")) as running:
        yield running


def processes(coordinator: LocalCluster, command: Command, names: set[str]) -> dict[str, dict[str, Any]]:
    """What the coordinator says of ``names``, once all have presented themselves."""
    found: dict[str, dict[str, Any]] = {}

    def all_there() -> bool:
        assert command.process.poll() is None, command.errors
        found.clear()
        found.update((node["name"], node) for node in client.list_nodes() if node["name"] in names)
        return set(found) == names

    with coordinator.client() as client:
        ask_until(all_there)
    return found


def test_a_node_keeps_its_processes_and_takes_them_with_it(coordinator: LocalCluster, tmp_path: Path) -> None:
    names = {"shard-here-0", "forward-here-0"}
    arguments = ["--coordinator", coordinator.coordinator_address, "--name", "here", "--forward", "1"]
    arguments += ["--metrics", "127.0.0.1:0", "--threads", "1", "--hang-timeout", "0"]
    with Command("node", *arguments, folder=tmp_path) as command:
        before = processes(coordinator, command, names)
        killed = before["shard-here-0"]["pid"]
        os.kill(killed, signal.SIGKILL)
        line = command.wait_for("ended with signal SIGKILL")
        assert f"shard-here-0 (process {killed})" in line
        ask_until(lambda: processes(coordinator, command, names)["shard-here-0"]["pid"] != killed)
        started = psutil.Process(command.process.pid).children()
        assert len(started) >= 2
        command.process.send_signal(signal.SIGTERM)
        assert command.finish() == 0, command.errors
    assert psutil.wait_procs(started, timeout=SECONDS)[1] == []
    assert "Traceback" not in command.errors
    assert any(line.startswith("forward-here-0: ") for line in command.lines), "what its processes print is in its log"


def test_a_node_whose_process_can_not_run_like_that_ends_with_the_reason(
    coordinator: LocalCluster, tmp_path: Path
) -> None:
    arguments = ["--coordinator", coordinator.coordinator_address, "--name", "there", "--device", "cuda:99"]
    with Command("node", *arguments, "--log-format", "json", folder=tmp_path) as command:
        assert command.finish() == 2, command.errors
    last = command.lines[-1]
    assert last.startswith("layerwise: shard-there-0 (process ")
    assert "cuda:99" in last
    assert "Traceback" not in command.errors
    assert '{"process": "shard-there-0", "message": ' in command.errors


def test_processes_end_with_a_node_that_was_killed(coordinator: LocalCluster, tmp_path: Path) -> None:
    arguments = ["--coordinator", coordinator.coordinator_address, "--name", "gone", "--threads", "1"]
    with Command("node", *arguments, folder=tmp_path) as command:
        processes(coordinator, command, {"shard-gone-0"})
        started = psutil.Process(command.process.pid).children()
        command.process.kill()
        command.finish()
    assert psutil.wait_procs(started, timeout=SECONDS)[1] == []
