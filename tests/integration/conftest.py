"""One standing cluster for all tests that do not break it: real processes, unix sockets, a directory for each job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from layerwise.client import FINAL_STATES
from layerwise.cluster import LocalCluster
from tests.integration.jobs import OWN_CODE, Gate, write_images

REPOSITORY = Path(__file__).resolve().parents[2]


def start(**arguments: object) -> LocalCluster:
    """A cluster of processes with one thread of arithmetic each, which may run the code in `tests.integration.own_code`."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings: dict[str, object] = {"threads": 1, "allow_imports": (OWN_CODE,), "environment": {"PYTHONPATH": path}}
    return LocalCluster(**{**settings, **arguments})  # type: ignore[arg-type]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """What is compared bit for bit with a process of one thread is computed with one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Four shards, two forward workers, two detached backward workers."""
    with start(shards=4, forward=2, backward=2, directory=tmp_path_factory.mktemp("standing")) as running:
        running.wait_for_nodes()
        yield running
        assert running.problems == (), "a process ended that no test has killed"


@pytest.fixture(scope="session")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two processes of each role, for tests that kill some and start them again."""
    with start(shards=2, forward=2, backward=2, directory=tmp_path_factory.mktemp("fragile")) as running:
        yield running


@pytest.fixture
def fragile(breakable: LocalCluster) -> LocalCluster:
    """That cluster with all its processes there: the test before may have left while one was starting."""
    breakable.wait_for_nodes()
    return breakable


@pytest.fixture
def cluster(standing: LocalCluster) -> Iterator[LocalCluster]:
    """The standing cluster; jobs that a failed test has left are cancelled after it."""
    yield standing
    with standing.client() as client:
        for one in client.list_jobs():
            if one["state"] not in FINAL_STATES:
                client.cancel(one["job"])


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 images of 4 classes to train on, and 20 to validate on: three updates of 16 samples an epoch, the last one short."""
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that is opened after the test."""
    made = Gate(tmp_path / "gate")
    yield made
    made.open()


@pytest.fixture
def second_gate(tmp_path: Path) -> Iterator[Gate]:
    """Another one."""
    made = Gate(tmp_path / "gate-2")
    yield made
    made.open()
