"""What the command line and `layerwise.connect` ask of a coordinator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from layerwise.errors import DeadlineError, UnreachableError
from layerwise.grpc_status import error_of
from layerwise.proto.calls import CALLS, ClientRequest, EventDocument, JobsPage

CALL_SECONDS = 15.0
RECONNECT_SECONDS = 60.0
FINAL_STATES = frozenset({"done", "failed", "cancelled"})

# A lost coordinator is looked for again at once and then often; keepalive notices one whose machine vanished. What gRPC calls
# the smallest backoff is how long it waits for one connection: a far or busy coordinator needs time to accept it.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One line of a job's log.

    ``offset`` counts from 0; ``time`` is in unix seconds; ``level`` is "info", "warning" or "error".
    """

    offset: int
    time: float
    level: str
    message: str
    fields: Mapping[str, Any]

    @classmethod
    def from_document(cls, document: EventDocument) -> JobEvent:
        """One event as the coordinator sends it."""
        value = document.event
        return cls(
            offset=document.offset,
            time=float(value.get("time", 0.0)),
            level=str(value.get("level", "info")),
            message=str(value.get("message", "")),
            fields=value.get("fields") or {},
        )


class CoordinatorClient:
    """Calls to one coordinator, each with a time limit. Thread-safe; close it, or use it as a context manager.

    Every method raises `UnreachableError` when nobody answers, `DeadlineError` when the answer takes longer than
    ``call_seconds``, and whatever error the coordinator refuses with.
    """

    def __init__(self, address: str, *, call_seconds: float = CALL_SECONDS) -> None:
        self.address = address
        self.call_seconds = call_seconds
        self._closed = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; streams that are followed end with it."""
        self._closed = True
        self._channel.close()

    @contextmanager
    def watch_ready(self, on_ready: Callable[[], None]) -> Iterator[None]:
        """Connect, and call ``on_ready`` (from a thread of gRPC) whenever the coordinator accepts calls."""

        def on_state(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.READY:
                on_ready()

        self._channel.subscribe(on_state, try_to_connect=True)
        try:
            yield
        finally:
            self._channel.unsubscribe(on_state)

    def wait_until_ready(self, seconds: float) -> None:
        """Return when the coordinator accepts calls; `UnreachableError` after ``seconds``."""
        ready = threading.Event()
        with self.watch_ready(ready.set):
            if not ready.wait(seconds):
                raise UnreachableError(self._nobody())

    # ---- calls ----

    def submit(self, spec_json: str) -> dict[str, Any]:
        """Queue a job (`JobSpec.to_json`); gives its document."""
        return self._job("Submit", ClientRequest(spec_json=spec_json))

    def list_jobs(self) -> list[dict[str, Any]]:
        """All jobs' documents, oldest first. They come in pages, each a call with a time limit of its own."""
        documents: list[dict[str, Any]] = []
        offset = 0
        while True:
            page: JobsPage = self._call("ListJobs", ClientRequest(offset=offset))
            documents += page.documents
            if page.next_offset <= offset:
                return documents
            offset = page.next_offset

    def get_job(self, job: str) -> dict[str, Any]:
        """One job's document."""
        return self._job("GetJob", ClientRequest(job=job))

    def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job at its next update, with a last cut; gives its document. A job that has ended stays as it is."""
        return self._job("Cancel", ClientRequest(job=job))

    def resume(self, *, job: str = "", directory: str = "", shards: int = 0) -> dict[str, Any]:
        """Queue a job again from its newest durable cut.

        It is one that this coordinator knows, or one that only a directory of cuts remembers. It goes on with ``shards``
        of them (0: as many as before).
        """
        return self._job("Resume", ClientRequest(job=job, directory=directory, shards=shards))

    def list_nodes(self) -> list[dict[str, Any]]:
        """The processes of the cluster."""
        return self._list("ListNodes", ClientRequest())

    def drain(self, node: str, *, undo: bool = False) -> dict[str, Any]:
        """Send all jobs away from a node, host or process at their next update, and let none come; ``undo``: let them.

        The answer has the node's ``processes``, as `list_nodes` gives them, and the ``jobs`` that move. They have moved
        once no process of the node has a ``job``.

        Raises:
            NotFoundError: there is no such node; with ``undo``, it is not drained.
            NotAllowedError: too few other processes are free; nothing was changed.
        """
        return self._job("Drain", ClientRequest(node=node, undo=undo))

    def events(self, job: str) -> Iterator[JobEvent]:
        """The job's events up to now."""
        left = int(self.get_job(job).get("num_events") or 0)
        if not left:
            return
        for event in self.follow_events(job):
            yield event
            left -= 1
            if not left:
                return

    def follow_events(
        self, job: str, offset: int = 0, *, reconnect_seconds: float = RECONNECT_SECONDS
    ) -> Iterator[JobEvent]:
        """The job's events from ``offset`` on, as they happen, until the job has ended.

        A coordinator that is lost is looked for again, for up to ``reconnect_seconds`` without an event; no event is
        lost or repeated.
        """
        call = self._channel.unary_stream(
            CALLS["FollowEvents"].path,
            request_serializer=CALLS["FollowEvents"].encode_request,
            response_deserializer=CALLS["FollowEvents"].decode_reply,
        )
        lost_at: float | None = None
        while True:
            stream = call(ClientRequest(job=job, offset=offset))
            try:
                for reply in stream:
                    lost_at = None
                    if reply.offset >= offset:
                        offset = reply.offset + 1
                        yield JobEvent.from_document(reply)
                if self._ended(job):
                    return
            except grpc.RpcError as error:
                # A coordinator that ends in good order cancels its streams.
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise self._translate(error, None) from error
            finally:
                stream.cancel()
            if self._closed:
                return
            lost_at = lost_at if lost_at is not None else time.monotonic()
            try:
                self.wait_until_ready(max(0.0, lost_at + reconnect_seconds - time.monotonic()))
            except UnreachableError:
                raise UnreachableError(
                    f"the coordinator at {self.address} has not answered for {reconnect_seconds:.0f} s; the job may "
                    f"still be training: follow it again with `layerwise logs -f {job}` once the coordinator is back"
                ) from None

    # ---- inside ----

    def _ended(self, job: str) -> bool:
        try:
            return self.get_job(job).get("state") in FINAL_STATES
        except (UnreachableError, DeadlineError):
            return False

    def _job(self, method: str, request: ClientRequest) -> dict[str, Any]:
        document: dict[str, Any] = self._call(method, request)
        return document

    def _list(self, method: str, request: ClientRequest) -> list[dict[str, Any]]:
        documents: list[dict[str, Any]] = self._call(method, request)
        return documents

    def _call(self, method: str, request: ClientRequest) -> Any:
        one = CALLS[method]
        call = self._channel.unary_unary(
            one.path, request_serializer=one.encode_request, response_deserializer=one.decode_reply
        )
        try:
            return call(request, timeout=self.call_seconds)
        except grpc.RpcError as error:
            raise self._translate(error, self.call_seconds) from error

    def _translate(self, error: grpc.RpcError, seconds: float | None) -> Exception:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNAVAILABLE:
            return UnreachableError(self._nobody())
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and seconds is not None:
            return DeadlineError(f"the coordinator at {self.address} did not answer within {seconds:.0f} s")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return UnreachableError(f"what listens at {self.address} is no layerwise coordinator of this version")
        return error_of(code, details)

    def _nobody(self) -> str:
        return (
            f"no coordinator answers at {self.address}; start one with `layerwise up` or `layerwise coordinator`, "
            f"or pass another --coordinator"
        )
