"""The gRPC side of a link: one bidirectional stream of frames, opened here or accepted here."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Protocol, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from layerwise.address import Address, TcpAddress, UnixAddress
from layerwise.errors import ConfigError, RetryableError
from layerwise.proto.frames import MAX_FRAME_BYTES

SERVICE = "layerwise.v1.Peer"
_METHOD = "Link"

Options = Sequence[tuple[str, Any]]

_SIZES: Options = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
)
_PINGS = ("grpc.http2.min_ping_interval_without_data_ms", 10_000)
"""Clients that follow a quiet job ping every 20 s; without this a server takes that for an attack after a while."""
_CONNECTIONS: Options = (
    ("grpc.max_concurrent_streams", 128),  # of one connection; a link has a connection of its own, a client needs few
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
)
_MOST_CONNECTIONS = 4096
# On TCP a larger read-ahead helps chunks of a megabyte; elsewhere the defaults are as good.
_TCP: Options = (("grpc.http2.lookahead_bytes", 16 << 20),)

# Answers that another attempt would get again.
_TERMINAL_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class BrokenStreamError(RetryableError):
    """The stream ended other than by agreement; ``refused``: the other side said no, and would say so again."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Stream(Protocol):
    """Frames in both directions, in order, until it breaks (`BrokenStreamError`)."""

    async def read(self) -> bytes | None:
        """The next frame; ``None`` at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Hand a frame over; returns when there is room for the next."""
        ...

    async def finish(self) -> None:
        """No frame follows."""
        ...


class DialedStream:
    """The stream that this process opened."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call: Any = channel.stream_stream(f"/{SERVICE}/{_METHOD}")()

    async def read(self) -> bytes | None:
        """The next frame; ``None`` at the end."""
        try:
            data = await self._call.read()
        except _FAULTS as error:
            _fail(error)
        return None if data is grpc.aio.EOF else data

    async def write(self, data: bytes) -> None:
        """Hand a frame over; returns when there is room for the next."""
        try:
            await self._call.write(data)
        except _FAULTS as error:
            _fail(error)

    async def finish(self) -> None:
        """No frame follows."""
        try:
            await self._call.done_writing()
        except _FAULTS as error:
            _fail(error)

    def cancel(self) -> None:
        """End the stream now."""
        self._call.cancel()


class AcceptedStream:
    """A stream that a peer opened."""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def read(self) -> bytes | None:
        """The next frame; ``None`` at the end."""
        try:
            data = await self._context.read()
        except _FAULTS as error:
            _fail(error)
        return None if data is grpc.aio.EOF else data

    async def write(self, data: bytes) -> None:
        """Hand a frame over; returns when there is room for the next."""
        try:
            await self._context.write(data)
        except _FAULTS as error:
            _fail(error)

    async def finish(self) -> None:
        """The end of the handler ends the stream."""


# What gRPC raises when a stream is gone: a status, a call on an ended stream, an operation given up, a cancellation.
_FAULTS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError)


def _fail(error: BaseException) -> NoReturn:
    """Raise what a fault of gRPC means; the cancellation of our own task stays what it is."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error
        raise BrokenStreamError("the stream was cancelled") from error
    if isinstance(error, grpc.aio.AioRpcError):
        refused = error.code() in _TERMINAL_CODES
        raise BrokenStreamError(error.details() or error.code().name, refused=refused) from error
    raise BrokenStreamError(str(error) or type(error).__name__) from error


def open_channel(address: Address) -> grpc.aio.Channel:
    """A channel of its own for one stream; connects when first used, and fails at once when nobody answers."""
    options = [
        *_SIZES,
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]
    if isinstance(address, UnixAddress):
        credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
        return grpc.aio.secure_channel(str(address), credentials, options=options)
    return grpc.aio.insecure_channel(str(address), options=[*options, *_TCP])


async def make_server(handle: Callable[[Any, Any], Awaitable[None]]) -> grpc.aio.Server:
    """A server (not started) with the health service, whose links are served by ``handle(request_iterator, context)``."""
    # Half of the files that a process may have open: strangers must not keep it from opening its own.
    connections = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, _MOST_CONNECTIONS)
    limits = (*_CONNECTIONS, ("grpc.max_allowed_incoming_connections", connections))
    server = grpc.aio.server(options=[*_SIZES, *_TCP, _PINGS, *limits, ("grpc.so_reuseport", 0)])
    method: Any = grpc.stream_stream_rpc_method_handler(cast(Any, handle))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {_METHOD: method}),))
    servicer: Any = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", SERVICE):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return server


def bind(server: grpc.aio.Server, address: Address) -> Address:
    """Bind ``server``; returns the address with the port that the system chose.

    Raises:
        ConfigError: the address is taken or not of this host.
    """
    try:
        if isinstance(address, UnixAddress):
            server.add_secure_port(str(address), grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
            return address
        return TcpAddress(host=address.host, port=server.add_insecure_port(str(address)))
    except RuntimeError as error:
        raise ConfigError(
            f"can't listen on {address}: it is taken by another process or not an address of this machine;"
            " choose another (port 0 takes a free one)"
        ) from error
