"""One machine's part of a cluster: shards and workers as children of a supervisor that keeps them running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from layerwise.address import TcpAddress, UnixAddress, check_advertised, parse_address
from layerwise.child import Program
from layerwise.cluster import num_cores
from layerwise.errors import ConfigError
from layerwise.lifetime import Lifetime
from layerwise.supervision import Supervision
from layerwise.supervisor import SPARE, Problem, Supervisor

STOP_SECONDS = 20.0
HIGHEST_PORT = 65535

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What runs on a node. Addresses are ``host:port`` or ``unix:/path``; empty ones mean nowhere.

    ``listen`` and ``advertise`` are those of the first shard; each further one has the next port, or a path with its
    number. ``metrics`` is the supervisor's, and the children have the ports after it: shards, forward, backward workers.
    ``devices`` are given out in turn to shards and backward workers, ``threads`` are for each of those (default: the
    cores divided by their number).
    """

    coordinator: str
    name: str
    shards: int = 1
    forward: int = 0
    backward: int = 0
    devices: tuple[str, ...] = ("auto",)
    threads: int | None = None
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    metrics: str = ""
    allow_imports: tuple[str, ...] = ()
    insecure: bool = False
    log_level: str = "info"
    log_format: str = "text"
    spare: bool = True
    hang_seconds: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The processes: ``shard-<node>-0`` and so on. They keep their names when they are started again."""
        counts = (("shard", self.shards), ("forward", self.forward), ("backward", self.backward))
        return tuple(f"{role}-{self.name}-{index}" for role, count in counts for index in range(count))

    @property
    def num_threads(self) -> int:
        """Threads of arithmetic of each shard and backward worker."""
        return self.threads or max(1, num_cores() // max(1, self.shards + self.backward))

    def programs(self) -> tuple[Program, ...]:
        """The command line of each process.

        Raises:
            ConfigError: nothing is to run, an address can't be read or not be called by others, or there are not enough
                ports after one.
        """
        if self.shards:
            check_advertised(self.listen, self.advertise)
        if not self.names:
            raise ConfigError(
                "a node without shards and workers has nothing to do; say --shards, --forward or --backward"
            )
        return tuple(
            Program(name=name, arguments=self._arguments(name, place), environment=self._environment(name), warm=True)
            for place, name in enumerate(self.names)
        )

    @property
    def spare_environment(self) -> dict[str, str]:
        """What a process must have when it is started, whatever it becomes."""
        return _thread_environment(self.num_threads)

    def _arguments(self, name: str, place: int) -> tuple[str, ...]:
        role = name.partition("-")[0]
        words = [role, "--coordinator", self.coordinator, "--name", name]
        words += ["--log-level", self.log_level, "--log-format", self.log_format]
        words += ["--debug"] if self.log_level == "debug" else []
        words += ["--insecure"] if self.insecure else []
        words += [word for module in self.allow_imports for word in ("--allow-import", module)]
        words += ["--metrics", nth_address(self.metrics, place + 1)] if self.metrics else []
        if role == "shard":
            words += ["--listen", nth_address(self.listen, place)]
            words += ["--advertise", nth_address(self.advertise, place)] if self.advertise else []
        if role != "forward":
            computing = place if role == "shard" else place - self.forward
            device = self.devices[computing % len(self.devices)]
            words += ["--device", device, "--threads", str(self.num_threads)]
        return tuple(words)

    def _environment(self, name: str) -> dict[str, str]:
        return _thread_environment(1 if name.startswith("forward-") else self.num_threads)


def nth_address(first: str, place: int) -> str:
    """The address of process ``place`` where that of process 0 is ``first``: the next port, or a path with its number.

    Raises:
        ConfigError: ``first`` is no address, or there is no such port.
    """
    address = parse_address(first)
    if isinstance(address, UnixAddress):
        return str(UnixAddress(path=Path(f"{address.path}-{place}"))) if place else str(address)
    if address.port == 0:
        return str(address)
    if address.port + place > HIGHEST_PORT:
        raise ConfigError(
            f"{first} leaves no ports for the processes after the first; choose a lower port, or 0 for free ones"
        )
    return str(TcpAddress(host=address.host, port=address.port + place))


class Node:
    """Keeps a node's processes running until `close`. ``on_problem`` hears of unexpected ends, from some thread."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        on_problem: Callable[[Problem], None],
        on_line: Callable[[str, str], None],
    ) -> None:
        self.settings = settings
        self._on_problem = on_problem
        self._supervisor = Supervisor(
            Supervision(hang_seconds=settings.hang_seconds),
            spare_environment=settings.spare_environment,
            on_problem=self._hear,
            on_line=on_line,
        )

    def start(self, programs: Iterable[Program]) -> None:
        """Start all, and the spare when they are up."""
        for program in programs:
            self._supervisor.start(program)
        if self.settings.spare:
            self._supervisor.keep_spare()

    def close(self, seconds: float = STOP_SECONDS) -> None:
        """End all: by SIGTERM, by force after ``seconds``."""
        self._supervisor.stop(seconds)

    def collect(self) -> Iterable[Any]:
        """Prometheus families of the supervisor."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        up = GaugeMetricFamily("layerwise_process_up", "Whether the process runs", labels=["process"])
        restarts = CounterMetricFamily("layerwise_restarts", "How often it was started again", labels=["process"])
        pids, counts = self._supervisor.pids, self._supervisor.restarts
        for name in self.settings.names:
            up.add_metric([name], float(name in pids))
            restarts.add_metric([name], counts.get(name, 0))
        yield up
        yield restarts
        ready = float(self._supervisor.spare_pid is not None)
        yield GaugeMetricFamily("layerwise_spare_ready", "Whether a spare process waits for its task", value=ready)

    def _hear(self, problem: Problem) -> None:
        log.warning("%s", problem.sentence)
        if problem.for_good and problem.name != SPARE:
            self._on_problem(problem)


def run_node(settings: NodeSettings, *, on_line: Callable[[str, str], None], exit_with_parent: bool = False) -> None:
    """Run a node until a signal or the end of the parent; then its processes end too, and are waited for.

    What the processes print goes to ``on_line(name, line)``, from threads of their own.

    Raises:
        ConfigError: the settings can't be meant, or a process says so by its exit status: it would never run.
        NotAllowedError: metrics beyond this host without ``insecure``.
    """
    programs = settings.programs()

    async def serve() -> None:
        from layerwise.metrics_server import serve_metrics

        lifetime = Lifetime(exit_with_parent=exit_with_parent)
        loop = asyncio.get_running_loop()
        failures: list[Problem] = []

        def fail(problem: Problem) -> None:
            failures.append(problem)
            lifetime.end(f"{problem.name} can't run")

        def hear(problem: Problem) -> None:
            loop.call_soon_threadsafe(fail, problem)

        node = Node(settings, on_problem=hear, on_line=on_line)
        try:
            if settings.metrics:
                address = serve_metrics(settings.metrics, node.collect, insecure=settings.insecure)
                log.info("the node's metrics are at http://%s/metrics", address)
            node.start(programs)
            log.info("node %s runs %s", settings.name, ", ".join(settings.names))
            await lifetime.ended.wait()
            log.info("node %s ends: %s", settings.name, lifetime.reason)
        finally:
            await loop.run_in_executor(None, partial(node.close))
            lifetime.close()
        if failures:
            raise ConfigError(f"{failures[0].sentence}; the node can't run like this")

    asyncio.run(serve())


def _thread_environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
