"""A whole cluster as processes of this machine: coordinator, shards, forward and backward workers."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from layerwise.child import ChildProcess, describe_status, last_lines
from layerwise.errors import DeadlineError, NotFoundError, UnreachableError
from layerwise.run_directory import DirectoryLock

if TYPE_CHECKING:
    from layerwise.client import CoordinatorClient

LONGEST_SOCKET_PATH = 100
"""Unix sockets take 107 bytes; the rest is for the longest name."""
QUICK_DEATH_SECONDS = 10.0
MOST_QUICK_DEATHS = 3


class LocalCluster:
    """Starts the roles as child processes that talk over unix sockets in a private folder, and ends them all on exit.

    Use it as a context manager; entering starts all processes at once and returns when the coordinator answers.
    ``directory`` holds the coordinator's state (``coordinator/``) and each process's log (``logs/<name>.log``);
    without one both live in a temporary folder and go with the cluster. ``threads`` is for each shard's arithmetic
    (default: the cores divided by the shards and detached workers). ``devices`` are given out in turn.

    A process that ends by itself is started again under its name with ``restart``, unless it died at once several
    times. ``on_problem`` hears, from some thread, one sentence about each unexpected end, and whether it was the last
    of that process.

    Thread-safe, except for entering and leaving.
    """

    def __init__(
        self,
        *,
        shards: int = 2,
        forward: int = 1,
        backward: int = 0,
        directory: str | Path | None = None,
        allow_imports: Sequence[str] = (),
        threads: int | None = None,
        devices: Sequence[str] = ("auto",),
        listen: str | None = None,
        metrics: str | None = None,
        serve_metrics: bool = True,
        insecure: bool = False,
        restart: bool = False,
        start_seconds: float = 60.0,
        stop_seconds: float = 10.0,
        environment: Mapping[str, str] | None = None,
        on_problem: Callable[[str, bool], None] | None = None,
    ) -> None:
        self.shards, self.forward, self.backward = shards, forward, backward
        self.start_seconds, self.stop_seconds = start_seconds, stop_seconds
        self._wanted_directory = Path(directory).absolute() if directory is not None else None
        self._allow_imports, self._devices = tuple(allow_imports), tuple(devices)
        self._threads = threads or max(1, num_cores() // max(1, shards + backward))
        self._listen, self._insecure, self._restart = listen, insecure, restart
        self._coordinator_metrics = metrics or ("127.0.0.1:0" if serve_metrics else None)
        self._serve_metrics = serve_metrics
        self._environment = dict(environment or {})
        self._on_problem = on_problem
        self._lock = threading.RLock()
        self._children: dict[str, ChildProcess] = {}
        self._ended_children: list[ChildProcess] = []
        self._quick_deaths: dict[str, int] = {}
        self._started_at: dict[str, float] = {}
        self._gone = threading.Event()
        self._problems: list[str] = []
        self._killed: set[str] = set()
        self._stopping = False
        self._folder: Path | None = None
        self._directory_lock: DirectoryLock | None = None

    # ---- life ----

    def __enter__(self) -> Self:
        self._folder = socket_folder()
        try:
            if self._wanted_directory is not None:
                self._directory_lock = DirectoryLock(self._wanted_directory)
            self.logs.mkdir(parents=True, exist_ok=True)
            for name in self.names:
                self._start(name)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process: workers first, then the coordinator, each group by force after ``stop_seconds``. May be repeated."""
        with self._lock:
            self._stopping = True
            children = list(self._children.values())
        workers = [child for child in children if child.name != "coordinator"]
        for group in (workers, [child for child in children if child.name == "coordinator"]):
            for child in group:
                child.signal(signal.SIGTERM)
                child.signal(signal.SIGCONT)  # a paused one could not hear it
            deadline = time.monotonic() + self.stop_seconds  # the coordinator's own, however long the workers took
            for child in group:
                child.wait(max(0.0, deadline - time.monotonic()))
        for child in children:
            child.signal(signal.SIGKILL)
        for child in [*children, *self._ended_children]:
            child.close()
        with self._lock:
            self._children.clear()
            self._ended_children.clear()
        if self._directory_lock is not None:
            self._directory_lock.close()
            self._directory_lock = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---- what there is ----

    @property
    def names(self) -> tuple[str, ...]:
        """All processes that belong to the cluster: ``coordinator``, ``shard-0``, ``forward-0``, ``backward-0``, ..."""
        counts = (("shard", self.shards), ("forward", self.forward), ("backward", self.backward))
        return ("coordinator", *(f"{role}-{index}" for role, count in counts for index in range(count)))

    @property
    def coordinator_address(self) -> str:
        """Where clients reach the coordinator: the folder's unix socket, or what ``listen`` says."""
        return self._listen or f"unix:{self._socket('coordinator')}"

    @property
    def directory(self) -> Path:
        """Coordinator's state and logs."""
        return self._wanted_directory if self._wanted_directory is not None else self._required_folder() / "state"

    @property
    def logs(self) -> Path:
        """The folder of the processes' log files."""
        return self.directory / "logs"

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that run."""
        with self._lock:
            return {name: child.pid for name, child in self._children.items() if child.running}

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each unexpected end so far."""
        with self._lock:
            return tuple(self._problems)

    def log_of(self, name: str) -> str:
        """What process ``name`` has printed."""
        return (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def client(self) -> CoordinatorClient:
        """A new client of this cluster's coordinator; close it."""
        from layerwise.client import CoordinatorClient

        return CoordinatorClient(self.coordinator_address)

    def wait_for_nodes(self, seconds: float | None = None) -> None:
        """Return when every process of the cluster, except for those killed, has presented itself to the coordinator.

        Raises:
            DeadlineError: after ``seconds`` (default: ``start_seconds``), naming those that are missing.
            UnreachableError: one of them ended for good.
        """
        deadline = time.monotonic() + (seconds or self.start_seconds)
        with self.client() as client:
            while missing := self._wanted_nodes() - {node["name"] for node in client.list_nodes()}:
                if self._gone.wait(0.05):
                    raise UnreachableError(self.problems[-1])
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"these processes did not reach the coordinator in time: {', '.join(sorted(missing))}; "
                        f"their logs are in {self.logs}"
                    )

    # ---- faults ----

    def kill(self, name: str) -> None:
        """End process ``name`` by SIGKILL and wait until it is gone. That is no problem; with ``restart`` it comes again."""
        child = self._child(name)
        with self._lock:
            self._killed.add(name)
        child.signal(signal.SIGKILL)
        child.wait()

    def pause(self, name: str) -> None:
        """Stop process ``name`` where it stands (SIGSTOP)."""
        self._child(name).signal(signal.SIGSTOP)

    def unpause(self, name: str) -> None:
        """Let a paused process go on (SIGCONT)."""
        self._child(name).signal(signal.SIGCONT)

    def start(self, name: str) -> None:
        """Start process ``name`` again after it ended."""
        with self._lock:
            if name not in self.names:
                raise NotFoundError(f"this cluster has no process {name}; it has {', '.join(self.names)}")
            child = self._children.get(name)
            if child is None or not child.running:
                self._start(name)

    # ---- inside ----

    def _wanted_nodes(self) -> set[str]:
        with self._lock:
            return set(self.names) - {"coordinator"} - self._killed

    def _child(self, name: str) -> ChildProcess:
        with self._lock:
            if name not in self._children:
                raise NotFoundError(f"this cluster has no running process {name}; it has {', '.join(self._children)}")
            return self._children[name]

    def _start(self, name: str) -> None:
        with self._lock:
            if self._stopping:
                return
            old = self._children.pop(name, None)
            if old is not None:
                self._ended_children.append(old)
            self._killed.discard(name)
            self._started_at[name] = time.monotonic()
            self._children[name] = ChildProcess(
                name,
                self._arguments(name),
                log=self.logs / f"{name}.log",
                environment=self._environment_of(name),
                on_exit=self._on_exit,
            )

    def _arguments(self, name: str) -> list[str]:
        role, _, index = name.partition("-")
        insecure = ["--insecure"] if self._insecure else []
        if role == "coordinator":
            state = self.directory / "coordinator"
            metrics = ["--metrics", self._coordinator_metrics] if self._coordinator_metrics else []
            return [role, "--listen", self.coordinator_address, "--state", str(state), *metrics, *insecure]
        arguments = [role, "--coordinator", self.coordinator_address, "--name", name, *insecure]
        if self._serve_metrics:
            arguments += ["--metrics", "127.0.0.1:0"]
        for module in self._allow_imports:
            arguments += ["--allow-import", module]
        if role == "shard":
            arguments += ["--listen", f"unix:{self._socket(name)}"]
        if role in ("shard", "backward"):
            place = int(index) + (self.shards if role == "backward" else 0)
            arguments += ["--device", self._devices[place % len(self._devices)], "--threads", str(self._threads)]
        return arguments

    def _environment_of(self, name: str) -> dict[str, str]:
        threads = str(self._threads if name.startswith(("shard", "backward")) else 1)
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **self._environment}

    def _on_exit(self, child: ChildProcess, status: int) -> None:
        with self._lock:
            if self._stopping or self._children.get(child.name) is not child:
                return
            if child.name in self._killed:
                if self._restart:
                    self._start(child.name)
                return
            quick = time.monotonic() - self._started_at[child.name] < QUICK_DEATH_SECONDS
            self._quick_deaths[child.name] = self._quick_deaths.get(child.name, 0) + 1 if quick else 0
            again = self._restart and status != 2 and self._quick_deaths[child.name] < MOST_QUICK_DEATHS
            sentence = f"{child.name} (process {child.pid}) ended with {describe_status(status)}"
            words = child.last_words().splitlines()
            sentence += f": {words[-1]}" if words else ""
            sentence += f" (log: {child.log})"
            self._problems.append(sentence)
            if again:
                self._start(child.name)
            else:
                self._gone.set()
        if self._on_problem is not None:
            self._on_problem(sentence, not again)

    def _wait_until_ready(self) -> None:
        """Wait until the coordinator accepts calls; a process that ends for good in the meantime is an error."""
        deadline = time.monotonic() + self.start_seconds
        ready = threading.Event()
        with self.client() as client, client.watch_ready(ready.set):
            while not ready.wait(0.05):
                if self._gone.is_set():
                    raise UnreachableError(self.problems[-1])
                if time.monotonic() > deadline:
                    words = last_lines(self.logs / "coordinator.log")
                    raise DeadlineError(
                        f"the coordinator did not answer at {self.coordinator_address} in {self.start_seconds:.0f} s"
                        + (f"; it said: {words}" if words else "")
                    )

    def _socket(self, name: str) -> Path:
        return self._required_folder() / f"{name}.sock"

    def _required_folder(self) -> Path:
        if self._folder is None:
            raise NotFoundError("the cluster has not been started: use it in a with statement")
        return self._folder


def socket_folder() -> Path:
    """A fresh folder of mode 0700 whose name is short enough for unix sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="layerwise-"))
    if len(str(folder)) > LONGEST_SOCKET_PATH - len("/backward-99.sock"):
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="layerwise-", dir="/tmp"))
    return folder


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
