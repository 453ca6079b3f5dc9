"""Following a job to its end: its events as they come, its document at regular times."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from layerwise.client import FINAL_STATES, RECONNECT_SECONDS, CoordinatorClient, JobEvent
from layerwise.errors import DeadlineError, LayerwiseError, RetryableError

RETRY_SECONDS = 0.2


class Watcher(Protocol):
    """Who is told; all calls come from the thread that follows."""

    def on_event(self, event: JobEvent) -> None:
        """The job wrote a line to its log."""
        ...

    def on_document(self, document: dict[str, Any]) -> None:
        """The job as it is now."""
        ...


class Silent:
    """A watcher that shows nothing."""

    def on_event(self, event: JobEvent) -> None:
        """Nothing."""

    def on_document(self, document: dict[str, Any]) -> None:
        """Nothing."""


class Quiet(Silent):
    """A progress view that shows nothing, for programs."""

    def note(self, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _Wake:
    """What the following thread is woken for."""

    event: JobEvent | None = None
    error: BaseException | None = None
    call: Callable[[], None] | None = None
    ended: bool = False


class JobFollower:
    """Follows ``job`` in the calling thread; one more thread, joined at the end, reads the stream of events."""

    def __init__(
        self,
        client: CoordinatorClient,
        job: str,
        watcher: Watcher,
        *,
        offset: int = 0,
        refresh_seconds: float = 1.0,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> None:
        self._client = client
        self._job = job
        self._watcher = watcher
        self._offset = offset
        self._refresh_seconds = refresh_seconds
        self._reconnect_seconds = reconnect_seconds
        self.document: dict[str, Any] | None = None
        """The job as it was last seen."""
        # A SimpleQueue may be filled from a signal handler: its put is reentrant.
        self._wakes: queue.SimpleQueue[_Wake] = queue.SimpleQueue()

    def interrupt(self, call: Callable[[], None]) -> None:
        """Have the following thread call ``call`` soon; what that raises ends `run`. Fit for signal handlers."""
        self._wakes.put(_Wake(call=call))

    def run(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the job's last document when it has ended.

        Raises:
            DeadlineError: it has not within ``timeout`` seconds; the job goes on.
            UnreachableError: the coordinator stayed away.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        # The stream has a connection of its own: closing that is what ends the thread, whatever it waits for.
        with CoordinatorClient(self._client.address) as stream_client:
            reader = threading.Thread(target=self._read, args=(stream_client,), name="layerwise-follow", daemon=True)
            reader.start()
            try:
                self._loop(deadline)
            finally:
                stream_client.close()
                reader.join()
        return self._last_document(deadline)

    def _last_document(self, deadline: float | None) -> dict[str, Any]:
        """The document of the job that has ended, however long the coordinator is away just now."""
        give_up = time.monotonic() + self._reconnect_seconds
        until = give_up if deadline is None else min(give_up, deadline)
        while True:
            try:
                return self._see()
            except RetryableError:
                now = time.monotonic()
                if now >= until:
                    raise
                self._wait(min(RETRY_SECONDS, until - now))

    def _loop(self, deadline: float | None) -> None:
        refresh = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= refresh:
                self._refresh()
                refresh = time.monotonic() + self._refresh_seconds
                now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise DeadlineError(f"job {self._job} has not ended in time; it goes on")
            until = refresh if deadline is None else min(refresh, deadline)
            if self._wait(max(0.0, until - now)):
                return

    def _wait(self, seconds: float) -> bool:
        """Take what comes next within so many seconds; tells whether it is the end of the job."""
        try:
            wake = self._wakes.get(timeout=seconds)
        except queue.Empty:
            return False
        if wake.error is not None:
            raise wake.error
        if wake.call is not None:
            wake.call()
        if wake.event is not None:
            self._watcher.on_event(wake.event)
        return wake.ended

    def _refresh(self) -> None:
        try:
            self._see()
        except RetryableError:
            return  # the reader of events looks for the coordinator, and gives up when it stays away

    def _see(self) -> dict[str, Any]:
        self.document = self._client.get_job(self._job)
        self._watcher.on_document(self.document)
        return self.document

    def _read(self, client: CoordinatorClient) -> None:
        try:
            for event in client.follow_events(self._job, self._offset):
                self._wakes.put(_Wake(event=event))
        except (LayerwiseError, ValueError) as error:  # ValueError: the connection was closed under it
            self._wakes.put(_Wake(error=error))
        else:
            self._wakes.put(_Wake(ended=True))


def ended(document: dict[str, Any]) -> bool:
    """Whether the job is over."""
    return document.get("state") in FINAL_STATES
