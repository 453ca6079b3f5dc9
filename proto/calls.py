"""The calls of a coordinator's clients: plain requests and documents on this side, the messages of `layerwise.proto` on the wire.

Both sides use the same table `CALLS`, so a method's name and its two messages are said once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from layerwise.errors import MalformedMessageError, RejectedError
from layerwise.json_text import json_text
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.version import WIRE_VERSION

CLIENT_SERVICE = "layerwise.v1.Coordinator"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """What a client asks; each method reads the fields that its message has."""

    spec_json: str = ""
    job: str = ""
    directory: str = ""
    shards: int = 0
    node: str = ""
    undo: bool = False
    offset: int = 0
    """Of events: the first that is wanted; of jobs: how many of the oldest to leave out."""
    wire_version: int = WIRE_VERSION

    def check_version(self) -> None:
        """``RejectedError`` when the caller speaks another wire version."""
        if self.wire_version != WIRE_VERSION:
            raise RejectedError(
                f"the caller speaks wire version {self.wire_version}, this coordinator {WIRE_VERSION}; "
                "use the same version of layerwise"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EventDocument:
    """One event of a job at its place in the job's log."""

    offset: int
    event: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsPage:
    """Some of the jobs' documents, oldest first; the next page begins at ``next_offset`` (0: this is the last one)."""

    documents: list[dict[str, Any]]
    next_offset: int = 0


@dataclass(frozen=True, slots=True)
class ClientCall:
    """One method: its path, its request message, and the message and field that carry its answer's JSON document."""

    name: str
    request: type[Message]
    reply: type[Message]
    field: str

    @property
    def path(self) -> str:
        """Where gRPC finds it."""
        return f"/{CLIENT_SERVICE}/{self.name}"

    def encode_request(self, request: ClientRequest) -> bytes:
        """The request's bytes."""
        wanted = self.request.DESCRIPTOR.fields_by_name
        return self.request(**{name: getattr(request, name) for name in wanted}).SerializeToString()

    def decode_request(self, data: bytes) -> ClientRequest:
        """The inverse; a request of another wire version comes through, for `ClientRequest.check_version` to refuse."""
        message = self._parse(self.request, data)
        return ClientRequest(**{name: getattr(message, name) for name in self.request.DESCRIPTOR.fields_by_name})

    def encode_reply(self, document: Any) -> bytes:
        """The answer's bytes: a JSON document, a `JobsPage`, or an `EventDocument`."""
        if isinstance(document, EventDocument):
            return self.reply(offset=document.offset, event_json=json_text(document.event)).SerializeToString()
        if isinstance(document, JobsPage):
            jobs_json = json_text(document.documents)
            return self.reply(jobs_json=jobs_json, next_offset=document.next_offset).SerializeToString()
        return self.reply(**{self.field: json_text(document)}).SerializeToString()

    def decode_reply(self, data: bytes) -> Any:
        """The inverse.

        Raises:
            MalformedMessageError: the answer is not what this method gives.
        """
        message = self._parse(self.reply, data)
        text = getattr(message, self.field)
        try:
            document = json.loads(text)
        except ValueError as error:
            raise MalformedMessageError(
                f"the coordinator answered {text[:80]!r}, which is no JSON ({error})"
            ) from error
        if self.reply is pb2.EventReply:
            if not isinstance(document, dict):
                raise MalformedMessageError(f"the coordinator answered {text[:80]!r}, which is no event")
            return EventDocument(offset=message.offset, event=document)  # type: ignore[attr-defined]
        wanted = list if self.reply in (pb2.JobsReply, pb2.NodesReply) else dict
        if not isinstance(document, wanted):
            raise MalformedMessageError(f"the coordinator answered {text[:80]!r} where a {wanted.__name__} belongs")
        if self.reply is pb2.JobsReply and isinstance(document, list):
            return JobsPage(documents=document, next_offset=message.next_offset)  # type: ignore[attr-defined]
        return document

    def _parse(self, kind: type[Message], data: bytes) -> Message:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            raise MalformedMessageError(f"not a {kind.DESCRIPTOR.name} of {self.name}: {error}") from error


CALLS = {
    call.name: call
    for call in (
        ClientCall("Submit", pb2.SubmitRequest, pb2.JobReply, "job_json"),
        ClientCall("ListJobs", pb2.ListJobsRequest, pb2.JobsReply, "jobs_json"),
        ClientCall("GetJob", pb2.JobRequest, pb2.JobReply, "job_json"),
        ClientCall("Cancel", pb2.JobRequest, pb2.JobReply, "job_json"),
        ClientCall("Resume", pb2.ResumeRequest, pb2.JobReply, "job_json"),
        ClientCall("Drain", pb2.DrainRequest, pb2.DrainReply, "drain_json"),
        ClientCall("ListNodes", pb2.ListNodesRequest, pb2.NodesReply, "nodes_json"),
        ClientCall("FollowEvents", pb2.FollowEventsRequest, pb2.EventReply, "event_json"),
    )
}
