"""Asynchronous layer-wise training of one model across machines that differ, are slow, or come and go.

    import layerwise

    result = layerwise.train("job.yaml")                  # a cluster of its own, on this machine
    job = layerwise.connect("host:7070").submit("job.yaml")  # a cluster that is there
    print(job.wait().validation)

Importing this package loads neither torch nor gRPC; the functions do when they are called.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from layerwise.errors import LayerwiseError
from layerwise.version import VERSION as __version__

if TYPE_CHECKING:
    from layerwise.api import Connection, Job, connect, train
    from layerwise.job_result import JobResult

# Read by gRPC when it is loaded: otherwise it tells on standard error whenever a peer's server stops.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__all__ = ["Connection", "Job", "JobResult", "LayerwiseError", "__version__", "connect", "train"]

_HOMES = {
    "Connection": "layerwise.api",
    "Job": "layerwise.api",
    "JobResult": "layerwise.job_result",
    "connect": "layerwise.api",
    "train": "layerwise.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
