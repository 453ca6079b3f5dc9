"""What planned faults do to frames on real streams, and that the link above them makes good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import layerwise.transport
from layerwise.carrier import Carrier
from layerwise.disturbed_carrier import DisturbedCarrier
from layerwise.faults import VARIABLE, FrameFault, FrameFaultKind, fired_faults, frame_fault_variable
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Forward, Message, StopAt, Tensors
from layerwise.proto.frames import Frame
from layerwise.transport import Transport


@dataclass
class Pair:
    """A sender that dials a receiver (or the other way round); what the receiver got, and which frames its link was given."""

    sender: Transport
    receiver: Transport
    got: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    lost: list[str] = field(default_factory=list)

    async def next(self) -> Message:
        return await asyncio.wait_for(self.got.get(), 30)

    async def exchange(self, count: int) -> list[int]:
        """Send so many messages, each in a frame of its own; gives the versions that arrived."""
        versions = []
        for version in range(count):
            before = self.sender.sent_bytes
            self.sender.send("receiver", StopAt(job="j", version=version, life=1))
            while self.sender.sent_bytes == before:  # else the next message would join the frame
                await asyncio.sleep(0)
        for _ in range(count):
            message = await self.next()
            assert isinstance(message, StopAt)
            versions.append(message.version)
        return versions


@asynccontextmanager
async def pair(folder: Path, *, receiver_dials: bool) -> AsyncIterator[Pair]:
    made: Pair
    sender = Transport("sender", on_message=lambda *_: None, on_lost=lambda peer: made.lost.append(peer))
    receiver = Transport(
        "receiver",
        on_message=lambda _, message: made.got.put_nowait(message),
        on_lost=lambda peer: made.lost.append(peer),
    )
    made = Pair(sender, receiver)
    try:
        listener, dialer = (sender, receiver) if receiver_dials else (receiver, sender)
        address = await listener.listen(f"unix:{folder}/one.sock")
        dialer.connect(listener.name, address)
        if receiver_dials:
            receiver.send("sender", StopAt(job="j", version=-1, life=1))
            while "receiver" not in sender.peers:
                await asyncio.sleep(0.001)
        yield made
    finally:
        await asyncio.gather(sender.close(), receiver.close())


@pytest.fixture(params=[False, True], ids=["accepted", "dialed"])
def receiver_dials(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sequences in each frame that reached a link, in order, with repeats."""
    frames: list[tuple[int, ...]] = []
    take = Transport._take

    def spy(self: Transport, state: object, carrier: Carrier, frame: Frame, num_bytes: int) -> None:
        if self.name == "receiver" and frame.messages:
            frames.append(tuple(sequence for sequence, _ in frame.messages))
        take(self, state, carrier, frame, num_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(Transport, "_take", spy)
    return frames


def plan(
    monkeypatch: pytest.MonkeyPatch, folder: Path, kind: FrameFaultKind, *frames: int, seconds: float = 0.0
) -> Path:
    fired = folder / "fired"
    faults = [
        FrameFault(kind=kind, receiver="receiver", sender="sender", frame=frame, seconds=seconds) for frame in frames
    ]
    monkeypatch.setenv(VARIABLE, frame_fault_variable(faults, fired)[VARIABLE])
    return fired


@pytest.mark.parametrize("kind", list(FrameFaultKind))
def test_every_message_arrives_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, socket_folder: Path, kind: FrameFaultKind, receiver_dials: bool
) -> None:
    fired = plan(monkeypatch, socket_folder, kind, 2, 3, 10, seconds=0.02)

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=receiver_dials) as both:
            assert await both.exchange(100) == list(range(100))
            while len(fired_faults(fired)) < 3:  # what was lost with a stream goes out again in few frames
                assert await both.exchange(10) == list(range(10))
            assert not both.lost

    asyncio.run(body())
    assert [fault.kind for fault, _ in fired_faults(fired)] == [kind] * 3


