"""The ``/metrics`` page of a process: its own figures, and those of what runs in it, read when somebody asks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from layerwise.address import TcpAddress, check_may_listen, parse_address
from layerwise.errors import ConfigError
from layerwise.version import VERSION, WIRE_VERSION

COLLECT_SECONDS = 5.0
"""How long a scrape waits for the event loop."""


class MetricsServer:
    """Serves ``/metrics`` over HTTP in a thread of its own until `close`.

    ``collect`` gives the process's metric families. When the server is made on an event loop's thread, ``collect`` runs
    on that loop, so it may read what only that thread may touch; else it runs on a thread of the server.

    Raises:
        ConfigError: the address is not ``host:port``, or it is taken.
        NotAllowedError: beyond this host without ``insecure``.
    """

    def __init__(self, address: str, collect: Callable[[], Iterable[Any]], *, insecure: bool = False) -> None:
        parsed = parse_address(address)
        if not isinstance(parsed, TcpAddress):
            raise ConfigError(f"metrics are served at host:port, not at {address}; port 0 takes a free one")
        check_may_listen(parsed, insecure=insecure)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Families(collect))
        try:
            server, thread = start_http_server(parsed.port, addr=parsed.host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"metrics can't be served at {address}: {error.strerror}; stop what listens there, choose "
                "another port, or 0 for a free one"
            ) from error
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self._thread.name = "metrics-http"
        self.address = str(TcpAddress(host=parsed.host, port=self._server.server_port))
        """Where it listens, the port that was taken included."""

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(address: str, collect: Callable[[], Iterable[Any]], *, insecure: bool = False) -> str:
    """Serve ``/metrics`` at ``host:port`` while the process lives; gives the bound address. See `MetricsServer`."""
    return MetricsServer(address, collect, insecure=insecure).address


class _Families(Collector):
    """What the registry asks at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Any]]) -> None:
        self._collect = collect
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is depends on what runs."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families now. Runs on a thread of the HTTP server."""
        yield InfoMetricFamily(
            "layerwise_build", "Which layerwise runs here.", {"version": VERSION, "wire_version": str(WIRE_VERSION)}
        )
        if self._loop is None:
            yield from self._collect()
        else:
            yield from asyncio.run_coroutine_threadsafe(self._on_loop(), self._loop).result(COLLECT_SECONDS)

    async def _on_loop(self) -> list[Metric]:
        return list(self._collect())
