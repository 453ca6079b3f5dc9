from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layerwise.address import parse_address
from layerwise.errors import ConfigError, NotAllowedError
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Forward, Heartbeat, Message, Stop, StopAt, Tensors
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.streams import SERVICE, make_server, open_channel
from layerwise.transport import Transport
from layerwise.version import WIRE_VERSION

torch.set_num_threads(1)

Body = Callable[["Network"], Awaitable[None]]


@dataclass
class Process:
    """A transport with what happened to it."""

    name: str
    transport: Transport
    got: asyncio.Queue[tuple[str, Message]] = field(default_factory=asyncio.Queue)
    lost: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    address: str = ""

    async def next(self) -> Any:
        return (await asyncio.wait_for(self.got.get(), 30))[1]

    async def next_lost(self) -> str:
        return await asyncio.wait_for(self.lost.get(), 30)


class Network:
    """Transports in this process; all are closed at the end."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.processes: list[Process] = []
        self.numbers = itertools.count()

    def fresh_address(self) -> str:
        return "127.0.0.1:0" if self.kind == "tcp" else f"unix:{self.folder}/{next(self.numbers)}.sock"

    async def start(self, name: str, *, address: str = "", listen: bool = True, **options: Any) -> Process:
        process: Process
        settings: dict[str, Any] = {
            "on_message": lambda peer, message: process.got.put_nowait((peer, message)),
            "on_lost": lambda peer: process.lost.put_nowait(peer),
        }
        process = Process(name, Transport(name, **(settings | options)))
        if listen:
            process.address = await process.transport.listen(address or self.fresh_address())
        self.processes.append(process)
        return process

    async def close(self) -> None:
        await asyncio.gather(*(process.transport.close() for process in self.processes))


def run(body: Body, kind: str, folder: Path) -> None:
    """Run a test's body on a loop of its own; nothing may be left on it afterwards."""

    async def main() -> None:
        network = Network(kind, folder)
        try:
            await body(network)
        finally:
            await network.close()
        left = [task for task in asyncio.all_tasks() if task.get_name().startswith("layerwise")]
        assert not left

    asyncio.run(main())


@pytest.fixture(params=["unix", "tcp"])
def network(request: pytest.FixtureRequest, socket_folder: Path) -> Callable[[Body], None]:
    return lambda body: run(body, request.param, socket_folder)


@pytest.fixture
def tcp(socket_folder: Path) -> Callable[[Body], None]:
    return lambda body: run(body, "tcp", socket_folder)


def stop_at(version: int) -> StopAt:
    return StopAt(job="j", version=version, life=1)


def forward(tensor: torch.Tensor) -> Forward:
    return Forward(
        job="j",
        attempt=Attempt(Microbatch(0, 0, 4), 1),
        number=1,
        life=1,
        needed_from=0,
        inputs=Tensors((tensor,)),
        targets=Tensors((None,)),
    )


