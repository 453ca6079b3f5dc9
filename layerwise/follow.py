"""Following a job to its end: its events as they come, its document at regular times."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from layerwise.client import FINAL_STATES, CoordinatorClient, JobEvent
from layerwise.errors import DeadlineError, LayerwiseError, RetryableError


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
    ) -> None:
        self._client = client
        self._job = job
        self._watcher = watcher
        self._offset = offset
        self._refresh_seconds = refresh_seconds
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
        document = self._client.get_job(self._job)
        self._watcher.on_document(document)
        return document

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
            try:
                wake = self._wakes.get(timeout=max(0.0, until - now))
            except queue.Empty:
                continue
            if wake.error is not None:
                raise wake.error
            if wake.ended:
                return
            if wake.call is not None:
                wake.call()
            if wake.event is not None:
                self._watcher.on_event(wake.event)

    def _refresh(self) -> None:
        try:
            self._watcher.on_document(self._client.get_job(self._job))
        except RetryableError:
            return  # the reader of events looks for the coordinator, and gives up when it stays away

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
