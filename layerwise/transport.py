"""All links of one process over gRPC: who is connected, what is sent, what is lost.

connect(peer) ──► dialing ──► up ◄──────────────── a peer's stream is accepted
                     │         │ stream breaks, or for silence_seconds nothing comes of one that owes us something
                     │         ▼
                     │       down ── dialed or accepted again within grace_seconds ──► up (nothing lost or twice)
                     ▼         ▼
      connect_seconds over   grace_seconds over, refused, or the peer has a new link incarnation ──► on_lost(peer), once
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import grpc
import grpc.aio

from layerwise.address import Address, check_may_listen, parse_address
from layerwise.buffers import BufferPool
from layerwise.carrier import Carrier
from layerwise.disturbed_carrier import DisturbedCarrier
from layerwise.entrance import Entrance, Limits
from layerwise.errors import (
    BusyError,
    ConfigError,
    LayerwiseError,
    MalformedMessageError,
    RejectedError,
    UnreachableError,
)
from layerwise.faults import frame_faults_of
from layerwise.grpc_status import status_of
from layerwise.link import LinkLost, Packet
from layerwise.messages import Message
from layerwise.peer import Peer
from layerwise.peers import LONGEST_REASON, Peers
from layerwise.proto.frames import (
    MAX_MESSAGE_BYTES,
    Frame,
    FrameHeader,
    FrameReader,
    FrameWriter,
    WireVersionError,
    encode_message,
)
from layerwise.refusals import Refusals, Refused
from layerwise.streams import (
    AcceptedStream,
    BrokenStreamError,
    DialedStream,
    Stream,
    bind,
    make_server,
    open_channel,
)

SILENCE_SECONDS = 20.0
"""A third more than ``timeouts.heartbeat`` is by default, so that a process that is stopped for less than that keeps its links."""

_BACKOFF_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2)


class Transport:
    """Links of process ``name`` on the running event loop; every method and callback is on its thread.

    ``on_message(peer, message)`` gets each message once and in order; ``on_lost(peer)`` comes once when a link is
    gone for good (`lost_reason` says why), after which the peer may be connected again. ``before_send()`` runs before
    each batch of frames leaves the process. An exception in a callback goes to ``on_error`` (default: the loop's
    exception handler). ``credit_bytes`` bounds what is sent and not acknowledged on a link; more waits in its outbox
    (`outbox_bytes`), at most ``max_outbox_bytes``, beyond which the link is given up: a peer that does not read costs
    no more memory than that. A peer that leaves something unacknowledged and, when asked, gives no sign of life for
    ``silence_seconds`` has its stream broken (``inf``: never); one that is only busy answers. ``limits`` bound what
    strangers can do; peers named in ``dialed_only`` never call.
    ``refusals`` counts what was not acted on.

    The tensors of a message that is sent must not change until the peer has it.
    """

    def __init__(
        self,
        name: str,
        *,
        on_message: Callable[[str, Message], None],
        on_lost: Callable[[str], None],
        before_send: Callable[[], None] = lambda: None,
        on_error: Callable[[Exception], None] | None = None,
        grace_seconds: float = 0.5,
        connect_seconds: float = 5.0,
        silence_seconds: float = SILENCE_SECONDS,
        credit_bytes: int = 32 << 20,
        max_outbox_bytes: int = 2 * MAX_MESSAGE_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        pool: BufferPool | None = None,
        limits: Limits | None = None,
        dialed_only: Collection[str] = (),
        refusals: Refusals | None = None,
    ) -> None:
        self.name = name
        self.sent_bytes = 0
        self.received_bytes = 0
        self.dropped_messages = 0
        """Messages sent to peers without a link."""
        self.refusals = refusals or Refusals()
        self._entrance = Entrance(name, limits or Limits(), self.refusals, dialed_only=dialed_only)
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._before_send = before_send
        self._on_error = on_error or self._report
        self._grace_seconds = grace_seconds
        self._connect_seconds = connect_seconds
        self._credit_bytes = credit_bytes
        self._max_outbox_bytes = max_outbox_bytes
        self._max_message_bytes = max_message_bytes
        self.pool = pool or BufferPool()
        self._faults = frame_faults_of(name)
        self._peers = Peers(
            credit_bytes=credit_bytes, silence_seconds=silence_seconds, on_lost=lambda peer: self._call(on_lost, peer)
        )
        self._servers: list[grpc.aio.Server] = []
        self._hooks: list[Callable[[grpc.aio.Server], None]] = []
        self._closings: set[asyncio.Task[Any]] = set()
        self._flush_due = False
        self._closed = False

    # --- listening ----------------------------------------------------------------------------------------------------

    def add_servicer(self, hook: Callable[[grpc.aio.Server], None]) -> None:
        """Let ``hook`` add services to each server that `listen` makes from now on."""
        self._hooks.append(hook)

    async def listen(self, address: str, *, insecure: bool = False) -> str:
        """Accept links at ``unix:/path`` or ``host:port``; returns the bound address (port 0 is replaced).

        Raises:
            ConfigError: no such address, or it is taken.
            NotAllowedError: beyond this host without ``insecure``, or a unix socket in a folder open to others.
        """
        parsed = parse_address(address)
        check_may_listen(parsed, insecure=insecure)
        server = await make_server(self._serve)
        for hook in self._hooks:
            hook(server)
        bound = bind(server, parsed)
        await server.start()
        self._servers.append(server)
        return str(bound)

    # --- links --------------------------------------------------------------------------------------------------------

    def connect(self, peer: str, address: str) -> None:
        """Open a link to ``peer``; nothing happens when there is one that is up.

        An address that can't be read comes from somebody else's mouth, as a rule: the link is lost, with that reason.
        """
        if self._closed:
            return
        state = self._peers.get(peer)
        if state is None:
            state = self._peers.open(peer)
            state.expect(self._connect_seconds, self._peers.expire)
        if state.dialing is None and state.carrier is None:
            try:
                state.address = parse_address(address)
            except ConfigError as error:
                lose = partial(self._peers.lose, state, f"{peer} can't be reached: {error}", refused=True)
                self._loop.call_soon(lose)
                return
            state.dialing = self._loop.create_task(self._dial(state), name=f"layerwise dial {peer}")
            state.dialing.add_done_callback(self._on_dialing_ended)

    def send(self, peer: str, message: Message) -> None:
        """Put ``message`` on the link to ``peer``. Never blocks; without a link the message is gone.

        Raises:
            MalformedMessageError: the message can't travel (a field's type, a tensor's dtype, the size).
        """
        state = self._peers.get(peer)
        if state is None:
            self.dropped_messages += 1
            return
        encoded = encode_message(message)
        packets = state.link.send(encoded, self._loop.time(), encoded.size)
        self._flush_due = True
        state.push(packets)
        if state.link.outbox_size > self._max_outbox_bytes:
            waiting = state.link.outbox_size
            reason = f"{peer} does not read: {waiting} bytes wait for it, the limit is {self._max_outbox_bytes}"
            self._loop.call_soon(self._peers.lose, state, reason)

    def disconnect(self, peer: str) -> None:
        """Close the link: what has room still leaves, the other side hears `on_lost`, this side nothing."""
        state = self._peers.get(peer)
        if state is not None:
            self._peers.remove(state, f"{self.name} closed the link")

    def outbox_bytes(self, peer: str) -> int:
        """Bytes that wait for the peer's acknowledgements before they may leave."""
        state = self._peers.get(peer)
        return state.link.outbox_size if state else 0

    def lost_reason(self, peer: str) -> str:
        """Why the last link to ``peer`` was lost."""
        return self._peers.lost_reason(peer)

    def refused(self, peer: str) -> bool:
        """Whether the last link to ``peer`` ended because one side rejects what the other says: dialing is pointless."""
        return self._peers.refused(peer)

    def be_patient(self, seconds: float) -> None:
        """Give no silent peer up before ``seconds``, from its next look on."""
        self._peers.silence_seconds = max(self._peers.silence_seconds, seconds)

    @property
    def peers(self) -> list[str]:
        """Names of those to whom there is a link, up or not."""
        return [state.name for state in self._peers]

    async def close(self) -> None:
        """Close all links and servers; `on_lost` is not called."""
        self._closed = True
        for state in self._peers:
            self.disconnect(state.name)
        if self._closings:
            await asyncio.wait(list(self._closings), timeout=2 * self._grace_seconds)
        await asyncio.gather(*(server.stop(self._grace_seconds) for server in self._servers))
        for task in list(self._closings):
            task.cancel()
        await asyncio.gather(*self._closings, return_exceptions=True)

    # --- life of a peer -----------------------------------------------------------------------------------------------

    def _detach(self, state: Peer, carrier: Carrier) -> None:
        if state.detach(carrier) and state.heard:
            state.expect(self._grace_seconds, self._peers.expire)

    # --- streams ------------------------------------------------------------------------------------------------------

    async def _dial(self, state: Peer) -> None:
        """Keep a stream to the peer's address as long as the link lives."""
        self._track()
        assert state.address is not None
        for attempt in itertools.count():
            if state.carrier is None:
                await self._dial_once(state, state.address)
            if not self._peers.holds(state):
                return
            if state.carrier is not None:  # the peer reached us meanwhile
                await state.down.wait()
            await asyncio.sleep(_BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)])

    async def _dial_once(self, state: Peer, address: Address) -> None:
        channel = open_channel(address)
        stream = DialedStream(channel)
        carrier = self._carrier(state, stream, self._reader())
        state.attach(carrier)
        try:
            await carrier.run(lambda frame, num_bytes: self._take(state, carrier, frame, num_bytes))
        except BrokenStreamError as error:
            state.reason = str(error)
            if error.refused:
                self._peers.lose(state, f"{state.name} at {address} refused the link: {error}", refused=True)
        except BusyError as error:
            state.reason = str(error)
        except RejectedError as error:
            self.refusals.add(_reason(error), f"a frame of {state.name} at {address} was refused: {error}")
            self._peers.lose(state, f"{state.name} at {address} can't be understood: {error}", refused=True)
        finally:
            stream.cancel()
            self._detach(state, carrier)
            await channel.close()

    async def _serve(self, request_iterator: Any, context: Any) -> None:
        """Handle one stream that a peer opened."""
        self._track()
        stream, reader = AcceptedStream(context), self._reader()
        try:
            data = await self._entrance.first_frame(stream, self._connect_seconds)
            if data is None:
                return
            frame = reader.read(data)
            with self._entrance.stream_of(frame.header.name):
                state = await self._admit(frame, stream, context)
                if state is None:
                    return
                carrier = self._carrier(state, stream, reader)
                state.attach(carrier)
                try:
                    self._take(state, carrier, frame, len(data))
                    await carrier.run(lambda frame, num_bytes: self._take(state, carrier, frame, num_bytes))
                except BrokenStreamError as error:
                    state.reason = str(error)
                finally:
                    self._detach(state, carrier)
        except BrokenStreamError:
            return  # gone before it said who it was
        except (WireVersionError, MalformedMessageError) as error:
            self.refusals.add(_reason(error), f"a frame from {context.peer()} was refused: {error}")
            malformed = isinstance(error, MalformedMessageError)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT if malformed else status_of(error), str(error))
        except LayerwiseError as error:
            await context.abort(status_of(error), str(error))

    async def _admit(self, frame: Frame, stream: AcceptedStream, context: Any) -> Peer | None:
        """The peer to whose link the stream's first frame belongs; ``None``: the stream was answered."""
        header = frame.header
        if header.lost:
            raise MalformedMessageError("the first frame of a stream ends a link: it must begin or go on with one")
        packet = Packet(sender=header.sender, receiver=header.receiver, acknowledged=0)
        state = self._peers.get(header.name)
        if self._closed:
            raise UnreachableError(f"{self.name} takes no more links: it ends")
        if state is None:
            self._entrance.check_room(len(self._peers))
        dialing = state is not None and state.dialing is not None and state.link.peer_incarnation in (0, header.sender)
        if dialing and self.name < header.name:  # both have dialed: the stream of the smaller name is kept
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{self.name} is opening this link itself")
        claimed = state is not None and state.up and header.receiver == 0
        if claimed and state is not None and header.sender != state.link.peer_incarnation:
            silent = state.silent_for()
            if silent < self._entrance.limits.answer_seconds:
                sentence = f"{header.name} has a link to {self.name}; another one takes its place only when it is gone"
                self.refusals.add(Refused.NAME, sentence)
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, sentence)
        admission = self._peers.admit(header.name, packet)
        if admission.refusal is not None or admission.link is None:
            writer = FrameWriter()
            reason = admission.refusal.lost if admission.refusal else "no such link"
            answer = FrameHeader(sender=header.receiver, receiver=header.sender, acknowledged=0, lost=reason)
            await stream.write(writer.next_frame(answer))
            return None
        if admission.lost and state is not None:
            self._peers.lose(state, f"{header.name}: {admission.lost}")
        admitted = self._peers.admitted(header.name, admission.link)
        if admitted is None:
            raise UnreachableError(f"{self.name} has closed this link")
        return admitted

    def _reader(self) -> FrameReader:
        return FrameReader(self.pool, max_message_bytes=self._max_message_bytes)

    def _carrier(self, state: Peer, stream: Stream, reader: FrameReader) -> Carrier:
        make: Callable[..., Carrier] = Carrier
        if self._faults is not None:
            make = partial(DisturbedCarrier, sender=state.name, faults=self._faults)
        return make(
            self.name,
            state.link,
            stream,
            reader,
            linger_seconds=self._grace_seconds,
            before_write=self._flush,
            on_written=self._count_written,
        )

    def _flush(self) -> None:
        """Let the process write down what its messages are the effects of; without that nothing may leave."""
        if not self._flush_due:
            return
        try:
            self._before_send()
        except Exception as error:
            self._on_error(error)
            raise BrokenStreamError(f"{self.name} can't write its records: {error}") from error
        self._flush_due = False

    def _count_written(self, num_bytes: int) -> None:
        self.sent_bytes += num_bytes

    # --- frames -------------------------------------------------------------------------------------------------------

    def _take(self, state: Peer, carrier: Carrier, frame: Frame, num_bytes: int) -> None:
        """Hand the messages of a frame on, each once."""
        self.received_bytes += num_bytes
        header, link, now = frame.header, state.link, self._loop.time()
        try:
            if header.lost:
                lost = header.lost[:LONGEST_REASON]
                link.receive(Packet(sender=header.sender, receiver=header.receiver, acknowledged=0, lost=lost), now)
                return
            state.hear()
            if carrier.open_bytes:
                links = (one.carrier.open_bytes for one in self._peers if one.carrier is not None)
                self._entrance.check_receiving(state.name, sum(links))
            for sequence, message in frame.messages or _NOTHING:
                packet = Packet(
                    sender=header.sender,
                    receiver=header.receiver,
                    acknowledged=header.acknowledged,
                    sequence=sequence,
                    message=message,
                )
                for one in link.receive(packet, now):
                    self._call(self._on_message, state.name, one)
                    if not self._peers.holds(state):
                        return
        except LinkLost as error:
            self._peers.lose(state, f"{state.name} gave the link up: {error}")
            return
        if header.answer or carrier.received_bytes >= self._credit_bytes // 4:
            link.acknowledge_now(now)
        state.tick()

    # --- callbacks ----------------------------------------------------------------------------------------------------

    def _call(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception as error:  # a bug in a role must not look like a broken stream
            self._on_error(error)

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": f"a callback of {self.name} failed: {error}", "exception": error})

    def _on_dialing_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error if isinstance(error, Exception) else RuntimeError(str(error)))

    def _track(self) -> None:
        """Let `close` wait for the current task."""
        task = asyncio.current_task()
        assert task is not None
        if task not in self._closings:
            self._closings.add(task)
            task.add_done_callback(self._closings.discard)


def _reason(error: RejectedError) -> Refused:
    return Refused.VERSION if isinstance(error, WireVersionError) else Refused.MALFORMED


_NOTHING: list[tuple[int, Any]] = [(0, None)]
"""A frame without messages still acknowledges."""
