"""A shard's process whose block comes from the memory of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from layerwise.cuts import file_digest
from layerwise.ids import COORDINATOR
from layerwise.job import parse_job
from layerwise.layer_file import read_layer
from layerwise.messages import (
    Assignment,
    BlockPlace,
    Failure,
    LayerFile,
    StandbyHeld,
    StandbyOffer,
    StandbyPart,
    StandbyRequest,
    StandbySource,
    Unassign,
    Welcome,
)
from layerwise.roles import Connect, Effect, Send
from layerwise.server.preparation import prepare
from layerwise.server.shard import ShardServer
from layerwise.service import Service
from layerwise.standby_bytes import LayerBytes
from tests.unit.played_cluster import profile, spec
from tests.unit.played_service import PlayedService

DATA = bytearray(b"what the layer was at version 5")
FILES = tuple(
    LayerFile(layer=layer, life=2, name=f"layer-{layer}", num_bytes=len(DATA), digest=file_digest(DATA))
    for layer in (2, 3)
)
SOURCE = StandbySource(holder="shard-0", address="unix:/0", life=2, files=FILES)
BUILT: list[tuple[int, Mapping[int, LayerBytes] | None]] = []


def assignment(cut: int = 5, source: StandbySource = SOURCE) -> Assignment:
    """Block 1 of a job with standby copies."""
    made = parse_job(spec(checkpoint={"standby": True}))
    found = prepare(made, profile())
    route = tuple(
        BlockPlace(start=start, stop=stop, shard=f"shard-{block}", address=f"unix:/{block}", life=life)
        for block, ((start, stop), life) in enumerate(zip(found.blocks, (1, 3), strict=True))
    )
    return Assignment(
        job="job",
        spec_json=made.to_json(),
        settings_json=found.settings.to_json(),
        profile_json=profile().to_json(),
        route=route,
        block=1,
        cut=cut,
        directory="nowhere",
        generation=3,
        standby=source,
    )


def play(monkeypatch: pytest.MonkeyPatch, scene: Any) -> None:
    def make(made: Assignment, *, standby: Mapping[int, LayerBytes] | None, **_: Any) -> Any:
        BUILT.append((made.cut, standby))
        role = SimpleNamespace(on_lost=lambda peer, now: [])
        return SimpleNamespace(
            begin=lambda now: [],
            close=lambda: None,
            events=SimpleNamespace(flush=lambda: None),
            role=role,
            on_tick=lambda now: [],
        )

    async def run() -> None:
        loop = PlayedService()
        monkeypatch.setattr("layerwise.server.shard.HostedBlock", make)
        server = ShardServer(cast(Service, loop), torch.device("cpu"))
        await scene(loop, server)
        await server.close()
        assert not loop.errors

    BUILT.clear()
    asyncio.run(run())


def requests(effects: list[Effect]) -> list[StandbyRequest]:
    return [one.message for one in effects if isinstance(one, Send) and isinstance(one.message, StandbyRequest)]


def answer(request: StandbyRequest, data: bytearray = DATA) -> StandbyPart:
    return StandbyPart(
        job="job",
        block=request.block,
        life=request.life,
        version=request.version,
        layer=request.layer,
        offset=request.offset,
        data=LayerBytes(data).part(request.offset),
    )


def test_the_block_is_built_once_its_layers_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(loop: PlayedService, server: ShardServer) -> None:
        effects = server.on_message(COORDINATOR, assignment(), 0.0)
        assert effects[0] == Connect("shard-0", "unix:/0")
        for layer in (2, 3):
            ((request),) = requests(effects)
            assert (request.block, request.life, request.version, request.layer) == (1, 2, 5, layer)
            assert BUILT == []
            effects = server.on_message("shard-0", answer(request), 1.0)
        await loop.until(lambda: bool(BUILT) and bool(server.hosting) and "job" in server._blocks)
        ((cut, layers),) = BUILT
        assert cut == 5
        assert layers is not None
        assert {layer: one.data for layer, one in layers.items()} == {2: DATA, 3: DATA}

    play(monkeypatch, scene)


def test_without_a_source_it_is_built_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(loop: PlayedService, server: ShardServer) -> None:
        assert server.on_message(COORDINATOR, assignment(4, StandbySource()), 0.0) == []
        await loop.until(lambda: "job" in server._blocks)
        assert BUILT == [(4, None)]

    play(monkeypatch, scene)


@pytest.mark.parametrize("how", ["lost", "silent", "damaged"])
def test_the_coordinator_hears_that_a_copy_can_not_be_had(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def scene(loop: PlayedService, server: ShardServer) -> None:
        (request,) = requests(server.on_message(COORDINATOR, assignment(), 0.0))
        match how:
            case "lost":
                effects = server.on_lost("shard-0", 1.0)
            case "silent":
                assert server.on_tick(59.0) == []
                effects = server.on_tick(61.0)
            case _:
                effects = server.on_message("shard-0", answer(request, bytearray(len(DATA))), 1.0)
        (failure,) = (one.message for one in effects if isinstance(one, Send))
        assert isinstance(failure, Failure)
        assert (failure.standby, failure.cut, failure.job) == (5, 0, "job")
        assert failure.message.startswith("the standby copy of version 5 can't be fetched from shard-0: ")
        assert BUILT == []
        server.on_message(COORDINATOR, assignment(4, StandbySource()), 62.0)
        await loop.until(lambda: "job" in server._blocks)
        assert BUILT == [(4, None)]

    play(monkeypatch, scene)


def test_what_arrives_for_an_assignment_that_was_replaced_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(loop: PlayedService, server: ShardServer) -> None:
        (request,) = requests(server.on_message(COORDINATOR, assignment(), 0.0))
        server.on_message(COORDINATOR, assignment(4, StandbySource()), 1.0)
        assert server.on_message("shard-0", answer(request), 2.0) == []
        await loop.until(lambda: "job" in server._blocks)
        assert BUILT == [(4, None)]

    play(monkeypatch, scene)


def test_copies_of_others_are_told_of_to_each_coordinator_and_go_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(loop: PlayedService, server: ShardServer) -> None:
        made = assignment(0, StandbySource())
        server.on_message(COORDINATOR, made, 0.0)
        await loop.until(lambda: "job" in server._blocks)
        files = tuple(
            LayerFile(layer=layer, life=1, name="x", num_bytes=len(DATA), digest=file_digest(DATA)) for layer in (0, 1)
        )
        effects = server.on_message("shard-0", StandbyOffer(job="job", block=0, life=1, version=10, files=files), 0.0)
        for _ in files:
            (request,) = requests(effects)
            effects = server.on_message("shard-0", answer(request), 0.0)
        held = StandbyHeld(job="job", block=0, life=1, version=10, files=files)
        assert effects == [Send(COORDINATOR, held), Send("shard-0", held)]
        assert server.on_message(COORDINATOR, Welcome(heartbeat_seconds=1.0), 1.0) == [Send(COORDINATOR, held)]
        server.on_message(COORDINATOR, Unassign(job="job"), 2.0)
        assert server.on_message(COORDINATOR, Welcome(heartbeat_seconds=1.0), 3.0) == []

    play(monkeypatch, scene)


def test_bytes_of_a_copy_are_read_as_a_layer_s_file_is() -> None:
    from pathlib import Path

    from layerwise.errors import CorruptCutError

    with pytest.raises(CorruptCutError, match="the memory of shard-0"):
        read_layer(bytes(DATA), 5, FILES[0], path=Path("the memory of shard-0"))
