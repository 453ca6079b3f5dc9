"""What clients may call: decode, hand to the role, encode. Errors travel as gRPC status with their sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from layerwise.errors import ConfigError, LayerwiseError
from layerwise.grpc_status import status_of
from layerwise.proto.calls import CALLS, CLIENT_SERVICE, ClientCall, ClientRequest, EventDocument, JobsPage
from layerwise.server.job_record import JobEvent

Context = grpc.aio.ServicerContext[Any, Any]

PAGE_JOBS = 100
"""The most jobs in one answer: to build their documents takes the event loop's time."""
PAGE_BYTES = 1 << 20
"""About the most bytes in one answer; a job that is larger comes alone. gRPC takes messages of up to 4 MB."""


class Desk(Protocol):
    """The coordinator as its clients see it. All on the event loop's thread."""

    async def submit(self, spec_json: str) -> dict[str, Any]:
        """Queue a job; it is stored when this returns."""
        ...

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job."""
        ...

    async def resume(self, job: str, directory: str, shards: int) -> dict[str, Any]:
        """Queue a job again, by its name or by the directory of its cuts; on so many shards (0: as many as before)."""
        ...

    def jobs(self, offset: int, limit: int) -> list[dict[str, Any]]:
        """The documents of at most ``limit`` jobs, oldest first, without the ``offset`` oldest."""
        ...

    def job(self, job: str) -> dict[str, Any]:
        """One job's document."""
        ...

    def nodes(self) -> list[dict[str, Any]]:
        """The processes."""
        ...

    async def drain(self, node: str, *, undo: bool) -> dict[str, Any]:
        """Send jobs away from a node, or let them come again."""
        ...

    def follow(self, job: str, offset: int) -> AsyncIterator[JobEvent]:
        """A job's events from ``offset`` on, until it has ended."""
        ...


class ClientService:
    """The gRPC service ``layerwise.v1.Coordinator`` in front of a `Desk`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let ``server`` answer the service's calls."""
        answers: dict[str, Callable[[ClientRequest], Awaitable[Any]]] = {
            "Submit": self._submit,
            "ListJobs": self._list_jobs,
            "GetJob": self._get_job,
            "Cancel": self._cancel,
            "Resume": self._resume,
            "ListNodes": self._list_nodes,
            "Drain": self._drain,
        }
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(CALLS[name], answer), response_serializer=CALLS[name].encode_reply
            )
            for name, answer in answers.items()
        }
        handlers["FollowEvents"] = grpc.unary_stream_rpc_method_handler(
            self._follow_events, response_serializer=CALLS["FollowEvents"].encode_reply
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(CLIENT_SERVICE, handlers),))

    async def _submit(self, request: ClientRequest) -> dict[str, Any]:
        return await self._desk.submit(request.spec_json)

    async def _list_jobs(self, request: ClientRequest) -> JobsPage:
        found = self._desk.jobs(request.offset, PAGE_JOBS + 1)
        page: list[dict[str, Any]] = []
        room = PAGE_BYTES
        for document in found[:PAGE_JOBS]:
            room -= len(json.dumps(document))
            if page and room < 0:
                break
            page.append(document)
        more = len(page) < len(found)
        return JobsPage(documents=page, next_offset=request.offset + len(page) if more else 0)

    async def _get_job(self, request: ClientRequest) -> dict[str, Any]:
        return self._desk.job(request.job)

    async def _cancel(self, request: ClientRequest) -> dict[str, Any]:
        return await self._desk.cancel(request.job)

    async def _resume(self, request: ClientRequest) -> dict[str, Any]:
        if bool(request.job) == bool(request.directory):
            raise ConfigError("resume needs either a job's name or the directory of its cuts")
        return await self._desk.resume(request.job, request.directory, request.shards)

    async def _list_nodes(self, request: ClientRequest) -> list[dict[str, Any]]:
        return self._desk.nodes()

    async def _drain(self, request: ClientRequest) -> dict[str, Any]:
        if not request.node:
            raise ConfigError("drain needs the name of a node, a host or a process")
        return await self._desk.drain(request.node, undo=request.undo)

    async def _follow_events(self, data: bytes, context: Context) -> AsyncIterator[EventDocument]:
        try:
            request = _request(CALLS["FollowEvents"], data)
            async for event in self._desk.follow(request.job, request.offset):
                yield EventDocument(offset=event.sequence, event=event.to_json())
        except LayerwiseError as error:
            await context.abort(status_of(error), str(error))


def _request(call: ClientCall, data: bytes) -> ClientRequest:
    """Decoded here and not by gRPC, which would answer bytes that are no request with a traceback in the log."""
    request = call.decode_request(data)
    request.check_version()
    return request


def _answering(
    method: ClientCall, answer: Callable[[ClientRequest], Awaitable[Any]]
) -> Callable[[bytes, Context], Awaitable[Any]]:
    async def call(data: bytes, context: Context) -> Any:
        try:
            return await answer(_request(method, data))
        except asyncio.CancelledError:
            raise
        except LayerwiseError as error:
            await context.abort(status_of(error), str(error))

    return call
