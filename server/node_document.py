"""A process of the cluster as one JSON object: what ``nodes`` shows."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from layerwise.ids import COORDINATOR
from layerwise.messages import Role
from layerwise.server.membership import Process, node_of
from layerwise.service import resident_bytes
from layerwise.version import VERSION


def node_document(process: Process, now: float) -> dict[str, Any]:
    """The document of one process.

    ``state`` is "free", "working" or "leaving"; "reserved" for a job that moves; "draining" and "drained" on a node that
    gets no new work, while it still works for a job and after that. ``join`` is None for all but workers that were started
    to join a job: its id, or "" for any.
    """
    hello, vitals = process.hello, process.vitals
    state = "leaving" if process.leaving else "free" if process.free else "working"
    if process.draining:
        state = "drained" if process.free else "draining"
    elif process.reserved is not None:
        state = "reserved"
    return {
        "name": process.name,
        "role": str(process.role),
        "state": state,
        "job": process.job,
        "join": hello.join,
        "node": node_of(hello),
        "host": hello.host,
        "pid": hello.pid,
        "device": hello.device,
        "address": hello.address,
        "version": hello.version,
        "incarnation": process.incarnation,
        "allowed_imports": list(hello.allowed_imports),
        "metrics_address": hello.metrics_address,
        "joined": process.joined,
        "heartbeat_age": max(now - process.seen, 0.0),
        "resident_bytes": vitals.resident_bytes,
        "cpu_seconds": vitals.cpu_seconds,
        "sent_bytes": vitals.sent_bytes,
        "received_bytes": vitals.received_bytes,
    }


def coordinator_document(
    *, address: str, metrics_address: str, started: float, sent_bytes: int, received_bytes: int
) -> dict[str, Any]:
    """The document of the process that calls, which is the coordinator: the same keys; its state is "serving"."""
    return {
        "name": COORDINATOR,
        "role": str(Role.COORDINATOR),
        "state": "serving",
        "job": None,
        "join": None,
        "node": socket.gethostname(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": "",
        "address": address,
        "version": VERSION,
        "incarnation": 1,
        "allowed_imports": [],
        "metrics_address": metrics_address,
        "joined": started,
        "heartbeat_age": 0.0,
        "resident_bytes": resident_bytes(),
        "cpu_seconds": time.process_time(),
        "sent_bytes": sent_bytes,
        "received_bytes": received_bytes,
    }
