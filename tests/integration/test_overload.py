"""Clients that ask for more than a coordinator will hold: refused in one sentence, and everything else goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from layerwise.client import CoordinatorClient
from layerwise.errors import BusyError, ConfigError
from layerwise.proto.calls import CALLS, ClientRequest, JobsPage
from layerwise.proto.frames import MAX_FRAME_BYTES
from layerwise.server.coordinator import Coordinator
from layerwise.server.job_queue import MAX_QUEUED
from layerwise.specification import MAX_TEXT_BYTES, MAX_VALUES

Answer = TypeVar("Answer")


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator()
    await coordinator.open(listen=f"unix:{folder}/coordinator.sock")
    try:
        yield coordinator
    finally:
        await coordinator.close()


async def ask(coordinator: Coordinator, question: Callable[[CoordinatorClient], Answer]) -> Answer:
    def call() -> Answer:
        with CoordinatorClient(coordinator.address) as client:
            return question(client)

    return await asyncio.to_thread(call)


def job_in(folder: Path, name: str = "toy", **sections: Any) -> str:
    job = {"name": name, "model": "mlp", "data": "digits", "train": {"steps": 1}, "cluster": {"shards": 1}}
    return json.dumps({**job, "checkpoint": {"path": str(folder / name)}, **sections})


def page(client: CoordinatorClient, offset: int) -> JobsPage:
    found = client._call("ListJobs", ClientRequest(offset=offset))
    assert isinstance(found, JobsPage)
    return found


def test_a_thousand_jobs_wait_and_the_next_one_is_refused(socket_folder: Path) -> None:
    def submit_all(client: CoordinatorClient) -> None:
        for number in range(MAX_QUEUED):
            client.submit(job_in(socket_folder, name=f"toy{number % 7}"))

    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            await ask(coordinator, submit_all)
            with pytest.raises(BusyError, match=f"{MAX_QUEUED} jobs wait already, and at most {MAX_QUEUED} may"):
                await ask(coordinator, lambda client: client.submit(job_in(socket_folder)))
            documents = await ask(coordinator, lambda client: client.list_jobs())
            assert len({one["job"] for one in documents}) == MAX_QUEUED
            positions = [one["queue_position"] for one in documents]
            assert positions == list(range(positions[0], positions[0] + MAX_QUEUED))
            last = await ask(coordinator, lambda client: page(client, MAX_QUEUED - 50))
            assert (len(last.documents), last.next_offset) == (50, 0)
            none = await ask(coordinator, lambda client: page(client, (1 << 64) - 1))
            assert (none.documents, none.next_offset) == ([], 0)
            cancelled = documents[500]["job"]
            await ask(coordinator, lambda client: client.cancel(cancelled))
            await ask(coordinator, lambda client: client.submit(job_in(socket_folder)))

    asyncio.run(scenario())


def test_a_list_of_large_jobs_comes_in_pages_that_fit_into_a_message(socket_folder: Path) -> None:
    large = job_in(socket_folder, model={"import": "my_model:build", "words": "x" * 250_000})
    sizes: list[int] = []

    def list_them(client: CoordinatorClient) -> int:
        offset = 0
        found = 0
        while True:
            one = page(client, offset)
            found += len(one.documents)
            sizes.append(len(json.dumps(one.documents)))
            if not one.next_offset:
                return found
            assert one.next_offset > offset
            offset = one.next_offset

    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            for _ in range(8):
                await ask(coordinator, lambda client: client.submit(large))
            assert await ask(coordinator, list_them) == 8
            assert max(sizes) < MAX_FRAME_BYTES
            assert len(sizes) == 2
            assert len(await ask(coordinator, lambda client: client.list_jobs())) == 8

    asyncio.run(scenario())


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" " * (MAX_TEXT_BYTES + 1), f"larger than {MAX_TEXT_BYTES} bytes, so this can't be a job file"),
        (f'{{"name": "toy", "model": {deep(60)}}}', "or 50 levels, so this can't be a job file"),
        (f'{{"name": "toy", "model": {deep(100_000)}}}', "job"),
        (
            "a: &a [1,2,3,4,5,6,7,8,9]\n"
            + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(8)),
            f"more than {MAX_VALUES} values",
        ),
        (json.dumps({f"k{n}": 1 for n in range(15_000)}), "and 14[0-9]* problems more"),
        (json.dumps({"k" * 200_000: 1}), "unknown key"),
        ("a: 1" + "_" * 200_000 + "x", "unknown key"),
        (
            "k0: &k0 {a: 1, b: 2, c: 3}\n"
            + "".join(f"k{n + 1}: &k{n + 1} {{<<: [{','.join([f'*k{n}'] * 90)}]}}\n" for n in range(8)),
            "unknown key",
        ),
        ("k0: &k0 {a: 1}\nk1: {<<: [" + "*k0," * 101 + "]}", "it merges 101 maps, at most 100 are allowed"),
        ('{"name": "toy", "name": "toy"}', "comes twice"),
        ("name: !!python/object/apply:os.system [true]", "not readable as YAML"),
        ('{"name": "toy", "train": {"steps": ' + "9" * 5000 + "}}", "job"),
        ("\x00", "not readable as YAML"),
    ],
)
def test_no_text_that_is_not_a_job_is_taken_for_one(socket_folder: Path, text: str, words: str) -> None:
    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            with pytest.raises(ConfigError, match=words) as refusal:
                await ask(coordinator, lambda client: client.submit(text))
            assert len(str(refusal.value)) < 20_000
            assert await ask(coordinator, lambda client: client.list_jobs()) == []

    asyncio.run(scenario())


def test_a_job_file_of_a_hundred_megabytes_is_refused_before_it_is_decoded(socket_folder: Path) -> None:
    call = CALLS["Submit"]

    def submit(address: str) -> None:
        with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
            channel.unary_unary(call.path)(b"\x12" + b"\x80\x80\x80\x32" + bytes(100 << 20), timeout=60)

    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            with pytest.raises(grpc.RpcError) as refusal:
                await asyncio.to_thread(submit, coordinator.address)
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
            assert await ask(coordinator, lambda client: client.list_jobs()) == []

    asyncio.run(scenario())


def test_bytes_that_are_no_request_are_refused_as_such(socket_folder: Path) -> None:
    def call(address: str) -> list[grpc.StatusCode]:
        codes = []
        with grpc.insecure_channel(address) as channel:
            for one in CALLS.values():
                method = channel.unary_stream if one.name == "FollowEvents" else channel.unary_unary
                try:
                    list(method(one.path)(b"\xff\xff\xff", timeout=30))
                except grpc.RpcError as error:
                    codes.append(error.code())  # type: ignore[attr-defined]
        return codes

    async def scenario() -> None:
        async with running(socket_folder) as coordinator:
            codes = await asyncio.to_thread(call, coordinator.address)
            assert codes == [grpc.StatusCode.OUT_OF_RANGE] * len(CALLS)

    asyncio.run(scenario())
