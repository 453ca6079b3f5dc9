"""The coordinator's process: one event loop around `CoordinatorRole`, the store, the links and the clients."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any

from layerwise.errors import ConfigError
from layerwise.ids import COORDINATOR
from layerwise.job import parse_job
from layerwise.lifetime import Lifetime
from layerwise.messages import Hello, Message
from layerwise.metrics_server import MetricsServer
from layerwise.refusals import Refused
from layerwise.roles import TICK_SECONDS, Connect, Disconnect, Effect, Send
from layerwise.server.adopted_job import look_at_directories, read_job, unused_directory, with_cuts_on_disk
from layerwise.server.client_service import ClientService
from layerwise.server.coordinator_role import EVENTS_AT_ONCE, CoordinatorRole
from layerwise.server.held_effects import HeldEffects
from layerwise.server.held_up import HeldUp
from layerwise.server.hello_check import hello_fault
from layerwise.server.job_record import JobEvent
from layerwise.server.job_store import FLUSH_SECONDS, SqliteJobStore
from layerwise.server.memory_store import MemoryJobStore
from layerwise.server.metrics import coordinator_metrics, job_store_metrics
from layerwise.server.node_document import coordinator_document
from layerwise.threads import DeathWatch
from layerwise.transport import Transport
from layerwise.transport_metrics import transport_metrics

LOCK = "coordinator.lock"
MAX_OUTBOX_BYTES = 64 << 20
"""For one process; what the coordinator says is small."""

log = logging.getLogger(__name__)


def run_coordinator(
    *,
    listen: str,
    state: str | Path | None = None,
    metrics: str = "",
    insecure: bool = False,
    heartbeat_timeout: float = 30.0,
    exit_with_parent: bool = False,
    on_listening: Callable[[Coordinator], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. ``state`` is the folder of the job store; without one, jobs are forgotten.

    ``metrics`` is ``host:port`` or empty. ``on_listening`` is called once with the coordinator, whose addresses are
    known then.

    Raises:
        ConfigError: an address is taken, ``state`` can't be used or is another coordinator's.
        NotAllowedError: listening beyond this host without ``insecure``.
    """

    async def serve() -> None:
        # It may have to read cuts, which is no work for an event loop.
        coordinator = await asyncio.to_thread(Coordinator, state=state, heartbeat_timeout=heartbeat_timeout)
        lifetime = Lifetime(exit_with_parent=exit_with_parent)
        try:
            await coordinator.open(listen=listen, metrics=metrics, insecure=insecure)
            if on_listening is not None:
                on_listening(coordinator)
            coordinator.on_end = lifetime.end
            with DeathWatch(coordinator.fail_from_thread):
                await lifetime.ended.wait()
            log.info("the coordinator ends: %s", lifetime.reason)
        finally:
            await coordinator.close()
            lifetime.close()
        if coordinator.error is not None:
            raise coordinator.error

    asyncio.run(serve())


