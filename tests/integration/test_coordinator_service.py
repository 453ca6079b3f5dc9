"""The coordinator with its links, clients, store and metrics, and processes that play by the book."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from layerwise.client import CoordinatorClient
from layerwise.errors import ConfigError, NotAllowedError, NotFoundError
from layerwise.fault_points import Operation, points
from layerwise.messages import Hello, Message, Role, Welcome
from layerwise.metrics_server import MetricsServer
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.server.coordinator import Coordinator
from layerwise.transport import Transport
from layerwise.version import WIRE_VERSION
from tests.unit.played_cluster import PlayedCluster, spec

Answer = TypeVar("Answer")


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator(state=folder / "state")
    await coordinator.open(listen=f"unix:{folder}/coordinator.sock", **options)
    try:
        yield coordinator
    finally:
        await coordinator.close()


@asynccontextmanager
async def played_processes(
    coordinator: Coordinator, *names: str
) -> AsyncIterator[tuple[PlayedCluster, dict[str, Transport]]]:
    """Processes on links of their own; together they behave as `PlayedCluster` does."""
    played = PlayedCluster()
    transports: dict[str, Transport] = {}
    for name in names:
        await present(coordinator, played, transports, name)
    try:
        yield played, transports
    finally:
        for transport in transports.values():
            await transport.close()


async def present(coordinator: Coordinator, played: PlayedCluster, transports: dict[str, Transport], name: str) -> None:
    """A process begins, with nothing in it, and presents itself."""

    def answer(name: str) -> Callable[[str, Message], None]:
        def on_message(peer: str, message: Message) -> None:
            if not isinstance(message, Welcome):
                played._play(name, message)
                while played._inbox:
                    sender, said = played._inbox.popleft()
                    transports[sender].send("coordinator", said)

        return on_message

    role = Role(name.partition("-")[0])
    played.roles[name] = role
    played.blocks.pop(name, None)
    transports[name] = Transport(name, on_message=answer(name), on_lost=lambda peer: None)
    transports[name].connect("coordinator", coordinator.address)
    hello = Hello(role=role, name=name, address=f"unix:/{name}", device="cpu", host="here", pid=1, version="1")
    transports[name].send("coordinator", hello)


async def ask(coordinator: Coordinator, question: Callable[[CoordinatorClient], Answer]) -> Answer:
    def call() -> Answer:
        with CoordinatorClient(coordinator.address) as client:
            return question(client)

    return await asyncio.to_thread(call)


def job_in(folder: Path) -> str:
    return spec(checkpoint={"path": str(folder / "runs")})


def test_a_client_submits_follows_and_reads_the_result(socket_folder: Path) -> None:
    async def scenario() -> None:
        async with (
            running(socket_folder) as coordinator,
            played_processes(coordinator, "shard-0", "shard-1", "forward-0"),
        ):
            submitted = await ask(coordinator, lambda client: client.submit(job_in(socket_folder)))
            events = await ask(coordinator, lambda client: list(client.follow_events(submitted["job"])))
            assert [event.offset for event in events] == list(range(len(events)))
            assert events[-1].message == "done: 10 updates of every layer"
            later = await ask(coordinator, lambda client: list(client.follow_events(submitted["job"], 3)))
            assert later == events[3:]
            document = await ask(coordinator, lambda client: client.get_job(submitted["job"]))
            assert (document["state"], document["samples"]) == ("done", 80)
            nodes = await ask(coordinator, lambda client: client.list_nodes())
            assert [node["name"] for node in nodes] == ["coordinator", "forward-0", "shard-0", "shard-1"]
            assert (nodes[0]["role"], nodes[0]["state"], nodes[0]["address"]) == (
                "coordinator",
                "serving",
                coordinator.address,
            )
            assert nodes[0]["resident_bytes"] > 0
            assert nodes[0].keys() == nodes[1].keys()

    asyncio.run(scenario())


def test_jobs_and_their_events_survive_a_restart(socket_folder: Path) -> None:
    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            job = (await ask(coordinator, lambda client: client.submit(job_in(socket_folder))))["job"]
        async with running(socket_folder) as coordinator:
            [document] = await ask(coordinator, lambda client: client.list_jobs())
            assert (document["job"], document["state"]) == (job, "queued")
            cancelled = await ask(coordinator, lambda client: client.cancel(job))
            assert cancelled["state"] == "cancelled"
            events = await ask(coordinator, lambda client: list(client.follow_events(job)))
            assert [event.offset for event in events] == list(range(len(events)))
            assert events[0].message == f"submitted as {job}"

    asyncio.run(scenario())


class FullDisk:
    """Refuses what the job store commits while it is `full`, and says when it was asked."""

    def __init__(self) -> None:
        self.full = False
        self.asked = threading.Semaphore(0)

    def before(self, operation: Operation) -> None:
        if self.full and operation.point == "job-store.commit":
            self.asked.release()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)

    def after(self, operation: Operation) -> None:
        pass


def test_a_shard_that_is_lost_while_the_disk_is_full_is_replaced_when_there_is_room(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator used to wait on its event loop for the disk, and to end when that took too long."""
    disk = FullDisk()
    monkeypatch.setattr(points, "watcher", disk)

    async def scenario() -> None:
        async with (
            running(socket_folder) as coordinator,
            played_processes(coordinator, "shard-0", "shard-1", "forward-0") as (played, transports),
        ):
            played.hold = lambda worker, lease: len(played.leases) >= 20
            job = (await coordinator.submit(job_in(socket_folder)))["job"]
            await until(coordinator, lambda: bool(played.held))
            # From here on only: a job that is submitted on a busy machine may have to wait for longer until it is on the disk.
            monkeypatch.setattr("layerwise.server.job_store.FLUSH_SECONDS", 0.05)
            monkeypatch.setattr("layerwise.server.coordinator.FLUSH_SECONDS", 0.05)
            disk.full = True
            await transports["shard-1"].close()
            await present(coordinator, played, transports, "shard-1")
            await until(coordinator, lambda: "must be told waits" in caplog.text)
            assert await asyncio.to_thread(disk.asked.acquire, timeout=60)
            assert "shard-1" not in played.blocks  # nobody has heard of a life that is not on the disk
            assert coordinator.job(job)["state"] == "running"  # and the coordinator answers
            assert coordinator.error is None
            disk.full = False
            await until(coordinator, lambda: "shard-1" in played.blocks)
            assert coordinator.error is None

    asyncio.run(scenario())


