"""Peers that break every rule while a job trains: all of it is refused, and the job ends as if they had not been there."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import torch

from layerwise.api import Connection
from layerwise.client import CoordinatorClient
from layerwise.cluster import LocalCluster
from layerwise.entrance import Limits
from layerwise.errors import ConfigError
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Abort,
    AttemptsClosed,
    BlockClosed,
    BoundaryGradient,
    CommitCut,
    CutCommitted,
    CutSaved,
    CutTaken,
    EvaluateForward,
    Failure,
    Forward,
    Hello,
    LeaseRequest,
    Message,
    NamedTensors,
    NotFinite,
    Offer,
    Outcome,
    PushGradient,
    ReleaseCut,
    Role,
    StartTraining,
    Stop,
    StopAt,
    Stopping,
    TaskFinished,
    TaskRequest,
    Tensors,
    Unassign,
    Unassigned,
    Workers,
)
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.proto.calls import CALLS
from layerwise.proto.frames import FrameHeader, FrameWriter, encode_message
from layerwise.streams import SERVICE
from layerwise.version import WIRE_VERSION
from tests.integration.conftest import start
from tests.integration.jobs import OPTIMIZERS, Gate, check_done, check_equal_to_plain_loop, job, wait, wait_for_cut

GROWTH_BYTES = 128 << 20
"""How much larger a process may be after the attack; the streams and frames of it would be gigabytes."""
SILENT = 300
"""Streams to each process that say nothing."""
REASONS = ("malformed", "version", "name", "unexpected", "silent")
"""For what every process refuses something; see `layerwise.refusals.Refused`."""
FREE = 10 * 16
STEPS = 20


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with start(shards=2, forward=2, directory=tmp_path_factory.mktemp("attacked")) as running:
        running.wait_for_nodes()
        yield running
        assert running.problems == (), "a process ended that no test has killed"


def frame(payload: bytes = b"", **changes: Any) -> bytes:
    fields = {"wire_version": WIRE_VERSION, "sender": 7, "name": "stranger"} | changes
    return pb2.Frame(header=pb2.FrameHeader(**fields), payload=payload).SerializeToString()


def tensor_packet(**header: Any) -> pb2.Packet:
    tensor = pb2.TensorHeader(**({"dtype": "float32", "shape": [1], "strides": [1], "num_bytes": 4} | header))
    attempt = pb2.Attempt(microbatch=pb2.Microbatch(stop=3))
    gradient = pb2.BoundaryGradient(attempt=attempt, gradients=pb2.Tensors(items=[tensor], single=True))
    return pb2.Packet(sequence=1, envelope=pb2.Envelope(boundary_gradient=gradient), payload_bytes=4)


STOP = pb2.Envelope(stop=pb2.Stop(job="j"))
BAD_FRAMES = {
    "noise": (b"\x99 noise", "INVALID_ARGUMENT"),
    "truncated": (frame()[:-4], "INVALID_ARGUMENT"),
    "version": (frame(wire_version=99), "FAILED_PRECONDITION"),
    "no name": (frame(name=""), "INVALID_ARGUMENT"),
    "control characters": (frame(name="\x1b[2J"), "INVALID_ARGUMENT"),
    "no sender": (frame(sender=0), "INVALID_ARGUMENT"),
    "dtype": (frame(b"1234", payload_sequence=1, packets=[tensor_packet(dtype="object")]), "INVALID_ARGUMENT"),
    "shape": (frame(b"1234", payload_sequence=1, packets=[tensor_packet(shape=[1 << 62])]), "INVALID_ARGUMENT"),
    "size": (frame(b"1234", payload_sequence=1, packets=[tensor_packet(num_bytes=1 << 60)]), "INVALID_ARGUMENT"),
    "empty envelope": (frame(packets=[pb2.Packet(sequence=1)]), "INVALID_ARGUMENT"),
    "many": (frame(packets=[pb2.Packet(sequence=n + 1, envelope=STOP) for n in range(5000)]), "INVALID_ARGUMENT"),
    "oversized": (bytes(5 << 20), "RESOURCE_EXHAUSTED"),
}


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield channel


def open_stream(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(f"/{SERVICE}/Link")()


async def answer(address: str, data: bytes) -> str:
    """How a stream ends that begins with this frame."""
    async with channel_to(address) as channel:
        call = open_stream(channel)
        try:
            await call.write(data)
            while await asyncio.wait_for(call.read(), 60) is not grpc.aio.EOF:
                pass
        except grpc.RpcError:
            pass
        return str((await call.code()).name)


ATTEMPT = Attempt(Microbatch(0, 0, 4))


def nonsense(name: str) -> list[Message]:
    """What only others may say about a job, or nobody; the lives are those of a first run."""
    tensors = Tensors((torch.zeros(3, 7, dtype=torch.float64),))
    named = NamedTensors(("weight",), (torch.zeros(2, dtype=torch.int8),))
    found: list[Message] = []
    for life in (0, 1, 2, 3, 1 << 40):
        base: dict[str, Any] = {"job": name, "attempt": ATTEMPT, "number": life, "life": life}
        found += [
            Forward(**base, needed_from=0, inputs=tensors, targets=tensors),
            BoundaryGradient(**base, gradients=tensors),
            BlockClosed(**base, block=1, outcome=Outcome.APPLIED, loss=0.0),
            Abort(**base),
            NotFinite(**base),
            PushGradient(**base, layer=9, revision=0, read=0, gradients=named),
            TaskFinished(**base, gradients=None),
            StopAt(job=name, version=1, life=life),
            TaskRequest(job=name, life=life),
            EvaluateForward(job=name, version=5, start=0, stop=4, life=life, inputs=tensors, targets=tensors),
            EvaluateForward(job=name, version=5, start=-9, stop=1 << 40, life=life, inputs=tensors, targets=tensors),
        ]
    return [
        *found,
        Offer(job=name, attempt=ATTEMPT, life=0),
        Offer(job=name, attempt=Attempt(Microbatch(7, 1, 3)), life=1),
        StartTraining(job=name, done_json="[" * 5000),
        Stop(job=name),
        Stopping(job=name, version=1),
        ReleaseCut(job=name, version=1 << 40),
        Unassign(job=name),
        Unassigned(job=name),
        Workers(job=name, names=("talker",)),
        Failure(job=name, message="the job can't go on"),
        LeaseRequest(job=name, count=1 << 60),
        AttemptsClosed(job=name, closed=(), active_seconds=float("nan")),
        CutTaken(job=name, block=0, version=3),
        CutSaved(job=name, block=0, version=3, error="x"),
        CutCommitted(job=name, version=3, error="x"),
        CommitCut(job=name, version=3, files=(), manifest_json="{}", keep=()),
    ]


def hello(name: str, role: Role, address: str = "nonsense", **changes: Any) -> Hello:
    return Hello(role=role, name=name, address=address, device="cpu", host="h", pid=1, version="1", **changes)


def hold_silent_streams(channel: grpc.aio.Channel) -> list[Any]:
    return [open_stream(channel) for _ in range(100)]


async def talk(address: str, name: str, messages: list[Message]) -> str:
    """Say all this as a peer of that name; gives how the stream ends, which is after all of it was read, or refused."""
    writer = FrameWriter()
    for sequence, message in enumerate(messages, 1):
        writer.add(sequence, encode_message(message))
    async with channel_to(address) as channel:
        call = open_stream(channel)
        try:
            while not writer.empty:
                await call.write(writer.next_frame(FrameHeader(sender=77, receiver=0, acknowledged=0, name=name)))
            await call.done_writing()
            while await asyncio.wait_for(call.read(), 60) is not grpc.aio.EOF:
                pass
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass
        return str((await call.code()).name)


async def attack(addresses: dict[str, str], running: str) -> None:
    """One of everything, to every process that listens."""
    shards = [name for name in addresses if name.startswith("shard")]
    for peer, address in addresses.items():
        for what, (data, code) in BAD_FRAMES.items():
            assert await answer(address, data) == code, (peer, what)
        for number in range(200):
            async with channel_to(address) as channel:
                await open_stream(channel).write(frame(name=f"name-{number}", sender=1000 + number))
        messages = nonsense(running) + nonsense("unknown-job")
        if peer == "coordinator":
            tensors = [message for message in messages if encode_message(message).payload_bytes]
            for message in tensors:
                assert await talk(address, "talker", [message]) == "INVALID_ARGUMENT"
            messages = [message for message in messages if not encode_message(message).payload_bytes]
        assert await talk(address, "talker", messages) == "OK"
    for shard in shards:
        assert await answer(addresses[shard], frame(name="coordinator", sender=99)) == "PERMISSION_DENIED"
        assert await answer(addresses["coordinator"], frame(name=shard, sender=99)) == "ALREADY_EXISTS"
    assert await answer(addresses["coordinator"], frame(name="forward-0", sender=99)) == "ALREADY_EXISTS"
    assert await answer(addresses["shard-1"], frame(name="shard-0", sender=99)) == "ALREADY_EXISTS"
    assert await answer(addresses["shard-0"], frame(name="forward-0", sender=99)) == "ALREADY_EXISTS"
    floods: list[Message] = [hello("somebody-else", Role.FORWARD) for _ in range(2000)]
    await talk(addresses["coordinator"], "flood", floods)
    await talk(addresses["coordinator"], "flood", [hello("flood", Role.CLIENT)] * 2000)
    await talk(addresses["coordinator"], "flood", [hello("flood", Role.SHARD)] * 2000)
    large = hello("large", Role.FORWARD, allowed_imports=("x" * 1000,) * 1500)
    await talk(addresses["coordinator"], "large", [large])


def send_what_is_no_job(address: str) -> None:
    call = CALLS["Submit"]
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            channel.unary_unary(call.path)(bytes(100 << 20), timeout=60)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    with CoordinatorClient(address) as client:
        for _ in range(100):
            with pytest.raises(ConfigError):
                client.submit('{"name": "x", "model": {"name": "mlp"}, "data": "nothing"}')


async def whole_attack(addresses: dict[str, str], running: str) -> None:
    """Hundreds of streams to each process that say nothing; the attack, while some of them and one that never reads stay."""
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for address in addresses.values()
        for _ in range(SILENT // 100)
    ]
    try:
        silent = [call for channel in channels for call in hold_silent_streams(channel)]
        left = {asyncio.ensure_future(call.code()) for call in silent}
        while len(left) > len(addresses) * Limits().silent_streams:
            done, left = await asyncio.wait(left, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            assert done
        async with channel_to(addresses["coordinator"]) as channel:
            deaf = open_stream(channel)
            await deaf.write(frame(name="deaf", sender=5, packets=[pb2.Packet(sequence=1, envelope=STOP)]))
            await attack(addresses, running)
        for one in silent:
            one.cancel()
        await asyncio.gather(*left)
    finally:
        for channel in channels:
            await channel.close()


@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 6}], ids=["in order", "asynchronous"])
def test_a_job_trains_as_if_nobody_attacked(
    attacked: LocalCluster, tmp_path: Path, gate: Gate, settings: dict[str, Any]
) -> None:
    with Connection(attacked.coordinator_address) as connection, attacked.client() as client:
        nodes = {node["name"]: node for node in client.list_nodes()}
        addresses = {name: node["address"] for name, node in nodes.items() if node["role"] == "shard"}
        addresses["coordinator"] = attacked.coordinator_address
        processes = {name: psutil.Process(node["pid"]) for name, node in nodes.items()}
        running = connection.submit(
            job(
                tmp_path / "run",
                gate.data(samples=64, free=FREE),
                {"name": "mlp", "hidden": [16, 16, 16], "batchnorm": True, "outputs": 4},
                train={"steps": STEPS, "seed": 3, "optimizer": OPTIMIZERS["momentum"]},
                checkpoint={"path": str(tmp_path / "run"), "every": 2},
                cluster={"shards": 2, "forward": 2},
                **{"async": {**settings, "accumulation": 4}},
            )
        )
        wait_for_cut(running, 2)
        before = {name: process.memory_info().rss for name, process in processes.items()}
        with ThreadPoolExecutor(1) as attacker:
            attack = attacker.submit(lambda: asyncio.run(whole_attack(addresses, running.id)))
            send_what_is_no_job(attacked.coordinator_address)
            attack.result(240)
        gate.open()
        result = wait(running)
        check_done(result)
        if settings["window"] == 1:
            check_equal_to_plain_loop(result)
        for name, process in processes.items():
            assert process.is_running(), f"{name} did not survive"
            growth = process.memory_info().rss - before[name]
            assert growth < GROWTH_BYTES, f"{name} has grown by {growth >> 20} MB"
        after = {node["name"]: node for node in client.list_nodes()}
        for name, node in nodes.items():
            assert after[name]["incarnation"] == node["incarnation"], f"{name} was taken for lost"
        for name in addresses:
            with urllib.request.urlopen(f"http://{nodes[name]['metrics_address']}/metrics", timeout=30) as page:
                text = page.read().decode()
            for reason in (*REASONS, "hello" if name == "coordinator" else "tensor"):
                assert f'layerwise_refused_frames_total{{reason="{reason}"}} 0.0' not in text, reason
                assert f'layerwise_refused_frames_total{{reason="{reason}"}}' in text