class Coordinator:
    """The role with its surroundings. Everything runs on the event loop's thread, but for the store's own.

    A job's record is on disk before a client hears that it was taken, and its lives before a shard does. What must not be said
    before the disk has answered is held back, with all that is later for the same process; the event loop never waits for it.
    """

    def __init__(self, *, state: str | Path | None = None, heartbeat_timeout: float = 30.0) -> None:
        self._lock = _lock(Path(state)) if state is not None else None
        self._store = SqliteJobStore(state) if state is not None else MemoryJobStore()
        self._epoch = time.time() - time.monotonic()
        self._started = self._now()
        look_at_directories(self._store, self._started)
        self._role = CoordinatorRole(self._store, now=self._now(), heartbeat_timeout=heartbeat_timeout)
        self._transport: Transport | None = None
        self._metrics: MetricsServer | None = None
        self._ticks: asyncio.Task[None] | None = None
        self._held_up = HeldUp(TICK_SECONDS)
        self._ticked = asyncio.Event()
        self._held = HeldEffects()
        self._asked: tuple[int, float] | None = None
        """The number of the effect for which the disk was asked last, and when; None: nothing is awaited of it."""
        self._warned = False
        self._closing = False
        self.address = ""
        self.metrics_address = ""
        self.error: Exception | None = None
        self.on_end: Callable[[str], None] = lambda reason: None
        """Called when the coordinator can't go on; `error` says why."""

    async def open(self, *, listen: str, metrics: str = "", insecure: bool = False) -> None:
        """Listen for processes and clients; see `run_coordinator` for what is refused."""
        self._loop = asyncio.get_running_loop()  # a process may speak before `listen` returns
        transport = Transport(
            COORDINATOR,
            on_message=self._on_message,
            on_lost=self._on_lost,
            on_error=self._fail,
            silence_seconds=math.inf,  # processes are given up by their heartbeats, under the time limit of their job
            max_outbox_bytes=MAX_OUTBOX_BYTES,
            max_message_bytes=0,  # no tensors come here: to decode one would import torch
        )
        self._transport = transport
        transport.add_servicer(ClientService(self).add_to)
        if metrics:
            self._metrics = MetricsServer(
                metrics,
                self._collect,
                insecure=insecure,
            )
            self.metrics_address = self._metrics.address
        self.address = await transport.listen(listen, insecure=insecure)
        self._ticks = asyncio.create_task(self._tick(), name="layerwise coordinator ticks")
        log.info("the coordinator listens at %s", self.address)
        if self.metrics_address:
            log.info("its metrics are at http://%s/metrics", self.metrics_address)

    async def close(self) -> None:
        """Close links, clients' calls and the store. What is held back still goes to nobody."""
        self._closing = True
        if self._ticks is not None:
            self._ticks.cancel()
            await asyncio.gather(self._ticks, return_exceptions=True)
        self._ticked.set()
        if self._transport is not None:
            await self._transport.close()
        if self._metrics is not None:
            # A scrape that waits for this loop must be answered first, so not on it.
            await asyncio.to_thread(self._metrics.close)
        if isinstance(self._store, SqliteJobStore):
            await asyncio.to_thread(self._store.close)
        if self._lock is not None:
            self._lock.close()

    # Clients ---------------------------------------------------------------------------------------------------------

    async def submit(self, spec_json: str) -> dict[str, Any]:
        """Queue a job; its directory is one that no earlier job has left its work in."""
        # A large job takes a while to check; training must not wait for it.
        spec = await asyncio.to_thread(parse_job, spec_json)
        spec_json, directory = spec.to_json(), unused_directory(spec.checkpoint_path)
        document, effects = self._role.submit(spec_json, self._now(), directory=directory)
        return await self._stored(document, effects)

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job."""
        return await self._stored(*self._role.cancel(job, self._now()))

    async def resume(self, job: str, directory: str, shards: int = 0) -> dict[str, Any]:
        """Queue a job again, from the newest sound cut that is on disk, whatever was noted of it."""
        if job and not self._role.record(job).state.final:
            return await self._stored(*self._role.resume(job, self._now(), shards=shards))
        if job:
            record = await asyncio.to_thread(with_cuts_on_disk, self._role.record(job))
            return await self._stored(*self._role.adopt(record, self._now(), shards=shards))
        record = await asyncio.to_thread(read_job, directory)
        return await self._stored(*self._role.adopt(record, self._now(), shards=shards))

    async def drain(self, node: str, *, undo: bool) -> dict[str, Any]:
        """Send jobs away from a node, or let them come again. What is promised is on disk before anybody hears of it."""
        turn = self._role.undrain if undo else self._role.drain
        document, effects = turn(node, self._now())
        # A shard that was told to stop, by a coordinator that does not remember why, would wait for ever.
        self._perform(effects, all_wait=True)
        await asyncio.to_thread(self._flush)
        return document

    def jobs(self, offset: int, limit: int) -> list[dict[str, Any]]:
        """The documents of some jobs, oldest first."""
        return self._role.jobs(offset, limit)

    def job(self, job: str) -> dict[str, Any]:
        """One job's document."""
        return self._role.job(job)

    def nodes(self) -> list[dict[str, Any]]:
        """The processes; this one first."""
        assert self._transport is not None
        own = coordinator_document(
            address=self.address,
            metrics_address=self.metrics_address,
            started=self._started,
            sent_bytes=self._transport.sent_bytes,
            received_bytes=self._transport.received_bytes,
        )
        return [own, *self._role.nodes(self._now())]

    async def follow(self, job: str, offset: int) -> AsyncIterator[JobEvent]:
        """A job's events from ``offset`` on, until it has ended; looks for new ones at each tick."""
        while True:
            record = self._role.record(job)
            if offset < record.num_events:
                events = await asyncio.to_thread(self._store.events, job, offset, EVENTS_AT_ONCE)
                for event in events:
                    yield event
                    offset = event.sequence + 1
                if events:
                    continue  # else they were too many for a disk that refused
            if record.state.final or self._ticks is None or self._ticks.done():
                return
            await self._ticked.wait()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """Unix seconds that never go back."""
        return self._epoch + time.monotonic()

    def _collect(self) -> list[Any]:
        assert self._transport is not None
        about_everything = coordinator_metrics(self._role, self._now())
        return [*about_everything, *transport_metrics(self._transport), *job_store_metrics(self._store)]

    def _on_message(self, peer: str, message: Message) -> None:
        assert self._transport is not None
        refusals = self._transport.refusals
        if isinstance(message, Hello) and self._role.members.get(peer) is not None:
            refusals.add(Refused.HELLO, f"{peer} has presented itself on this link before; nothing is changed by it")
            return
        if isinstance(message, Hello) and (fault := hello_fault(peer, message)):
            refusals.add(Refused.HELLO, f"{peer} is not let in: {fault}")
            self._perform([*self._role.on_lost(peer, self._now()), Disconnect(peer)])
            return
        if not isinstance(message, Hello) and self._role.members.get(peer) is None:
            sentence = f"{type(message).__name__} from {peer} refused: it has not presented itself"
            refusals.add(Refused.UNEXPECTED, sentence)
        self._perform(self._role.on_message(peer, message, self._caught_up()))

    def _on_lost(self, peer: str) -> None:
        self._held.lose(peer)
        self._perform(self._role.on_lost(peer, self._caught_up()))

    def _caught_up(self) -> float:
        """The time, and whoever looks at it first after this process was stopped excuses everybody else."""
        now = self._now()
        missed = self._held_up.missed(now)
        if missed:
            self._role.excuse(missed, now)
        return now

    async def _tick(self) -> None:
        try:
            while True:
                self._perform(self._role.on_tick(self._caught_up()))
                self._held_up.ticked(self._now())
                self._warn_of_a_slow_disk()
                self._ticked.set()
                self._ticked = asyncio.Event()
                await asyncio.sleep(TICK_SECONDS)
        except Exception as error:
            self._fail(error)

    def _perform(self, effects: list[Effect], *, all_wait: bool = False) -> None:
        if isinstance(self._store, SqliteJobStore):
            effects = self._held.admit(effects, all_wait=all_wait)
            self._ask_the_disk(self._store)
        self._do(effects)

    def _ask_the_disk(self, store: SqliteJobStore) -> None:
        """Have the store say when everything that held effects follow from is written; one question at a time."""
        number = self._held.newest
        if self._asked is not None or not number:
            return
        self._asked = (number, self._now())

        def hear(error: Exception | None) -> None:
            self._loop.call_soon_threadsafe(self._on_disk, store, number, error)

        store.tell(hear)

    def _on_disk(self, store: SqliteJobStore, number: int, error: Exception | None) -> None:
        """The disk has all that was written before it was asked for ``number``, or never will."""
        self._asked = None
        if self._closing:
            return
        if error is not None:
            self._fail(error)
            return
        if self._warned:
            log.warning("the job store's disk takes what is written again")
            self._warned = False
        try:
            self._do(self._held.release(number))
            self._ask_the_disk(store)
        except Exception as failure:
            self._fail(failure)

    def _warn_of_a_slow_disk(self) -> None:
        if self._asked is None or self._warned or self._now() - self._asked[1] <= FLUSH_SECONDS:
            return
        self._warned = True
        peers = ", ".join(self._held.peers)
        log.warning(
            "the job store's disk has not taken what was written for %g s: what %s must be told waits until it has; free the disk",
            FLUSH_SECONDS,
            peers,
        )

    def _do(self, effects: list[Effect]) -> None:
        assert self._transport is not None
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    self._transport.send(peer, message)
                case Connect(peer=peer, address=address):
                    self._transport.connect(peer, address)
                case Disconnect(peer=peer):
                    self._transport.disconnect(peer)

    async def _stored(self, document: dict[str, Any], effects: list[Effect]) -> dict[str, Any]:
        self._perform(effects)
        await asyncio.to_thread(self._flush)
        return document

    def _flush(self) -> None:
        if isinstance(self._store, SqliteJobStore):
            self._store.flush()

    def fail_from_thread(self, error: Exception) -> None:
        """A thread of the coordinator's has died of ``error``. Any thread may call."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        log.error("the coordinator can't go on: %s: %s", type(error).__name__, error, exc_info=error)
        self.on_end(f"{type(error).__name__}: {error}")


def _lock(state: Path) -> IO[str]:
    """Two coordinators on one store would give the same lives twice."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = (state / LOCK).open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"--state {state}: the folder can't be used: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"--state {state} is in use by another coordinator; stop that one or choose another folder"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
