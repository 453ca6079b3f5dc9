"""What a hop costs: an activation from one process to another on this host, answered by a small message.

    python -m benchmarks.hop [--output table|json] [--repeat N]

Two processes as in training: a transport each, the receiver gets the tensors on its event loop. *One at a time* is the time from sending to
the answer; *four under way* is what a pipeline sees. Beside them, measured in the same run: memcpy of the same size on one thread (warm).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Forward, Message, Stop, Tensors
from layerwise.transport import Transport

SIZES = {"64 kB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20}
BYTES_PER_REPEAT = 64 << 20
MOST_PER_REPEAT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class HopResult:
    """One row: medians over the repeats. ``alone_us`` is a message's time to its answer; ``cpu_us`` is of both processes together."""

    path: str
    size: str
    alone_us: float
    alone_gb_per_second: float
    pipelined_us: float
    pipelined_gb_per_second: float
    cpu_us: float
    part_of_memcpy: float


def memcpy_seconds(num_bytes: int, repeats: int) -> float:
    """Seconds to copy ``num_bytes`` between two warm blocks of memory: the median."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    count = max(3, (256 << 20) // num_bytes)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            np.copyto(target, source)
        taken.append((time.perf_counter() - start) / count)
    return statistics.median(taken)


def _answer(address: str, pipe: Connection) -> None:
    """The receiving process: one small answer for each activation."""
    torch.set_num_threads(1)

    async def main() -> None:
        lost = asyncio.Event()

        def on_message(peer: str, message: Message) -> None:
            if isinstance(message, Forward):
                transport.send(peer, Stop(job="answer"))
            else:
                pipe.send(time.process_time())

        transport = Transport("receiver", on_message=on_message, on_lost=lambda peer: lost.set())
        pipe.send(await transport.listen(address))
        await lost.wait()
        await transport.close()

    asyncio.run(main())


class Sender:
    """Sends activations and waits for their answers."""

    def __init__(self, pipe: Connection, address: str) -> None:
        self._pipe = pipe
        self._answered = asyncio.Event()
        self._answers = 0
        self.transport = Transport("sender", on_message=self._on_message, on_lost=lambda peer: None)
        self.transport.connect("receiver", address)

    def _on_message(self, peer: str, message: Message) -> None:
        self._answers += 1
        self._answered.set()

    async def stream(self, message: Forward, count: int, under_way: int) -> float:
        """Seconds for each of ``count`` messages with at most ``under_way`` unanswered."""
        self._answers, sent = 0, 0
        start = time.perf_counter()
        while self._answers < count:
            while sent < count and sent - self._answers < under_way:
                self.transport.send("receiver", message)
                sent += 1
            self._answered.clear()
            await self._answered.wait()
        return (time.perf_counter() - start) / count

    def receiver_cpu_seconds(self) -> Callable[[], float]:
        """Ask the receiver for its CPU time; the returned function waits for it."""
        self.transport.send("receiver", Stop(job="clock"))
        return self._pipe.recv


async def _measure(pipe: Connection, address: str, path: str, repeats: int) -> list[HopResult]:
    sender = Sender(pipe, address)
    loop = asyncio.get_running_loop()
    results = []
    for size, num_bytes in SIZES.items():
        message = Forward(
            job="benchmark",
            attempt=Attempt(Microbatch(0, 0, 8), 1),
            number=1,
            life=1,
            needed_from=0,
            inputs=Tensors((torch.randn(num_bytes // 4),)),
            targets=Tensors((None,)),
        )
        count = min(MOST_PER_REPEAT, max(4, BYTES_PER_REPEAT // num_bytes))
        await sender.stream(message, count, 4)  # warm: buffers, pages, HTTP/2 windows
        alone, pipelined, cpu = [], [], []
        for _ in range(repeats):
            before = time.process_time() + await loop.run_in_executor(None, sender.receiver_cpu_seconds())
            alone.append(await sender.stream(message, count, 1))
            after = time.process_time() + await loop.run_in_executor(None, sender.receiver_cpu_seconds())
            cpu.append((after - before) / count)
            pipelined.append(await sender.stream(message, count, 4))
        copy = memcpy_seconds(num_bytes, repeats)
        alone_seconds, pipelined_seconds = statistics.median(alone), statistics.median(pipelined)
        results.append(
            HopResult(
                path=path,
                size=size,
                alone_us=alone_seconds * 1e6,
                alone_gb_per_second=num_bytes / alone_seconds / 1e9,
                pipelined_us=pipelined_seconds * 1e6,
                pipelined_gb_per_second=num_bytes / pipelined_seconds / 1e9,
                cpu_us=statistics.median(cpu) * 1e6,
                part_of_memcpy=copy / pipelined_seconds,
            )
        )
    await sender.transport.close()
    return results


def measure_path(path: str, repeats: int, folder: Path) -> list[HopResult]:
    """All sizes over ``path`` ("unix" or "tcp") between this process and one of its own."""
    address = f"unix:{folder}/hop.sock" if path == "unix" else "127.0.0.1:0"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(address, theirs), name="layerwise-hop-receiver")
    process.start()
    try:
        return asyncio.run(_measure(ours, ours.recv(), path, repeats))
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def measure(repeats: int = 5) -> list[HopResult]:
    """Both paths, all sizes."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="lw-hop-"))
    try:
        return [result for path in ("unix", "tcp") for result in measure_path(path, repeats, folder)]
    finally:
        shutil.rmtree(folder)


def table(results: list[HopResult]) -> str:
    """The results in Markdown."""
    lines = [
        "| path | size | one at a time (us) | GB/s | four under way (us) | GB/s | CPU, both ends (us) | of memcpy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.path} | {one.size} | {one.alone_us:.0f} | {one.alone_gb_per_second:.2f} | {one.pipelined_us:.0f}"
        f" | {one.pipelined_gb_per_second:.2f} | {one.cpu_us:.0f} | {one.part_of_memcpy:.1%} |"
        for one in results
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--repeat", type=int, default=5, help="repeats of each measurement; the median is shown")
    options: Any = parser.parse_args(arguments)
    results = measure(options.repeat)
    if options.output == "json":
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
