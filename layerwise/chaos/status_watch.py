"""The newest document of a job, asked for by a thread of its own: a coordinator that is paused answers nobody."""

from __future__ import annotations

import threading
from typing import Any

from layerwise.client import FINAL_STATES, CoordinatorClient
from layerwise.errors import LayerwiseError, RetryableError

ASK_SECONDS = 0.1
CALL_SECONDS = 2.0


class StatusWatch:
    """Asks ``address`` for ``job`` until it has ended. Any thread may read; close it, or use it as a context manager."""

    def __init__(self, address: str, job: str) -> None:
        self.job = job
        self._client = CoordinatorClient(address, call_seconds=CALL_SECONDS)
        self._document: dict[str, Any] = {}
        self._error: LayerwiseError | None = None
        self._over = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._ask, name="layerwise-chaos-status", daemon=True)
        self._thread.start()

    def __enter__(self) -> StatusWatch:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    @property
    def document(self) -> dict[str, Any]:
        """The newest answer; empty before the first one."""
        return self._document

    @property
    def error(self) -> LayerwiseError | None:
        """What ended the asking before the job had ended."""
        return self._error

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the job has ended; tells whether it has (or nobody can be asked any more)."""
        return self._over.wait(seconds)

    def close(self) -> None:
        """Stop asking."""
        self._closed = True
        self._client.close()
        self._thread.join()

    def _ask(self) -> None:
        pause = threading.Event()
        while not self._closed:
            try:
                self._document = self._client.get_job(self.job)
            except RetryableError:
                pass  # away, or paused: both are what this run is about
            except LayerwiseError as error:
                self._error = error
                self._over.set()
                return
            except ValueError:  # the connection was closed under it
                return
            if self._document.get("state") in FINAL_STATES:
                self._over.set()
                return
            pause.wait(ASK_SECONDS)
