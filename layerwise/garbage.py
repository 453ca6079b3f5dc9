"""Python's garbage collector, which has nothing to find in what is imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_kept() -> Iterator[None]:
    """For imports that a process needs to its end: they are made without looking for garbage, and never looked through again.

    torch is about half a million objects. To look through them takes a tenth of a second, in which no other thread of the process runs Python.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
