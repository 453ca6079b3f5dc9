from __future__ import annotations

import threading

import pytest

from layerwise.errors import DeadlineError
from layerwise.shared_lock import SharedLock


def test_readers_share_and_a_writer_is_alone() -> None:
    lock = SharedLock()
    inside, together = threading.Barrier(3, timeout=30), []

    def read() -> None:
        with lock.shared():
            inside.wait()  # passes only when all three are inside at once
            together.append(1)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1, 1, 1]

    value = [0]

    def write() -> None:
        for _ in range(500):
            with lock.exclusive():
                seen = value[0]
                value[0] = seen + 1

    writers = [threading.Thread(target=write) for _ in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert value == [2000]


def test_a_waiting_writer_goes_before_new_readers() -> None:
    lock = SharedLock()
    order: list[str] = []
    lock.acquire_shared()
    writer_waits = threading.Event()

    def write() -> None:
        writer_waits.set()
        with lock.exclusive():
            order.append("write")

    def read() -> None:
        with lock.shared():
            order.append("read")

    writer = threading.Thread(target=write)
    writer.start()
    writer_waits.wait(30)
    while not lock.has_waiting_writer:
        pass
    reader = threading.Thread(target=read)
    reader.start()
    lock.release_shared()
    writer.join()
    reader.join()
    assert order == ["write", "read"]


def test_no_wait_is_endless() -> None:
    lock = SharedLock(timeout_seconds=0.01)
    with lock.shared(), pytest.raises(DeadlineError, match="in use for more than"):
        lock.acquire_exclusive()
    with lock.exclusive(), pytest.raises(DeadlineError, match="locked by an update"):
        lock.acquire_shared()
    with lock.exclusive():
        pass
    with lock.shared():
        pass
