"""The part of a service that its handlers use, without links: acts on the loop, effects noted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from layerwise.messages import Role
from layerwise.roles import Effect
from layerwise.service import ServiceSettings


class PlayedService:
    """Stands in for `layerwise.service.Service`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = ServiceSettings(role=Role.SHARD, coordinator="nowhere")
        self.effects: list[Effect] = []
        self.errors: list[Exception] = []
        self._acted = asyncio.Event()

    def guard(self, act: Callable[[], list[Effect]]) -> None:
        self.effects += act()
        self._acted.set()

    def fail(self, error: Exception) -> None:
        self.errors.append(error)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._acted.clear()
            await asyncio.wait_for(self._acted.wait(), 30)