def test_a_repeated_frame_reaches_the_link_twice(
    monkeypatch: pytest.MonkeyPatch, socket_folder: Path, given: list[tuple[int, ...]]
) -> None:
    plan(monkeypatch, socket_folder, FrameFaultKind.DUPLICATE, 3)

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=False) as both:
            await both.exchange(20)

    asyncio.run(body())
    repeated = [frame for frame in given if given.count(frame) == 2]
    assert len(repeated) == 2
    assert given.index(repeated[0]) + 2 == len(given) - 1 - given[::-1].index(repeated[0])


def test_an_overtaken_frame_comes_behind_the_next(
    monkeypatch: pytest.MonkeyPatch, socket_folder: Path, given: list[tuple[int, ...]]
) -> None:
    plan(monkeypatch, socket_folder, FrameFaultKind.REORDER, 3)

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=False) as both:
            await both.exchange(20)

    asyncio.run(body())
    assert sorted(given) == list(dict.fromkeys(sorted(given)))
    late = [place for place in range(1, len(given)) if given[place] < given[place - 1]]
    assert len(late) == 1


def test_a_frame_without_another_behind_it_is_only_late_and_a_later_one_is_overtaken(
    monkeypatch: pytest.MonkeyPatch, socket_folder: Path, given: list[tuple[int, ...]]
) -> None:
    """What nothing has overtaken has not happened: a run whose plan says so would count for nothing."""
    fired = plan(monkeypatch, socket_folder, FrameFaultKind.REORDER, 1)

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=True) as both:
            assert await both.exchange(1) == [0]
            assert fired_faults(fired) == []
            assert await both.exchange(20) == list(range(20))

    asyncio.run(body())
    assert len(fired_faults(fired)) == 1
    assert len([place for place in range(1, len(given)) if given[place] < given[place - 1]]) == 1


def test_a_lost_frame_breaks_the_stream_and_comes_again(
    monkeypatch: pytest.MonkeyPatch, socket_folder: Path, receiver_dials: bool
) -> None:
    plan(monkeypatch, socket_folder, FrameFaultKind.DROP, 2)
    carriers: list[Carrier] = []

    class Counted(DisturbedCarrier):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            carriers.append(self)

    monkeypatch.setattr(layerwise.transport, "DisturbedCarrier", Counted)

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=receiver_dials) as both:
            assert await both.exchange(20) == list(range(20))

    asyncio.run(body())
    assert len(carriers) == 2


def test_faults_in_the_middle_of_a_large_message_leave_it_whole(
    monkeypatch: pytest.MonkeyPatch, socket_folder: Path
) -> None:
    fired = socket_folder / "fired"
    faults = [
        FrameFault(kind=kind, receiver="receiver", frame=2 + 2 * place)
        for place, kind in enumerate((FrameFaultKind.REORDER, FrameFaultKind.DUPLICATE, FrameFaultKind.DROP))
    ]
    monkeypatch.setenv(VARIABLE, frame_fault_variable(faults, fired)[VARIABLE])
    tensors = [torch.randn(3 << 18) for _ in range(4)]

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=False) as both:
            for number, tensor in enumerate(tensors):
                message = Forward(
                    job="j",
                    attempt=Attempt(Microbatch(0, 0, 4), 1),
                    number=number,
                    life=1,
                    needed_from=0,
                    inputs=Tensors((tensor,)),
                    targets=Tensors((None,)),
                )
                both.sender.send("receiver", message)
            for tensor in tensors:
                arrived = await both.next()
                assert isinstance(arrived, Forward)
                assert torch.equal(arrived.inputs.items[0], tensor)

    asyncio.run(body())
    assert len(fired_faults(fired)) == 3


def test_a_process_without_a_plan_has_plain_carriers(monkeypatch: pytest.MonkeyPatch, socket_folder: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing was planned")

    monkeypatch.setattr(layerwise.transport, "DisturbedCarrier", refuse)

    async def body() -> None:
        async with pair(socket_folder, receiver_dials=False) as both:
            assert await both.exchange(5) == list(range(5))

    asyncio.run(body())