async def until(coordinator: Coordinator, reached: Callable[[], bool]) -> None:
    """Wait for the coordinator's tick after which it is so."""

    async def wait() -> None:
        while not reached():
            await coordinator._ticked.wait()

    await asyncio.wait_for(wait(), 60)


def test_refusals_reach_the_client_as_the_errors_they_are(socket_folder: Path) -> None:
    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            with pytest.raises(NotFoundError, match="no job 'toy-9' here"):
                await ask(coordinator, lambda client: client.get_job("toy-9"))
            with pytest.raises(NotFoundError, match="no job 'toy-9' here"):
                await ask(coordinator, lambda client: list(client.follow_events("toy-9")))
            with pytest.raises(ConfigError, match="model"):
                await ask(coordinator, lambda client: client.submit(json.dumps({"name": "toy", "data": "digits"})))
            with pytest.raises(NotFoundError, match="there is no durable cut in"):
                await ask(coordinator, lambda client: client.resume(directory=str(socket_folder / "nothing")))
            with pytest.raises(ConfigError, match="either a job's name or the directory"):
                await ask(coordinator, lambda client: client.resume())
            job = (await ask(coordinator, lambda client: client.submit(job_in(socket_folder))))["job"]
            with pytest.raises(NotAllowedError, match="is queued"):
                await ask(coordinator, lambda client: client.resume(job=job))

    asyncio.run(scenario())


def test_a_coordinator_whose_answers_take_long_is_reached_at_the_first_call(socket_folder: Path) -> None:
    """Even what it says when it accepts the connection is half a second on its way."""

    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            connections: list[asyncio.Task[Any] | None] = []

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connections.append(asyncio.current_task())
                path = coordinator.address.removeprefix("unix:")
                onward_reader, onward_writer = await asyncio.open_unix_connection(path)
                await asyncio.gather(pass_on(reader, onward_writer, 0.0), pass_on(onward_reader, writer, 0.5))

            async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, seconds: float) -> None:
                with suppress(ConnectionError):
                    while data := await source.read(1 << 16):
                        await asyncio.sleep(seconds)
                        sink.write(data)
                    sink.close()
                    await sink.wait_closed()

            async with await asyncio.start_server(accept, "127.0.0.1", 0) as far:
                host, port = far.sockets[0].getsockname()

                def list_jobs() -> list[dict[str, Any]]:
                    with CoordinatorClient(f"{host}:{port}") as client:
                        return client.list_jobs()

                assert await asyncio.to_thread(list_jobs) == []
                await asyncio.wait([task for task in connections if task is not None])

    asyncio.run(scenario())


def test_a_client_of_another_wire_version_is_told_so(socket_folder: Path) -> None:
    def call(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            method = channel.unary_unary(
                "/layerwise.v1.Coordinator/ListJobs",
                request_serializer=pb2.ListJobsRequest.SerializeToString,
                response_deserializer=pb2.JobsReply.FromString,
            )
            method(pb2.ListJobsRequest(wire_version=999), timeout=10)

    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            with pytest.raises(grpc.RpcError, match=f"speaks wire version 999, this coordinator {WIRE_VERSION}"):
                await asyncio.to_thread(call, coordinator.address)

    asyncio.run(scenario())


def test_two_coordinators_cannot_share_a_state_folder(socket_folder: Path) -> None:
    async def scenario() -> None:
        async with running(socket_folder):
            with pytest.raises(ConfigError, match="in use by another coordinator"):
                Coordinator(state=socket_folder / "state")

    asyncio.run(scenario())


def test_the_metrics_page_has_the_job_wide_view_while_a_job_runs(socket_folder: Path) -> None:
    async def scenario() -> None:
        async with running(socket_folder, metrics="127.0.0.1:0") as coordinator:
            page = await asyncio.to_thread(scrape, coordinator.metrics_address)
            assert 'layerwise_jobs{state="running"} 0.0' in page
            assert 'layerwise_processes{role="shard",state="free"} 0.0' in page
            assert "process_resident_memory_bytes" in page

    asyncio.run(scenario())


def test_a_taken_metrics_port_is_a_mistake_of_the_flag() -> None:
    server = MetricsServer("127.0.0.1:0", list)
    with pytest.raises(ConfigError, match=r"can.t listen on 127\.0\.0\.1:\d+: it is taken"):
        MetricsServer(server.address, list)
    server.close()
    with pytest.raises(NotAllowedError):
        MetricsServer("0.0.0.0:0", list)
    with pytest.raises(ConfigError, match="host:port"):
        MetricsServer("unix:/tmp/metrics.sock", list)


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        page: bytes = answer.read()
    return page.decode()
