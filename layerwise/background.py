"""Work off the event loop: one function on a thread, its outcome back on the loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from layerwise.roles import Effect
from layerwise.service import Service

Value = TypeVar("Value")


class Background:
    """``num_threads`` threads for loading and building. Used from the event loop's thread only."""

    def __init__(self, service: Service, name: str, num_threads: int = 1) -> None:
        self._service = service
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._closed = False

    def run(
        self,
        work: Callable[[], Value],
        done: Callable[[Value], list[Effect]],
        failed: Callable[[Exception], list[Effect]],
    ) -> None:
        """Run ``work`` on a thread; then ``done`` or ``failed`` on the loop, and carry out what they return.

        Once closed, nothing is run any more.
        """
        if self._closed:
            return

        def finish(future: Future[Value]) -> None:
            if self._closed or future.cancelled():
                return
            error = future.exception()
            if error is None:
                self._service.guard(lambda: done(future.result()))
            elif isinstance(error, Exception):
                self._service.guard(lambda: failed(error))

        loop = self._service.loop

        def hand_over(future: Future[Value]) -> None:
            if not self._closed:
                loop.call_soon_threadsafe(finish, future)

        self._pool.submit(work).add_done_callback(hand_over)

    def close(self) -> None:
        """Forget what waits; what is under way ends by itself, unheard."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """End what is under way and what waits, unheard; wait for it. Not on the event loop's thread."""
        self._closed = True
        self._pool.shutdown(wait=True)


def sentence(error: Exception) -> str:
    """What to tell the user of ``error``: its own words, and its kind where the words say nothing."""
    text = " ".join(str(error).split())
    return text if text else type(error).__name__