def test_messages_go_both_ways_in_order(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two")
        one.transport.connect("two", two.address)
        for version in range(2000):
            one.transport.send("two", stop_at(version))
        assert [(await two.next()).version for _ in range(2000)] == list(range(2000))
        for version in range(2000):
            two.transport.send("one", stop_at(version))
        assert [(await one.next()).version for _ in range(2000)] == list(range(2000))
        assert one.transport.sent_bytes > 2000
        assert one.transport.received_bytes > 2000

    network(body)


def test_large_tensors_arrive_bit_for_bit(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two")
        one.transport.connect("two", two.address)
        tensors = [torch.randn(2048, 2048).t(), torch.randn(3), torch.randn(4 << 20), torch.randn(1000, 1000)]
        for tensor in tensors:
            one.transport.send("two", forward(tensor))
        for tensor in tensors:
            arrived = (await two.next()).inputs.items[0]
            assert torch.equal(arrived, tensor)
            assert arrived.stride() == tensor.stride()

    network(body)


def test_what_is_unacknowledged_is_bounded_and_the_rest_waits(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", credit_bytes=2 << 20)
        two = await network.start("two", credit_bytes=2 << 20)
        one.transport.connect("two", two.address)
        for _ in range(10):
            one.transport.send("two", forward(torch.zeros(1 << 18)))
        assert 8 << 20 <= one.transport.outbox_bytes("two") < 10 << 20
        for _ in range(10):
            await two.next()
        assert one.transport.outbox_bytes("two") == 0

    network(body)


def test_an_outbox_that_overflows_ends_the_link(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", credit_bytes=1, max_outbox_bytes=100)
        two = await network.start("two")
        one.transport.connect("two", two.address)
        for version in range(50):
            one.transport.send("two", stop_at(version))
        assert await one.next_lost() == "two"
        assert "does not read" in one.transport.lost_reason("two")

    tcp(body)


def test_before_send_runs_once_for_messages_sent_together(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        calls: list[int] = []
        one = await network.start("one", before_send=lambda: calls.append(one.transport.sent_bytes))
        two = await network.start("two")
        one.transport.connect("two", two.address)
        for version in range(100):
            one.transport.send("two", stop_at(version))
        for _ in range(100):
            await two.next()
        assert calls == [0]

    tcp(body)


def test_nothing_leaves_while_records_can_not_be_written(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        errors: list[str] = []

        def write_records() -> None:
            if len(errors) < 2:
                raise OSError("disk full")

        one = await network.start(
            "one", before_send=write_records, on_error=lambda error: errors.append(str(error)), connect_seconds=30.0
        )
        two = await network.start("two")
        one.transport.connect("two", two.address)
        one.transport.send("two", Stop(job="j"))
        assert await two.next() == Stop(job="j")
        assert errors == ["disk full", "disk full"]

    tcp(body)


def test_both_may_connect_to_each_other(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two")
        one.transport.connect("two", two.address)
        two.transport.connect("one", one.address)
        for version in range(100):
            one.transport.send("two", stop_at(version))
            two.transport.send("one", stop_at(version))
        assert [(await two.next()).version for _ in range(100)] == list(range(100))
        assert [(await one.next()).version for _ in range(100)] == list(range(100))
        assert one.lost.empty()
        assert two.lost.empty()

    network(body)


def test_disconnect_delivers_what_was_sent_and_tells_only_the_other_side(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two")
        one.transport.connect("two", two.address)
        one.transport.send("two", Stop(job="first"))
        await two.next()
        for side, other in ((one, two), (two, one)):
            side.transport.send(other.name, Stop(job="last"))
            side.transport.disconnect(other.name)
            assert await other.next() == Stop(job="last")
            assert await other.next_lost() == side.name
            assert "closed the link" in other.transport.lost_reason(side.name)
            assert side.lost.empty()
            one.transport.connect("two", two.address)
            one.transport.send("two", Stop(job="again"))
            assert await two.next() == Stop(job="again")

    network(body)


def test_sending_without_a_link_loses_the_message_and_counts_it(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        one.transport.send("nobody", Stop(job="j"))
        assert one.transport.dropped_messages == 1

    tcp(body)


def test_an_error_in_a_callback_is_reported_and_the_link_goes_on(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        errors: list[Exception] = []
        got: asyncio.Queue[Message] = asyncio.Queue()

        def on_message(peer: str, message: Message) -> None:
            if message == Stop(job="bad"):
                raise RuntimeError("a bug")
            got.put_nowait(message)

        one = await network.start("one")
        two = await network.start("two", on_message=on_message, on_error=errors.append)
        one.transport.connect("two", two.address)
        one.transport.send("two", Stop(job="bad"))
        one.transport.send("two", Stop(job="good"))
        assert await asyncio.wait_for(got.get(), 30) == Stop(job="good")
        assert [str(error) for error in errors] == ["a bug"]

    tcp(body)


# --- loss -----------------------------------------------------------------------------------------------------------


def test_nobody_at_the_address_is_told_once_with_the_reason(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        gone = await network.start("gone")
        await gone.transport.close()
        one = await network.start("one", connect_seconds=0.1)
        one.transport.connect("gone", gone.address)
        assert await one.next_lost() == "gone"
        assert f"no answer from gone at {gone.address}" in one.transport.lost_reason("gone")
        assert one.transport.peers == []

    network(body)


def test_a_peer_that_starts_late_is_found(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        early = await network.start("late")
        await early.transport.close()
        one = await network.start("one", connect_seconds=30.0)
        one.transport.connect("late", early.address)
        one.transport.send("late", Stop(job="j"))
        late = await network.start("late", address=early.address)
        assert await late.next() == Stop(job="j")

    network(body)


def test_a_closed_peer_is_told_to_both_kinds_of_neighbour(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two, three = await network.start("one"), await network.start("two"), await network.start("three")
        one.transport.connect("two", two.address)
        two.transport.connect("three", three.address)
        one.transport.send("two", Stop(job="j"))
        await two.next()
        two.transport.send("three", Stop(job="j"))
        await three.next()
        await two.transport.close()
        assert await one.next_lost() == "two"
        assert await three.next_lost() == "two"

    network(body)


PEER = """
import asyncio, sys
from layerwise.transport import Transport

async def main():
    transport = Transport("child", on_message=lambda peer, m: transport.send(peer, m), on_lost=lambda peer: None)
    print(await transport.listen(sys.argv[1]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.close()

asyncio.run(main())
"""


@asynccontextmanager
async def child(address: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """An echoing transport in a process of its own, and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PEER, address), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_a_killed_process_is_lost_once(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        async with child(network.fresh_address()) as (process, address):
            one.transport.connect("child", address)
            one.transport.send("child", Stop(job="j"))
            assert await one.next() == Stop(job="j")
            process.kill()
            assert await one.next_lost() == "child"
            assert one.transport.peers == []

    network(body)


def test_a_paused_process_keeps_its_link(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", grace_seconds=0.01, connect_seconds=30.0)
        async with child(network.fresh_address()) as (process, address):
            one.transport.connect("child", address)
            one.transport.send("child", Stop(job="j"))
            await one.next()
            os.kill(process.pid, signal.SIGSTOP)
            tensors = [torch.randn(1 << 20) for _ in range(12)]
            for tensor in tensors:
                one.transport.send("child", forward(tensor))
            assert one.transport.outbox_bytes("child") > 0
            other = await network.start("other")
            one.transport.connect("other", other.address)
            for version in range(100):  # the loop goes on for the others
                one.transport.send("other", stop_at(version))
                await other.next()
            os.kill(process.pid, signal.SIGCONT)
            for tensor in tensors:
                assert torch.equal((await one.next()).inputs.items[0], tensor)
            assert one.lost.empty()

    network(body)


class Proxy:
    """Passes bytes on to ``target``, and can cut every connection at once, or swallow the bytes.

    Of connections that were there when ``swallow`` was called nothing arrives any more, and nobody is told. Those that are made
    while ``hole`` is set are no better.
    """

    def __init__(self, target: str) -> None:
        self.host, _, port = target.rpartition(":")
        self.port = int(port)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.writers: set[asyncio.StreamWriter] = set()
        self.open = True
        self.hole = False
        self.swallowed: set[asyncio.StreamReader] = set()
        self.readers: set[asyncio.StreamReader] = set()
        self.swallowed_bytes = 0

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self.server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.open:
            writer.transport.abort()
            return
        onward_reader, onward_writer = await asyncio.open_connection(self.host, self.port)
        self.writers |= {writer, onward_writer}
        self.readers |= {reader, onward_reader}
        if self.hole:
            self.swallow()
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.ensure_future(self._pump(source, sink))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                if source in self.swallowed:
                    self.swallowed_bytes += len(data)
                    continue
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            return
        finally:
            sink.transport.abort()

    def swallow(self) -> None:
        self.swallowed |= self.readers

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def close(self) -> None:
        self.open = False
        self.server.close()
        self.cut()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def test_a_restarted_peer_is_first_lost_then_new(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        server = await network.start("server", grace_seconds=30.0)
        for life in range(3):
            proxy = Proxy(server.address)
            client = await network.start("client", listen=False)
            client.transport.connect("server", await proxy.start())
            client.transport.send("server", stop_at(life))
            assert (await server.next()).version == life
            assert server.lost.qsize() == min(life, 1)
            if life:
                assert await server.next_lost() == "client"
            server.transport.send("client", stop_at(life))
            assert (await client.next()).version == life
            await proxy.close()

    tcp(body)


def test_nothing_is_lost_or_repeated_when_the_stream_breaks(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", grace_seconds=30.0)
        two = await network.start("two", grace_seconds=30.0)
        proxy = Proxy(two.address)
        one.transport.connect("two", await proxy.start())
        total = 300
        for version in range(total):
            one.transport.send("two", stop_at(version))
            one.transport.send("two", forward(torch.full((100_000,), version)))
        for version in range(total):
            assert (await two.next()).version == version
            tensor = (await two.next()).inputs.items[0]
            assert bool((tensor == version).all())
            two.transport.send("one", stop_at(version))
            if version % 30 == 7:
                proxy.cut()
        assert [(await one.next()).version for _ in range(total)] == list(range(total))
        assert one.lost.empty()
        assert two.lost.empty()
        await proxy.close()

    tcp(body)


def test_a_stream_that_stays_away_is_lost_on_both_sides(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", grace_seconds=0.1)
        two = await network.start("two", grace_seconds=0.1)
        proxy = Proxy(two.address)
        one.transport.connect("two", await proxy.start())
        one.transport.send("two", Stop(job="j"))
        await two.next()
        two.transport.send("one", Stop(job="j"))
        await one.next()
        await proxy.close()
        assert await one.next_lost() == "two"
        assert await two.next_lost() == "one"

    tcp(body)


def test_a_side_that_was_given_up_hears_so_when_it_comes_back(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", grace_seconds=30.0)
        two = await network.start("two", grace_seconds=0.05)
        proxy = Proxy(two.address)
        one.transport.connect("two", await proxy.start())
        one.transport.send("two", Stop(job="j"))
        await two.next()
        proxy.open = False
        proxy.cut()
        assert await two.next_lost() == "one"
        one.transport.send("two", Stop(job="too late"))
        proxy.open = True
        assert await one.next_lost() == "two"
        assert two.got.empty()
        await proxy.close()

    tcp(body)


# --- silence --------------------------------------------------------------------------------------------------------


async def greet(one: Process, two: Process) -> Proxy:
    """Connect both over a proxy; the link is up on both sides, and nothing is owed."""
    proxy = Proxy(two.address)
    one.transport.connect("two", await proxy.start())
    for side, other in ((one, two), (two, one)):
        side.transport.send(other.name, Stop(job="hello"))
        assert await other.next() == Stop(job="hello")
    return proxy


@pytest.mark.parametrize("sent_bytes", [4, 16 << 20], ids=["little", "more than buffers take"])
def test_a_network_that_swallows_everything_loses_the_link_on_both_sides(
    sent_bytes: int, tcp: Callable[[Body], None]
) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", silence_seconds=0.4, grace_seconds=0.2)
        two = await network.start("two", silence_seconds=0.4, grace_seconds=0.2)
        proxy = await greet(one, two)
        proxy.hole = True
        proxy.swallow()
        for side, other in ((one, "two"), (two, "one")):
            side.transport.send(other, forward(torch.zeros(sent_bytes // 4)))
        assert await one.next_lost() == "two"
        assert await two.next_lost() == "one"
        # Who gives up first ends the connection, which the other one may see before its own patience is over.
        reasons = one.transport.lost_reason("two"), two.transport.lost_reason("one")
        assert any("asked for a sign of life and gave none for 0.4 s" in reason for reason in reasons)
        assert (one.transport.peers, two.transport.peers) == ([], [])
        assert proxy.swallowed_bytes > 0
        await proxy.close()

    tcp(body)


def test_a_black_hole_that_ends_in_time_loses_and_doubles_nothing(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", silence_seconds=0.2, grace_seconds=30.0)
        two = await network.start("two", silence_seconds=0.2, grace_seconds=30.0)
        proxy = await greet(one, two)
        for round_number in range(3):
            proxy.swallow()  # of these connections nothing is heard any more, but others can be made
            versions = range(20 * round_number, 20 * round_number + 20)
            for version in versions:
                one.transport.send("two", stop_at(version))
                two.transport.send("one", stop_at(version))
            assert [(await two.next()).version for _ in versions] == list(versions)
            assert [(await one.next()).version for _ in versions] == list(versions)
        assert proxy.swallowed_bytes > 0
        assert one.lost.empty()
        assert two.lost.empty()
        await proxy.close()

    tcp(body)


# --- strangers ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def raw_stream(address: str) -> AsyncIterator[Any]:
    channel = open_channel(parse_address(address))
    try:
        yield channel.stream_stream(f"/{SERVICE}/Link")()
    finally:
        await channel.close()


async def status_of(address: str, *frames: bytes) -> tuple[grpc.StatusCode, str]:
    """How the server ends a stream with these frames."""
    async with raw_stream(address) as call:
        try:
            for frame in frames:
                await call.write(frame)
            while (await asyncio.wait_for(call.read(), 30)) is not grpc.aio.EOF:
                pass
        except grpc.RpcError:
            pass
        return await call.code(), await call.details()


def frame(payload: bytes = b"", **changes: Any) -> bytes:
    fields = {"wire_version": WIRE_VERSION, "sender": 7, "name": "stranger"} | changes
    return pb2.Frame(header=pb2.FrameHeader(**fields), payload=payload).SerializeToString()


def packet(sequence: int = 1, payload_bytes: int = 0, **header: Any) -> pb2.Packet:
    envelope = pb2.Envelope(stop=pb2.Stop(job="j"))
    if header:
        tensor = pb2.TensorHeader(**({"dtype": "float32", "shape": [1], "strides": [1], "num_bytes": 4} | header))
        tensors = pb2.Tensors(items=[tensor], single=True)
        attempt = pb2.Attempt(microbatch=pb2.Microbatch(stop=3))
        envelope = pb2.Envelope(boundary_gradient=pb2.BoundaryGradient(attempt=attempt, gradients=tensors))
    return pb2.Packet(sequence=sequence, envelope=envelope, payload_bytes=payload_bytes)


BAD = {
    "noise": ([b"\x99 noise"], "do not begin with a header"),
    "empty": ([b""], "do not begin with a header"),
    "no name": ([frame(name="")], "must say its sender's name"),
    "truncated": ([frame()[:-4]], "cut off"),
    "second frame is noise": ([frame(), b"\xff"], "do not begin with a header"),
    "oversized tensors": (
        [frame(b"1234", payload_sequence=1, packets=[packet(payload_bytes=1 << 62)])],
        "bytes of tensors, the limit is",
    ),
    "wrong dtype": (
        [frame(b"1234", payload_sequence=1, packets=[packet(payload_bytes=4, dtype="object")])],
        "dtype 'object'",
    ),
    "wrong size": (
        [frame(b"1234", payload_sequence=1, packets=[packet(payload_bytes=4, num_bytes=8)])],
        "8 were announced",
    ),
    "acknowledges what was never sent": ([frame(acknowledged=99)], "acknowledges packet 99"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_refused_and_harms_nobody_else(name: str, tcp: Callable[[Body], None]) -> None:
    frames, words = BAD[name]

    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two")
        one.transport.connect("two", two.address)
        code, details = await status_of(two.address, *frames)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in details
        one.transport.send("two", Stop(job="j"))
        assert await two.next() == Stop(job="j")

    tcp(body)


def test_a_frame_beyond_the_size_limit_is_not_even_read(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        channel = grpc.aio.insecure_channel(one.address)
        call = channel.stream_stream(f"/{SERVICE}/Link")()
        await call.write(bytes(5 << 20))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await channel.close()
        assert one.transport.received_bytes == 0

    tcp(body)


def test_a_client_of_another_wire_version_is_refused_with_both_versions(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        code, details = await status_of(one.address, frame(wire_version=99))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "wire version 99" in details
        assert f"speaks {WIRE_VERSION}" in details

    tcp(body)


async def foreign_server(handle: Callable[[Any, Any], Awaitable[None]]) -> tuple[grpc.aio.Server, str]:
    server = await make_server(handle)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("answer", "words"),
    [(frame(wire_version=99), "wire version 99"), (b"noise", "do not begin with a header")],
    ids=["version", "noise"],
)
def test_a_server_that_answers_wrongly_is_lost_with_the_reason(
    answer: bytes, words: str, tcp: Callable[[Body], None]
) -> None:
    async def body(network: Network) -> None:
        async def handle(request_iterator: Any, context: Any) -> None:
            await context.read()
            await context.write(answer)
            await context.read()

        server, address = await foreign_server(handle)
        one = await network.start("one")
        one.transport.connect("two", address)
        assert await one.next_lost() == "two"
        assert words in one.transport.lost_reason("two")
        await server.stop(None)

    tcp(body)


def test_a_server_that_refuses_is_lost_at_once_with_its_words(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        async def handle(request_iterator: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wire version 1 was received, I speak 2")

        server, address = await foreign_server(handle)
        one = await network.start("one", connect_seconds=60.0)
        one.transport.connect("two", address)
        assert await one.next_lost() == "two"
        assert "refused the link: wire version 1 was received, I speak 2" in one.transport.lost_reason("two")
        await server.stop(None)

    tcp(body)


def test_something_else_at_the_address_is_lost_at_once(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        one = await network.start("one", connect_seconds=60.0)
        one.transport.connect("two", f"127.0.0.1:{port}")
        assert await one.next_lost() == "two"
        assert "refused the link" in one.transport.lost_reason("two")
        await server.stop(None)

    tcp(body)


# --- listening ------------------------------------------------------------------------------------------------------


def test_listening_beyond_this_host_needs_insecure(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", listen=False)
        for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.invalid:0"):
            with pytest.raises(NotAllowedError, match="--insecure"):
                await one.transport.listen(address)
        assert (await one.transport.listen("0.0.0.0:0", insecure=True)).startswith("0.0.0.0:")

    tcp(body)


def test_a_taken_address_is_refused(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two", listen=False)
        with pytest.raises(ConfigError, match="taken"):
            await two.transport.listen(one.address)
        two.transport.connect("one", one.address)
        two.transport.send("one", Stop(job="j"))
        assert await one.next() == Stop(job="j")

    network(body)


def test_a_socket_in_a_folder_open_to_others_is_refused(socket_folder: Path) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", listen=False)
        socket_folder.chmod(0o755)
        with pytest.raises(NotAllowedError, match="mode 0755"):
            await one.transport.listen(f"unix:{socket_folder}/x.sock")
        made = await one.transport.listen(f"unix:{socket_folder}/new/x.sock")
        assert made == f"unix:{socket_folder}/new/x.sock"
        assert (socket_folder / "new").stat().st_mode & 0o777 == 0o700

    run(body, "unix", socket_folder)


@pytest.mark.parametrize(
    "address", ["", "nonsense", "host:", "host:port", "host:70000", ":80", "unix:", "unix:" + "x" * 200]
)
def test_what_is_no_address_is_refused(address: str, tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", listen=False)
        with pytest.raises(ConfigError, match="address"):
            await one.transport.listen(address)

    tcp(body)


def test_the_health_service_answers(network: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        async with grpc.aio.insecure_channel(one.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING

    network(body)


def test_other_services_share_the_port(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        async def get_job(request: bytes, context: Any) -> bytes:
            return request

        def add(server: grpc.aio.Server) -> None:
            methods = {"GetJob": grpc.unary_unary_rpc_method_handler(get_job)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", methods),))

        one = await network.start("one", listen=False)
        one.transport.add_servicer(add)
        address = await one.transport.listen("127.0.0.1:0")
        async with grpc.aio.insecure_channel(address) as channel:
            assert await channel.unary_unary("/a.B/GetJob")(b"hello", timeout=30) == b"hello"

    tcp(body)


def test_heartbeats_cost_few_bytes(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two")
        one.transport.connect("two", two.address)
        one.transport.send("two", Heartbeat())
        await two.next()
        before = one.transport.sent_bytes
        one.transport.send("two", Heartbeat(resident_bytes=1 << 30, cpu_seconds=1.5))
        await two.next()
        assert one.transport.sent_bytes - before < 100

    tcp(body)
