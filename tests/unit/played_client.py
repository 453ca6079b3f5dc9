"""A coordinator's client whose answers are written down beforehand; nothing is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Self

import pytest

from layerwise.client import JobEvent
from layerwise.errors import UnreachableError


class PlayedClient:
    """Gives its answers to `get_job` in order, raising those that are errors; the last one for ever.

    The job's events end at once, or with ``endless`` when the client is closed. Being one instance for both connections
    of a follower, it counts as closed when either is.
    """

    address = "unix:/played"

    def __init__(self, *answers: dict[str, Any] | Exception, endless: bool = False) -> None:
        self._answers = list(answers)
        self._endless = endless
        self._closed = threading.Event()
        self.asked = 0
        self.deaf = 0
        """So many requests to cancel from now on are lost."""
        self.cancelled: list[str] = []

    def play(self, monkeypatch: pytest.MonkeyPatch) -> Self:
        """Have every command and follower of this test use it."""
        for module in ("layerwise.client", "layerwise.follow"):
            monkeypatch.setattr(f"{module}.CoordinatorClient", lambda address: self)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *how: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()

    def get_job(self, job: str) -> dict[str, Any]:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def submit(self, spec_json: str) -> dict[str, Any]:
        return {"job": "tiny-1", "state": "queued", "num_events": 0}

    def cancel(self, job: str) -> dict[str, Any]:
        if self.deaf:
            self.deaf -= 1
            raise UnreachableError("no coordinator answers")
        self.cancelled.append(job)
        return {"job": job, "state": "stopping"}

    def list_jobs(self) -> list[dict[str, Any]]:
        return []

    def resume(self, **named: Any) -> dict[str, Any]:
        return {"job": "tiny-1", "state": "queued", "num_events": 0}

    def follow_events(self, job: str, offset: int = 0) -> Iterator[JobEvent]:
        if self._endless:
            self._closed.wait()
        yield from ()
