"""Work off the event loop: one function on a thread, its outcome back on the loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from layerwise.roles import Effect
from layerwise.service import Service
from layerwise.threads import VitalThread

Value = TypeVar("Value")


class Background:
    """``num_threads`` threads for loading and building. Used from the event loop's thread only.

    With ``abandon`` the process may end while work is under way: for work that may hang, such as a user's own loader.
    Without it the interpreter waits for the threads.
    """

    def __init__(self, service: Service, name: str, num_threads: int = 1, *, abandon: bool = False) -> None:
        self._service = service
        self._name = name
        self._num_threads = num_threads
        self._abandon = abandon
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[VitalThread] = []
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

        def act() -> None:
            try:
                value = work()
            except Exception as error:
                self._hand_over(lambda error=error: failed(error))  # type: ignore[misc]
            except BaseException as error:
                # A user's code may say sys.exit(); here that ends nothing.
                ended = RuntimeError(f"the code ended with {type(error).__name__}: {error}")
                self._hand_over(lambda: failed(ended))
            else:
                self._hand_over(lambda: done(value))

        self._waiting.put(act)
        if len(self._threads) < self._num_threads:
            name = f"{self._name}_{len(self._threads)}"
            thread = VitalThread(target=self._work, name=name, daemon=self._abandon)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Forget what waits; what is under way ends by itself, unheard."""
        self._closed = True
        while True:
            try:
                self._waiting.get_nowait()
            except Empty:
                break
        self._end_threads()

    def finish(self) -> None:
        """End what is under way and what waits, unheard; wait for it. Not on the event loop's thread."""
        self._closed = True
        self._end_threads()
        for thread in self._threads:
            thread.join()

    def wait(self, seconds: float) -> bool:
        """After `close`: whether what was under way has ended within ``seconds``. Not on the event loop's thread."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def _hand_over(self, act: Callable[[], list[Effect]]) -> None:
        if self._closed:
            return
        try:
            self._service.loop.call_soon_threadsafe(self._hear, act)
        except RuntimeError:
            return  # the loop was closed meanwhile: nobody hears it

    def _hear(self, act: Callable[[], list[Effect]]) -> None:
        if not self._closed:
            self._service.guard(act)

    def _work(self) -> None:
        while (act := self._waiting.get()) is not None:
            act()

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
