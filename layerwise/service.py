"""What shard, forward and backward processes share: an event loop, links, the tie to the coordinator, a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from layerwise.address import check_advertised, parse_address
from layerwise.errors import (
    LayerwiseError,
    NotAllowedError,
    NotFoundError,
    OutOfMemoryError,
    RejectedError,
    UnreachableError,
    sentence,
)
from layerwise.ids import COORDINATOR
from layerwise.lifetime import Lifetime
from layerwise.memory import is_out_of_memory, keep_freed_memory
from layerwise.messages import Assignment, Dismissal, DismissalReason, Heartbeat, Hello, Hosting, Message, Role, Welcome
from layerwise.metrics_server import serve_metrics
from layerwise.roles import TICK_SECONDS, Connect, Disconnect, Effect, End, Send
from layerwise.silence import patience
from layerwise.threads import DeathWatch
from layerwise.transport import Transport
from layerwise.transport_metrics import transport_metrics
from layerwise.version import VERSION

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """The flags that every service takes. Addresses are ``host:port`` or ``unix:/path``.

    ``listen`` and ``metrics`` may be empty: then nothing listens.
    """

    role: Role
    coordinator: str
    name: str = ""
    listen: str = ""
    advertise: str = ""
    device: str = "cpu"
    metrics: str = ""
    allow_imports: tuple[str, ...] = ()
    insecure: bool = False
    exit_with_parent: bool = False
    join: str | None = None
    """The job to join; empty: any; None: take one of the places that jobs have."""
    reach_seconds: float = 60.0
    """How long to look for a coordinator that does not answer, at the start and after it was lost."""


class ServiceHandler(Protocol):
    """The part that differs from service to service. Called on the event loop's thread only."""

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message arrived."""
        ...

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """A link is gone for good."""
        ...

    def on_tick(self, now: float) -> list[Effect]:
        """Five times a second."""
        ...

    def hosting(self) -> tuple[Hosting, ...]:
        """The jobs that this process goes on with while it has no coordinator."""
        ...

    def before_send(self) -> None:
        """Frames are about to leave the process: write down what they are the effects of."""
        ...

    def collect(self) -> Iterable[object]:
        """Prometheus metric families of this process."""
        ...

    async def close(self) -> None:
        """End threads, close files."""
        ...


class Service:
    """Runs one handler until a signal, the parent's end, an error in it or in a thread of it, or a coordinator that stays away."""

    def __init__(self, settings: ServiceSettings, make_handler: Callable[[Service], ServiceHandler]) -> None:
        self.settings = settings
        self.name = settings.name or f"{settings.role}-{socket.gethostname()}-{os.getpid()}"
        self.address = ""
        self.transport: Transport
        self._make_handler = make_handler
        self._handler: ServiceHandler
        self._error: Exception | None = None
        self._welcomed = False
        self._unreached_since: float | None = None
        self._heartbeat_seconds = 1.0
        self._next_heartbeat = 0.0

    async def run(self) -> None:
        """Serve until the end.

        Raises:
            UnreachableError: the coordinator was not found, or stayed away, for ``reach_seconds``.
            RejectedError: it is of another wire version.
            OutOfMemoryError: memory ran out.
            NotFoundError: there is no such job to join.
            NotAllowedError: the job can't use this process.
            ConfigError: an address can't be read, is taken, or can't be called by others.
        """
        keep_freed_memory()
        parse_address(self.settings.coordinator)
        if self.settings.listen:
            check_advertised(self.settings.listen, self.settings.advertise)
        self.loop = asyncio.get_running_loop()
        self._lifetime = Lifetime(exit_with_parent=self.settings.exit_with_parent)
        self._handler = self._make_handler(self)
        self.transport = Transport(
            self.name,
            on_message=self._on_message,
            on_lost=self._on_lost,
            before_send=self._handler.before_send,
            on_error=self.fail,
            dialed_only=(COORDINATOR,),
        )
        try:
            with DeathWatch(self._fail_from_thread):
                await self._serve()
        finally:
            await self._handler.close()
            await self.transport.close()
            self._lifetime.close()
        if self._error is not None:
            raise self._error

    async def _serve(self) -> None:
        if self.settings.listen:
            bound = await self.transport.listen(self.settings.listen, insecure=self.settings.insecure)
            self.address = self.settings.advertise or bound
        metrics_address = (
            serve_metrics(self.settings.metrics, self._collect, insecure=self.settings.insecure)
            if self.settings.metrics
            else ""
        )
        self._hello = Hello(
            role=self.settings.role,
            name=self.name,
            address=self.address,
            device=self.settings.device,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            allowed_imports=self.settings.allow_imports,
            metrics_address=metrics_address,
            join=self.settings.join,
        )
        self._reach_coordinator()
        ticks = asyncio.create_task(self._tick())
        await self._lifetime.ended.wait()
        ticks.cancel()
        log.info("%s ends: %s", self.name, self._lifetime.reason)

    def perform(self, effects: list[Effect]) -> None:
        """Carry out a role's effects in order. Event loop's thread only."""
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    self.transport.send(peer, message)
                case Connect(peer=peer, address=address):
                    self.transport.connect(peer, address)
                case Disconnect(peer=peer):
                    self.transport.disconnect(peer)
                case End(sentence=text):
                    self.fail(OutOfMemoryError(f"{text}; this process ends, so that another one takes over"))

    def guard(self, act: Callable[[], list[Effect]]) -> None:
        """Run a piece of the handler and its effects; an exception (a bug) ends the service with it."""
        try:
            self.perform(act())
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the service with ``error``; the first one stands."""
        if is_out_of_memory(error) and not isinstance(error, LayerwiseError):
            error = OutOfMemoryError(
                f"memory ran out: {sentence(error)}; this process ends, so that another one takes over"
            )
        if self._error is None:
            self._error = error
        self._lifetime.end(f"{type(error).__name__}: {error}")

    def _fail_from_thread(self, error: Exception) -> None:
        self.loop.call_soon_threadsafe(self.fail, error)

    def _collect(self) -> Iterable[object]:
        return [*self._handler.collect(), *transport_metrics(self.transport)]

    def _reach_coordinator(self) -> None:
        self._welcomed = False
        if self._unreached_since is None:
            self._unreached_since = time.monotonic()
        self.transport.connect(COORDINATOR, self.settings.coordinator)
        self.transport.send(COORDINATOR, replace(self._hello, hosting=self._handler.hosting()))

    def _on_message(self, peer: str, message: Message) -> None:
        if peer == COORDINATOR and isinstance(message, Dismissal):
            self._on_dismissal(message)
            return
        if peer == COORDINATOR and isinstance(message, Welcome):
            self._welcomed, self._unreached_since = True, None
            self._heartbeat_seconds = message.heartbeat_seconds
        elif peer == COORDINATOR and isinstance(message, Assignment):
            self.transport.be_patient(patience(message.spec_json))
        self.guard(lambda: self._handler.on_message(peer, message, time.monotonic()))

    def _on_dismissal(self, message: Dismissal) -> None:
        match message.reason:
            case DismissalReason.OVER:
                self._lifetime.end(message.message)
            case DismissalReason.NOT_FOUND:
                self.fail(NotFoundError(message.message))
            case DismissalReason.NOT_ALLOWED:
                self.fail(NotAllowedError(message.message))

    def _on_lost(self, peer: str) -> None:
        if peer == COORDINATOR:
            self._on_coordinator_lost()
        self.guard(lambda: self._handler.on_lost(peer, time.monotonic()))

    def _on_coordinator_lost(self) -> None:
        if self.transport.refused(COORDINATOR):
            self.fail(RejectedError(self.transport.lost_reason(COORDINATOR)))
            return
        now = time.monotonic()
        since = self._unreached_since if self._unreached_since is not None else now
        if now - since >= self.settings.reach_seconds:
            self.fail(
                UnreachableError(
                    f"no coordinator answers at {self.settings.coordinator} since {now - since:.0f} s; "
                    f"start `layerwise coordinator` there or pass another --coordinator"
                )
            )
            return
        if self._welcomed:
            log.warning("%s lost the coordinator at %s; trying again", self.name, self.settings.coordinator)
        self.loop.call_later(TICK_SECONDS, self._reach_coordinator)

    async def _tick(self) -> None:
        while not self._lifetime.ended.is_set():
            now = time.monotonic()
            self.guard(lambda: self._handler.on_tick(time.monotonic()))
            if self._welcomed and now >= self._next_heartbeat:
                self._next_heartbeat = now + self._heartbeat_seconds
                self.transport.send(COORDINATOR, self._heartbeat())
            await asyncio.sleep(TICK_SECONDS)

    def _heartbeat(self) -> Heartbeat:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Heartbeat(
            resident_bytes=resident_bytes(),
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            sent_bytes=self.transport.sent_bytes,
            received_bytes=self.transport.received_bytes,
        )


def resident_bytes() -> int:
    """Resident memory of this process in bytes (0 where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
