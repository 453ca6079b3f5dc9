"""The end of a process of ours."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def end_process(status: int) -> NoReturn:
    """End this process with ``status``; where torch is loaded, without taking the interpreter down piece by piece.

    That takes half a second of processor time, by which a cluster would stop later, and does nothing that the system does
    not do as well. What is registered to run at exit runs, and what was printed is written.
    """
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
