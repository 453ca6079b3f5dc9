"""What a process holds for others and for its disk can be read from its metrics."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import numpy as np

from layerwise.buffers import BufferPool
from layerwise.cut_writer import CutWriter
from layerwise.refusals import Refusals
from layerwise.server.job_store import SqliteJobStore
from layerwise.server.metrics import job_store_metrics
from layerwise.transport import Transport
from layerwise.transport_metrics import transport_metrics


class PlayedTransport:
    """Two links with something in their outboxes."""

    def __init__(self) -> None:
        self.outboxes = {"shard-0": 10, "shard-1": 5}
        self.pool = BufferPool()
        self.refusals = Refusals()

    @property
    def peers(self) -> list[str]:
        return list(self.outboxes)

    def outbox_bytes(self, peer: str) -> int:
        return self.outboxes[peer]


def values(families: list[Any]) -> dict[str, float]:
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_what_is_held_for_peers_is_the_sum_over_all_links() -> None:
    transport = PlayedTransport()
    buffer = transport.pool.take(1 << 20)
    assert isinstance(buffer, np.ndarray)
    del buffer
    found = values(transport_metrics(cast(Transport, transport)))
    assert found["layerwise_outbox_bytes"] == 15
    assert found["layerwise_idle_buffers_bytes"] == 1 << 20


def test_writes_that_the_disk_has_taken_wait_no_more(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path)
    store.put_drained(frozenset({"rack-2"}))
    store.flush()
    assert values(job_store_metrics(store)) == {"layerwise_job_store_queue_tasks": 0}
    store.close()


def test_cuts_behind_the_one_that_is_written_are_counted(tmp_path: Path) -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def before_save() -> None:
        under_way.set()
        go_on.wait()

    writer = CutWriter(tmp_path, "job", before_save=before_save)
    for version in range(3):
        writer.save(version, (), lambda files, error: None)
    under_way.wait()
    waiting = writer.num_waiting
    go_on.set()
    writer.close()
    assert waiting == 2
