"""Processor seconds by thread and part: what is spent inside functions that were wrapped with `timed`, without what they call of each other."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any


class ThreadAccount:
    """A thread's seconds and calls by part. That thread writes; any may copy."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.inner = 0.0
        """Seconds inside wrapped functions that the one under way has called."""


ACCOUNTS: defaultdict[int, ThreadAccount] = defaultdict(ThreadAccount)
"""By `threading.get_ident`."""


def _run(part: str, act: Callable[[], Any]) -> Any:
    account = ACCOUNTS[threading.get_ident()]
    account.calls[part] += 1
    outer, account.inner = account.inner, 0.0
    began = time.thread_time()
    try:
        return act()
    finally:
        spent = time.thread_time() - began
        account.seconds[part] += spent - account.inner
        account.inner = outer + spent


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose own processor time counts as ``part``'s."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return _run(part, lambda: function(*arguments, **named))

    return wrapper


def timed_coroutine(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The coroutine function ``function``; what it takes each time it goes on counts as ``part``'s."""

    @functools.wraps(function)
    async def wrapper(*arguments: Any, **named: Any) -> Any:
        return await _Steps(part, function(*arguments, **named))

    return wrapper


class _Steps:
    def __init__(self, part: str, coroutine: Any) -> None:
        self._part, self._coroutine = part, coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._coroutine.__await__()
        go_on: Callable[[], Any] = lambda: next(steps)  # noqa: E731
        while True:
            try:
                waits_for = _run(self._part, go_on)
            except StopIteration as end:
                return end.value
            try:
                yield waits_for
                go_on = lambda: next(steps)  # noqa: E731
            except BaseException as error:
                go_on = functools.partial(steps.throw, error)


def snapshot() -> dict[str, Any]:
    """What every Python thread has used so far, and the parts of it; ``process``: all threads, also those of libraries."""
    threads = []
    for thread in threading.enumerate():
        if thread.ident is None:
            continue
        account = ACCOUNTS[thread.ident]
        used = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        main = thread is threading.main_thread()
        threads.append(
            {
                "name": "main" if main else thread.name,
                "seconds": used,
                "parts": dict(account.seconds),
                "calls": dict(account.calls),
            }
        )
    return {"process": time.process_time(), "threads": threads}
