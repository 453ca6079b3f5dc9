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

from layerwise.address import parse_address, with_free_port
from layerwise.child import Program, last_lines
from layerwise.errors import (
    ConfigError,
    DeadlineError,
    LayerwiseError,
    NotAllowedError,
    NotFoundError,
    RetryableError,
    UnreachableError,
)
from layerwise.run_directory import DirectoryLock
from layerwise.supervision import NOT_ALLOWED_STATUS, USAGE_STATUS, Supervision
from layerwise.supervisor import SPARE, Problem, ProcessRecord, Supervisor

if TYPE_CHECKING:
    from layerwise.client import CoordinatorClient

LONGEST_SOCKET_PATH = 100
"""Unix sockets take 107 bytes; the rest is for the longest name."""
MOST_QUICK_DEATHS = 3


class LocalCluster:
    """Starts the roles as child processes that talk over unix sockets in a private folder, and ends them all on exit.

    Use it as a context manager; entering starts all processes at once and returns when the coordinator answers.
    ``directory`` holds the coordinator's state (``coordinator/``) and each process's log (``logs/<name>.log``);
    without one both live in a temporary folder and go with the cluster. ``threads`` is for each shard's arithmetic
    (default: the cores divided by the shards and detached workers). ``devices`` are given out in turn. With port 0 in
    ``listen`` the coordinator gets one that is free when the cluster is entered, and keeps it when it is started again.

    A process that ends by itself is started again under its name with ``restart``, unless it died at once several
    times. One that is stopped for ``hang_seconds``, or gives no sign of life for four times as long, counts as ended
    (None: never). With ``spare`` a process with torch imported waits to take the place of a shard or worker that ends,
    from when all have started, or from when `keep_spare` is called. ``on_problem`` hears, from some thread, one sentence
    about each unexpected end and what follows from it, and whether that process is not started again.

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
        spare: bool = False,
        hang_seconds: float | None = None,
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
        self._spare, self._hang_seconds = spare, hang_seconds
        self._lock = threading.RLock()
        self._supervisor: Supervisor | None = None
        self._gone = threading.Event()
        self._problems: list[str] = []
        self._ends: dict[str, Problem] = {}
        self._killed: set[str] = set()
        self._folder: Path | None = None
        self._directory_lock: DirectoryLock | None = None

    # ---- life ----

    def __enter__(self) -> Self:
        self._folder = socket_folder()
        try:
            if self._listen is not None:
                self._listen = str(with_free_port(parse_address(self._listen)))
            if self._wanted_directory is not None:
                self._directory_lock = DirectoryLock(self._wanted_directory)
            self.logs.mkdir(parents=True, exist_ok=True)
            self._supervisor = Supervisor(
                Supervision(
                    restart=self._restart, most_quick_deaths=MOST_QUICK_DEATHS, hang_seconds=self._hang_seconds
                ),
                spare_environment=self._environment_of("shard"),
                spare_log=self.logs / f"{SPARE}.log",
                on_problem=self._hear,
            )
            for name in self.names:
                self._supervisor.start(self._program(name))
            self._wait_until_ready()
            if self._spare:
                self.keep_spare()
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
        if self._supervisor is not None:
            self._supervisor.stop(self.stop_seconds, last="coordinator")
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
        return self._supervisor.pids if self._supervisor is not None else {}

    @property
    def spare_pid(self) -> int | None:
        """The process id of a spare that is ready; None without one."""
        return self._supervisor.spare_pid if self._supervisor is not None else None

    @property
    def records(self) -> tuple[ProcessRecord, ...]:
        """What has happened to the processes, oldest first, with times: starts, signals, ends, adoptions of the spare."""
        return self._supervisor.records if self._supervisor is not None else ()

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

        One that was started again counts when it has done so as the process that it is now.

        Raises:
            DeadlineError: after ``seconds`` (default: ``start_seconds``), naming those that are missing.
            ConfigError, NotAllowedError: one of them can't run as it was told to, by its own word.
            UnreachableError: one of them ended for good.
        """
        deadline = time.monotonic() + (seconds or self.start_seconds)
        with self.client() as client:
            while missing := self._missing_nodes(client):
                if self._gone.wait(0.05) and (error := self._why_gone()) is not None:
                    raise error
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"these processes did not reach the coordinator in time: {', '.join(sorted(missing))}; "
                        f"their logs are in {self.logs}"
                    )

    def wait_for_restart(self, name: str, pid: int, seconds: float | None = None) -> int:
        """Wait until process ``name`` runs as another one than ``pid``; gives its process id. It may not be registered yet.

        Raises:
            DeadlineError: after ``seconds`` (default: ``start_seconds``).
        """
        return self._running().wait_for_restart(name, pid, seconds or self.start_seconds)

    def keep_spare(self) -> None:
        """From now on keep a spare process ready, once no other is starting. May be repeated."""
        self._running().keep_spare()

    def wait_for_spare(self, seconds: float | None = None) -> int:
        """Wait until the spare is ready; gives its process id.

        Raises:
            DeadlineError: after ``seconds`` (default: ``start_seconds``).
        """
        supervisor = self._running()
        if not supervisor.wait_for(lambda: supervisor.spare_pid is not None, seconds or self.start_seconds):
            raise DeadlineError(f"no spare process became ready in time; its log is {self.logs / SPARE}.log")
        return supervisor.spare_pid or 0

    # ---- faults ----

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """End process ``name`` by a signal and wait until it is gone; gives its process id.

        That is no problem; with ``restart`` the process comes again, see `wait_for_restart`.
        """
        with self._lock:
            if not self._restart:
                self._killed.add(name)
        return self._running().kill(name, number)

    def pause(self, name: str) -> None:
        """Stop process ``name`` where it stands (SIGSTOP); it counts as ended after ``hang_seconds``."""
        self._running().send(name, signal.SIGSTOP)

    def unpause(self, name: str) -> None:
        """Let a paused process go on (SIGCONT)."""
        self._running().send(name, signal.SIGCONT)

    def start(self, name: str) -> None:
        """Start process ``name`` again after it ended; nothing happens while it runs."""
        if name not in self.names:
            raise NotFoundError(f"this cluster has no process {name}; it has {', '.join(self.names)}")
        with self._lock:
            self._killed.discard(name)
            # Where it ended for good and is there again, that is no reason any more not to wait for the others.
            self._ends.pop(name, None)
            if not self._ends:
                self._gone.clear()
        self._running().start(self._program(name))

    # ---- inside ----

    def _missing_nodes(self, client: CoordinatorClient) -> set[str]:
        with self._lock:
            wanted = set(self.names) - {"coordinator"} - self._killed
        try:
            known = {(node["name"], node["pid"]) for node in client.list_nodes()} if wanted else set()
        except RetryableError:
            known = set()  # the coordinator is being started again
        pids = self.pids
        return {name for name in wanted if (name, pids.get(name)) not in known}

    def _program(self, name: str) -> Program:
        return Program(
            name=name,
            arguments=tuple(self._arguments(name)),
            environment=self._environment_of(name),
            log=self.logs / f"{name}.log",
            warm=name != "coordinator",
        )

    def _arguments(self, name: str) -> list[str]:
        role, _, index = name.partition("-")
        insecure = ["--insecure", "--debug"] if self._insecure else ["--debug"]
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

    def _hear(self, problem: Problem) -> None:
        with self._lock:
            self._problems.append(problem.sentence)
            if problem.for_good and problem.name != SPARE:
                self._ends.setdefault(problem.name, problem)
                self._gone.set()
        if self._on_problem is not None:
            self._on_problem(problem.sentence, problem.for_good and problem.name != SPARE)

    def _why_gone(self) -> LayerwiseError | None:
        """The first end for good, as the error that its exit status stands for; None: all that ended were started again."""
        with self._lock:
            end = next(iter(self._ends.values()), None)
        if end is None:
            return None
        kinds: dict[int, type[LayerwiseError]] = {USAGE_STATUS: ConfigError, NOT_ALLOWED_STATUS: NotAllowedError}
        return kinds.get(end.status, UnreachableError)(end.sentence)

    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise NotFoundError("the cluster has not been started: use it in a with statement")
        return self._supervisor

    def _wait_until_ready(self) -> None:
        """Wait until the coordinator accepts calls; a process that ends for good in the meantime is an error."""
        deadline = time.monotonic() + self.start_seconds
        ready = threading.Event()
        with self.client() as client, client.watch_ready(ready.set):
            while not ready.wait(0.05):
                if (error := self._why_gone()) is not None:
                    raise error
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
