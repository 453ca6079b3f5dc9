"""What a hop costs: an activation from one process to another on this host, answered by a small message.

Two processes as in training: a transport each, the receiver gets the tensors on its event loop. *One at a time* is the time from sending to the
answer; *four under way* is what a pipeline sees. Beside them, interleaved in the same run: a bare gRPC stream between the same two processes that
carries the same bytes in chunks of the same size (what our frames, links and tensors add is the difference), and memcpy of the same size on one
thread, warm.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import numpy as np
import torch

from benchmarks.report import table, write_section
from layerwise.address import parse_address
from layerwise.ids import Attempt, Microbatch
from layerwise.memory import keep_freed_memory
from layerwise.messages import Forward, Message, Stop, Tensors
from layerwise.proto.frames import CHUNK_BYTES
from layerwise.streams import open_channel
from layerwise.transport import Transport

SIZES = {"64 kB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20}
BYTES_PER_REPEAT = 64 << 20
MOST_PER_REPEAT = 200
REFERENCE = """An activation includes its small answer. For comparison, bare gRPC with 1 MB chunks on an idle 2-core machine, measured when the transport was
designed: 220 us at 64 kB, 2.3 (unix) to 3.1 (TCP) GB/s at 1 MB, 2.2 to 3.3 GB/s at 16 MB; with one core taken by another job 190 us, 1.2 to 1.3 and 1.0
to 1.3 GB/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopResult:
    """One row: medians over the repeats. ``alone_us`` is a message's time to its answer; ``cpu_us`` is of both processes together."""

    path: str
    size: str
    alone_us: float
    alone_gb_per_second: float
    bare_us: float
    bare_cpu_us: float
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
    keep_freed_memory()

    async def main() -> None:
        lost = asyncio.Event()

        def on_message(peer: str, message: Message) -> None:
            if isinstance(message, Forward):
                transport.send(peer, Stop(job="answer"))
            else:
                pipe.send(time.process_time())

        transport = Transport("receiver", on_message=on_message, on_lost=lambda peer: lost.set())
        transport.add_servicer(_add_bare_stream)
        pipe.send(await transport.listen(address))
        await lost.wait()
        await transport.close()

    asyncio.run(main())


def _add_bare_stream(server: grpc.aio.Server) -> None:
    """A stream of plain bytes; a chunk that begins with 1 is the last of its message and is answered."""

    async def handle(requests: Any, context: Any) -> None:
        while (chunk := await context.read()) is not grpc.aio.EOF:
            if chunk[0] == 1:
                await context.write(bytes(40))

    method: Any = grpc.stream_stream_rpc_method_handler(cast(Any, handle))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Bare", {"Stream": method}),))


class BareStream:
    """The same bytes over gRPC alone."""

    def __init__(self, address: str) -> None:
        self.channel = open_channel(parse_address(address))
        self._call: Any = self.channel.stream_stream("/benchmark.Bare/Stream")()

    async def send(self, num_bytes: int, count: int) -> float:
        """Seconds for each of ``count`` messages, one at a time."""
        whole, rest = divmod(num_bytes - 1, CHUNK_BYTES)
        chunks = [bytes(CHUNK_BYTES)] * whole + [b"\x01" + bytes(rest)]
        start = time.perf_counter()
        for _ in range(count):
            for chunk in chunks:
                await self._call.write(chunk)
            await self._call.read()
        return (time.perf_counter() - start) / count


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

    async def cpu_seconds(self) -> float:
        """CPU time of both processes so far."""
        self.transport.send("receiver", Stop(job="clock"))
        receiver = await asyncio.get_running_loop().run_in_executor(None, self._pipe.recv)
        return time.process_time() + float(receiver)


async def _measure(pipe: Connection, address: str, path: str, repeats: int) -> list[HopResult]:
    sender, bare = Sender(pipe, address), BareStream(address)
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
        await bare.send(num_bytes, count)
        found: dict[str, list[float]] = {"alone": [], "cpu": [], "pipelined": [], "bare": [], "bare_cpu": []}
        for _ in range(repeats):
            clock = await sender.cpu_seconds()
            found["alone"].append(await sender.stream(message, count, 1))
            found["cpu"].append((await sender.cpu_seconds() - clock) / count)
            clock = await sender.cpu_seconds()
            found["bare"].append(await bare.send(num_bytes, count))
            found["bare_cpu"].append((await sender.cpu_seconds() - clock) / count)
            found["pipelined"].append(await sender.stream(message, count, 4))
        seconds = {name: statistics.median(values) for name, values in found.items()}
        results.append(
            HopResult(
                path=path,
                size=size,
                alone_us=seconds["alone"] * 1e6,
                alone_gb_per_second=num_bytes / seconds["alone"] / 1e9,
                bare_us=seconds["bare"] * 1e6,
                bare_cpu_us=seconds["bare_cpu"] * 1e6,
                pipelined_us=seconds["pipelined"] * 1e6,
                pipelined_gb_per_second=num_bytes / seconds["pipelined"] / 1e9,
                cpu_us=seconds["cpu"] * 1e6,
                part_of_memcpy=memcpy_seconds(num_bytes, repeats) / seconds["pipelined"],
            )
        )
    await bare.channel.close()
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
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(prefix="lw-hop-"))
    try:
        return [result for path in ("unix", "tcp") for result in measure_path(path, repeats, folder)]
    finally:
        shutil.rmtree(folder)


def results_table(results: list[HopResult]) -> str:
    """The results in Markdown."""
    columns = [
        "path",
        "size",
        "one at a time",
        "bare gRPC",
        "four under way",
        "CPU of both ends",
        "bare gRPC",
        "of memcpy",
    ]
    rows = [
        [
            one.path,
            one.size,
            f"{one.alone_us:.0f} us, {one.alone_gb_per_second:.2f} GB/s",
            f"{one.bare_us:.0f} us",
            f"{one.pipelined_us:.0f} us, {one.pipelined_gb_per_second:.2f} GB/s",
            f"{one.cpu_us:.0f} us",
            f"{one.bare_cpu_us:.0f} us",
            f"{one.part_of_memcpy:.1%}",
        ]
        for one in results
    ]
    return table(columns, rows)


def main(arguments: Sequence[str]) -> None:
    """Measure; write the section, or print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks hop")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; the median is shown")
    options = parser.parse_args(arguments)
    results = measure(options.repeats)
    if options.output == "json":
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        text = results_table(results) + "\n\n" + REFERENCE
        write_section("A hop between two processes", f"python -m benchmarks hop --repeats {options.repeats}", text)


if __name__ == "__main__":
    main(sys.argv[1:])
