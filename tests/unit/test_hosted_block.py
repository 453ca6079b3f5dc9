"""A block as a shard hosts it, when the disk refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path

import pytest

from layerwise.errors import RetryableError, WrongLifeError
from layerwise.events import CutEvent
from layerwise.fault_points import Operation, points
from layerwise.fences import Fence, raise_fence
from layerwise.messages import CommitCut
from layerwise.server.hosted_block import HostedBlock
from tests.unit.test_build import CPU, MODELS, Run, job


class FullDisk:
    """A watcher that refuses what ``refused`` names."""

    def __init__(self) -> None:
        self.refused: tuple[str, ...] = ()

    def before(self, operation: Operation) -> None:
        if operation.point in self.refused:
            raise OSError(ENOSPC, os.strerror(ENOSPC), operation.path)

    def after(self, operation: Operation) -> None:
        pass


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    watcher = FullDisk()
    monkeypatch.setattr(points, "watcher", watcher)
    return watcher


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(job(tmp_path, MODELS["mlp"]), tmp_path / "run", num_blocks=1)


def host(run: Run) -> HostedBlock:
    return HostedBlock(
        run.assignment(0),
        device=CPU,
        allowed_imports=(),
        report=lambda task, outcome: None,
        cut_taken=lambda version: None,
        cut_saved=lambda version, files, error: None,
    )


@pytest.fixture
def block(run: Run, disk: FullDisk) -> Iterator[HostedBlock]:
    hosted = host(run)
    yield hosted
    disk.refused = ()
    hosted.close()


def test_work_waits_while_the_log_has_no_room_and_goes_on_when_it_has(disk: FullDisk, block: HostedBlock) -> None:
    disk.refused = ("event-log.reserve",)
    version = 0
    while not block.events.full:
        for _ in range(1000):
            block.events.append(CutEvent(layer=0, version=version, digest=""))
            version += 1
        block.events.flush()
        block.events.tend()
        assert not block.queue.paused
    block.on_tick(0.0)
    assert block.queue.paused
    assert "No space left on device" in block.shortage
    disk.refused = ()
    block.events.tend()
    block.on_tick(0.1)
    assert not block.queue.paused
    assert block.shortage == ""


def test_a_block_that_finds_no_room_for_its_log_says_so(disk: FullDisk, run: Run) -> None:
    disk.refused = ("event-log.reserve",)
    with pytest.raises(RetryableError, match=r"no event log can be begun in .*: No space left on device"):
        host(run)


def test_a_replaced_block_commits_nothing(run: Run, block: HostedBlock) -> None:
    raise_fence(run.directory, Fence(life=2, start=0, stop=3, version=0))
    manifest = '{"version": 3, "files": [{"layer": 0, "life": 1, "name": "x", "bytes": 1, "digest": ""}]}'
    message = CommitCut(job="job", version=3, files=(), manifest_json=manifest, keep=())
    with pytest.raises(WrongLifeError, match="layer 0 of life 1 was replaced by life 2"):
        block.commit(message)
