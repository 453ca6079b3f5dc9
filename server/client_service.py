"""What clients may call: decode, hand to the role, encode. Errors travel as gRPC status with their sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from layerwise.errors import ConfigError, LayerwiseError, RejectedError
from layerwise.grpc_status import status_of
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.server.job_record import JobEvent
from layerwise.version import WIRE_VERSION

SERVICE = "layerwise.v1.Coordinator"

Context = grpc.aio.ServicerContext[Any, Any]


class Desk(Protocol):
    """The coordinator as its clients see it. All on the event loop's thread."""

    async def submit(self, spec_json: str) -> dict[str, Any]:
        """Queue a job; it is stored when this returns."""
        ...

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job."""
        ...

    async def resume(self, job: str, directory: str) -> dict[str, Any]:
        """Queue a job again; by its name, or by the directory of its cuts."""
        ...

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs' documents."""
        ...

    def job(self, job: str) -> dict[str, Any]:
        """One job's document."""
        ...

    def nodes(self) -> list[dict[str, Any]]:
        """The processes."""
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
        unary: dict[str, tuple[Callable[[Any], Awaitable[Any]], Any]] = {
            "Submit": (self._submit, pb2.SubmitRequest),
            "ListJobs": (self._list_jobs, pb2.ListJobsRequest),
            "GetJob": (self._get_job, pb2.JobRequest),
            "Cancel": (self._cancel, pb2.JobRequest),
            "Resume": (self._resume, pb2.ResumeRequest),
            "ListNodes": (self._list_nodes, pb2.ListNodesRequest),
        }
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(answer),
                request_deserializer=request.FromString,
                response_serializer=lambda reply: reply.SerializeToString(),
            )
            for name, (answer, request) in unary.items()
        }
        handlers["FollowEvents"] = grpc.unary_stream_rpc_method_handler(
            self._follow_events,
            request_deserializer=pb2.FollowEventsRequest.FromString,
            response_serializer=pb2.EventReply.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _submit(self, request: pb2.SubmitRequest) -> pb2.JobReply:
        return _job_reply(await self._desk.submit(request.spec_json))

    async def _list_jobs(self, request: pb2.ListJobsRequest) -> pb2.JobsReply:
        return pb2.JobsReply(jobs_json=json.dumps(self._desk.jobs()))

    async def _get_job(self, request: pb2.JobRequest) -> pb2.JobReply:
        return _job_reply(self._desk.job(request.job))

    async def _cancel(self, request: pb2.JobRequest) -> pb2.JobReply:
        return _job_reply(await self._desk.cancel(request.job))

    async def _resume(self, request: pb2.ResumeRequest) -> pb2.JobReply:
        if bool(request.job) == bool(request.directory):
            raise ConfigError("resume needs either a job's name or the directory of its cuts")
        return _job_reply(await self._desk.resume(request.job, request.directory))

    async def _list_nodes(self, request: pb2.ListNodesRequest) -> pb2.NodesReply:
        return pb2.NodesReply(nodes_json=json.dumps(self._desk.nodes()))

    async def _follow_events(self, request: pb2.FollowEventsRequest, context: Context) -> AsyncIterator[pb2.EventReply]:
        try:
            _check_version(request)
            async for event in self._desk.follow(request.job, request.offset):
                yield pb2.EventReply(offset=event.sequence, event_json=json.dumps(event.to_json()))
        except LayerwiseError as error:
            await context.abort(status_of(error), str(error))


def _job_reply(document: dict[str, Any]) -> pb2.JobReply:
    return pb2.JobReply(job_json=json.dumps(document))


def _check_version(request: Any) -> None:
    if request.wire_version != WIRE_VERSION:
        raise RejectedError(
            f"the caller speaks wire version {request.wire_version}, this coordinator {WIRE_VERSION}; "
            "use the same version of layerwise"
        )


def _answering(answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        try:
            _check_version(request)
            return await answer(request)
        except asyncio.CancelledError:
            raise
        except LayerwiseError as error:
            await context.abort(status_of(error), str(error))

    return call
