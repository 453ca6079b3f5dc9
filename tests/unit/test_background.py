"""Work off the loop: its outcome is heard once, and what hangs keeps nobody from ending."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any, cast

from layerwise.background import Background
from layerwise.roles import Effect
from layerwise.service import Service
from tests.unit.played_service import PlayedService


def scene(body: Any) -> None:
    async def main() -> None:
        service = PlayedService()
        await body(service, lambda **options: Background(cast(Service, service), "work", **options))

    asyncio.run(main())


def test_outcomes_come_back_in_order_and_errors_as_errors() -> None:
    async def body(service: PlayedService, make: Any) -> None:
        heard: list[object] = []

        def hear(value: object) -> list[Effect]:
            heard.append(value)
            return []

        def fail() -> None:
            raise ValueError("no such data")

        def leave() -> None:
            sys.exit(3)

        background = make()
        background.run(lambda: 1, hear, hear)
        background.run(fail, hear, hear)
        background.run(leave, hear, hear)
        background.run(lambda: 2, hear, hear)
        await service.until(lambda: len(heard) == 4)
        background.close()
        assert background.wait(30)
        assert (heard[0], str(heard[1]), heard[3]) == (1, "no such data", 2)
        assert str(heard[2]) == "the code ended with SystemExit: 3"

    scene(body)


def test_what_waits_is_forgotten_and_what_is_under_way_is_unheard() -> None:
    async def body(service: PlayedService, make: Any) -> None:
        gate, begun = threading.Event(), threading.Event()
        heard: list[object] = []

        def work() -> None:
            begun.set()
            assert gate.wait(30)

        background = make()
        for _ in range(3):
            background.run(work, lambda value: heard.append(value) or [], lambda error: heard.append(error) or [])
        assert begun.wait(30)
        background.close()
        assert not background.wait(0.0)
        gate.set()
        assert background.wait(30)
        await asyncio.sleep(0)
        assert heard == []

    scene(body)


def test_finishing_does_all_that_waits() -> None:
    async def body(service: PlayedService, make: Any) -> None:
        done: list[int] = []
        background = make()
        for number in range(5):
            background.run(lambda number=number: done.append(number), lambda _: [], lambda _: [])
        await asyncio.to_thread(background.finish)
        assert done == [0, 1, 2, 3, 4]

    scene(body)


HANGING = """
import asyncio, os, threading
from layerwise.background import Background

class Service:
    def guard(self, act):
        act()

async def main():
    service = Service()
    service.loop = asyncio.get_running_loop()
    background = Background(service, "loader", abandon=True)
    begun = threading.Event()
    background.run(lambda: (begun.set(), os.read(0, 1)), lambda value: [], lambda error: [])
    begun.wait()
    background.close()
    print(await asyncio.to_thread(background.wait, 0.0))

asyncio.run(main())
"""


def test_a_process_ends_while_abandoned_work_hangs() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.wait(60) == 0  # its standard input is open: the work has not ended
        assert process.stdout is not None
        assert process.stdout.read() == "False\n"
    finally:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        process.wait()
