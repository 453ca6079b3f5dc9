"""Streams that no layerwise process would open: each limit is kept, and the peers that are there notice nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import torch

from layerwise.entrance import Limits
from layerwise.messages import Stop
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.proto.frames import MAX_FRAME_PACKETS, MAX_MESSAGE_BYTES
from layerwise.refusals import Refusals, Refused
from layerwise.streams import SERVICE
from tests.contract.test_transport import Body, Network, child, forward, frame, packet, run, stop_at

torch.set_num_threads(1)


@pytest.fixture
def tcp(socket_folder: Path) -> Callable[[Body], None]:
    return lambda body: run(body, "tcp", socket_folder)


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield channel


def open_stream(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(f"/{SERVICE}/Link")()


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends, whatever comes before."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.RpcError:
        pass
    return await call.code(), await call.details()


async def check_alive(one: Any, two: Any) -> None:
    """Messages go both ways, on the link that was there."""
    one.transport.send(two.name, Stop(job="a"))
    assert await two.next() == Stop(job="a")
    two.transport.send(one.name, Stop(job="b"))
    assert await one.next() == Stop(job="b")
    assert one.lost.empty()
    assert two.lost.empty()


def test_of_a_thousand_streams_that_say_nothing_few_stay(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        limits = Limits(silent_streams=16)
        one = await network.start("one")
        two = await network.start("two", limits=limits, connect_seconds=60.0)
        one.transport.connect("two", two.address)
        await check_alive(one, two)
        before = psutil.Process().memory_info().rss
        async with (
            channel_to(two.address) as a, channel_to(two.address) as b, channel_to(two.address) as c,
            channel_to(two.address) as d, channel_to(two.address) as e, channel_to(two.address) as f,
            channel_to(two.address) as g, channel_to(two.address) as h,
        ):  # fmt: skip
            calls = [open_stream(channel) for channel in (a, b, c, d, e, f, g, h) for _ in range(125)]
            ends = [asyncio.ensure_future(ended(call)) for call in calls]
            left = set(ends)
            while len(left) > limits.silent_streams:
                done, left = await asyncio.wait(left, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert done
                for one_end in done:
                    code, details = one_end.result()
                    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert "more than 16 streams to two say nothing; the oldest end" in details
            late = await network.start("late")
            late.transport.connect("two", two.address)
            await check_alive(late, two)
            await check_alive(one, two)
            assert 1000 - 16 <= two.transport.refusals[Refused.SILENT] <= 1000 - 14
            assert psutil.Process().memory_info().rss - before < 256 << 20
            for call in calls:
                call.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    tcp(body)


def test_a_stream_that_says_nothing_ends_after_a_while(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", connect_seconds=0.05)
        async with channel_to(one.address) as channel:
            code, details = await asyncio.wait_for(ended(open_stream(channel)), 30)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details == "nothing was said on this stream for 0.05 s, so one ends it"

    tcp(body)


def test_nobody_takes_the_name_of_a_peer_that_is_there(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two", limits=Limits(answer_seconds=0.2))
        one.transport.connect("two", two.address)
        await check_alive(one, two)
        async with channel_to(two.address) as channel:
            for sender in range(100, 120):
                call = open_stream(channel)
                await call.write(frame(name="one", sender=sender))
                code, details = await ended(call)
                assert code is grpc.StatusCode.ALREADY_EXISTS
                assert details == "one has a link to two; another one takes its place only when it is gone"
                await check_alive(one, two)  # an answer, so that the next one begins anew
        assert two.transport.refusals[Refused.NAME] == 20

    tcp(body)


def test_the_name_of_a_peer_that_does_not_answer_can_be_taken(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", limits=Limits(answer_seconds=0.2))
        async with child(network.fresh_address()) as (process, address):
            one.transport.connect("child", address)
            one.transport.send("child", Stop(job="j"))
            await one.next()
            os.kill(process.pid, signal.SIGSTOP)
            successor = await network.start("child", connect_seconds=60.0)
            successor.transport.connect("one", one.address)
            successor.transport.send("one", Stop(job="new"))
            assert await one.next() == Stop(job="new")
            assert await one.next_lost() == "child"
            os.kill(process.pid, signal.SIGCONT)
            await check_alive(one, successor)

    tcp(body)


def test_who_is_only_dialed_cannot_call(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", dialed_only=("coordinator",))
        async with channel_to(one.address) as channel:
            for name in ("coordinator", "one"):
                call = open_stream(channel)
                await call.write(frame(name=name))
                code, details = await ended(call)
                assert code is grpc.StatusCode.PERMISSION_DENIED
                assert details == f"one takes no stream from one that calls itself {name}: it opens that link itself"
        assert one.transport.peers == []

    tcp(body)


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "\x1b[2J"])
def test_what_is_no_name_is_refused(name: str, tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        async with channel_to(one.address) as channel:
            call = open_stream(channel)
            await call.write(frame(name=name))
            code, details = await ended(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "must say its sender's name" in details
        assert one.transport.refusals[Refused.MALFORMED] == 1

    tcp(body)


def test_a_peer_has_so_many_streams_and_no_more(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", limits=Limits(streams_of_a_peer=4))
        async with channel_to(one.address) as channel:
            calls = [open_stream(channel) for _ in range(30)]
            for call in calls:
                await call.write(frame(name="peer"))
            left = {asyncio.ensure_future(ended(call)) for call in calls}
            refused = []
            while len(left) > 1:  # one of them carries the link
                done, left = await asyncio.wait(left, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert done
                ends = [one_end.result() for one_end in done]
                refused += [details for code, details in ends if code is grpc.StatusCode.RESOURCE_EXHAUSTED]
            for call in calls:
                call.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        assert refused
        assert set(refused) == {"peer has 4 streams to one already; close some first"}
        assert one.transport.refusals[Refused.STREAMS] == len(refused)

    tcp(body)


def test_more_names_than_the_limit_are_refused_and_the_first_go_on(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two", limits=Limits(peers=4))
        one.transport.connect("two", two.address)
        await check_alive(one, two)
        async with channel_to(two.address) as channel:
            calls = [open_stream(channel) for _ in range(20)]
            for number, call in enumerate(calls):
                await call.write(frame(name=f"stranger-{number}", sender=100 + number))
            ends = [asyncio.ensure_future(ended(call)) for call in calls]
            left = set(ends)
            while len(left) > 3:
                done, left = await asyncio.wait(left, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert {one.result() for one in done} == {
                    (grpc.StatusCode.RESOURCE_EXHAUSTED, "two has links to 4 peers, which is its limit")
                }
            await check_alive(one, two)
            for call in calls:
                call.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    tcp(body)


def test_announced_bytes_are_bounded_over_all_streams(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one, two = await network.start("one"), await network.start("two", limits=Limits(receiving_bytes=3 << 20))
        one.transport.connect("two", two.address)
        await check_alive(one, two)
        async with channel_to(two.address) as channel:
            for number in range(6):
                call = open_stream(channel)
                opening = frame(
                    b"1234", name=f"s{number}", sender=50 + number, payload_sequence=1,
                    packets=[packet(payload_bytes=1 << 20, num_bytes=1 << 20)],
                )  # fmt: skip
                await call.write(opening)
                if number < 3:
                    assert await call.read() is not grpc.aio.EOF  # the first frame from the other side: it was taken
                    continue
                code, details = await ended(call)
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert f"4194304 bytes of messages are on their way to two, the limit is {3 << 20}" in details
            await check_alive(one, two)

    tcp(body)


def test_an_address_that_cannot_be_read_loses_the_peer_and_not_the_process(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        for address in ("", "nonsense", "unix:" + "x" * 300, "host:port", "\0:1"):
            one.transport.connect("peer", address)
            one.transport.send("peer", Stop(job="j"))
            assert await one.next_lost() == "peer"
            assert one.transport.lost_reason("peer")
            assert one.transport.peers == []
        one.transport.connect("peer", "nonsense")
        assert await one.next_lost() == "peer"
        assert "peer can't be reached: address 'nonsense' is neither host:port" in one.transport.lost_reason("peer")

    tcp(body)


def test_a_farewell_is_not_kept_whole(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        async with channel_to(one.address) as channel:
            call = open_stream(channel)
            await call.write(frame(name="peer", sender=5))
            answer = pb2.Frame.FromString(await call.read())
            await call.write(frame(name="", sender=5, receiver=answer.header.sender, lost="x" * 3_000_000))
            assert await one.next_lost() == "peer"
            assert len(one.transport.lost_reason("peer")) == 500

    tcp(body)


def test_a_frame_of_too_many_messages_is_refused(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one")
        stop = pb2.Envelope(stop=pb2.Stop(job="j"))
        many = [pb2.Packet(sequence=number, envelope=stop) for number in range(1, MAX_FRAME_PACKETS + 2)]
        async with channel_to(one.address) as channel:
            call = open_stream(channel)
            await call.write(frame(name="peer", packets=many))
            code, details = await ended(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == f"frame refused: {len(many)} messages in it, the limit is {MAX_FRAME_PACKETS}"
        assert one.got.empty()

    tcp(body)


def test_a_peer_that_never_reads_costs_its_outbox_and_then_its_link(tcp: Callable[[Body], None]) -> None:
    async def body(network: Network) -> None:
        one = await network.start("one", credit_bytes=4 << 20, max_outbox_bytes=16 << 20)
        two = await network.start("two")
        one.transport.connect("two", two.address)
        async with channel_to(one.address) as channel:
            call = open_stream(channel)
            await call.write(frame(name="deaf", sender=5))
            while "deaf" not in one.transport.peers:
                await asyncio.wait_for(call.read(), 30)
            tensor = torch.zeros(1 << 18)
            for _ in range(100):
                one.transport.send("deaf", forward(tensor))
            assert await one.next_lost() == "deaf"
            assert "deaf does not read: " in one.transport.lost_reason("deaf")
            one.transport.send("two", stop_at(3))
            assert (await two.next()).version == 3

    tcp(body)


def test_who_floods_a_process_does_not_flood_its_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="layerwise")
    now = [0.0]
    refusals = Refusals(now=lambda: now[0])
    for number in range(1000):
        refusals.add(Refused.MALFORMED, f"frame {number} refused " + "x" * 1000)
    refusals.add(Refused.NAME, "another kind")
    now[0] = 2.0
    refusals.add(Refused.MALFORMED, "the last")
    assert [one.split()[0] for one in caplog.messages] == ["frame", "another", "the"]
    assert caplog.messages[-1] == "the last (999 more of this kind since)"
    assert max(map(len, caplog.messages)) < 600
    [family] = refusals.collect()
    counts = {sample.labels["reason"]: sample.value for sample in family.samples}
    assert counts["malformed"] == 1001
    assert set(counts) == {str(reason) for reason in Refused}


def test_the_default_outbox_holds_no_more_than_two_messages_of_the_largest_size() -> None:
    import inspect

    from layerwise.transport import Transport

    assert inspect.signature(Transport).parameters["max_outbox_bytes"].default == 2 * MAX_MESSAGE_BYTES
