"""A process of the cluster as one JSON object: what ``nodes`` shows."""

from __future__ import annotations

from typing import Any

from layerwise.server.membership import Process


def node_document(process: Process, now: float) -> dict[str, Any]:
    """The document of one process. ``state`` is "free", "working" or "leaving"."""
    hello, vitals = process.hello, process.vitals
    state = "leaving" if process.leaving else "free" if process.free else "working"
    return {
        "name": process.name,
        "role": str(process.role),
        "state": state,
        "job": process.job,
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
