"""Who is there: processes by name, what they are, what they work on, when they last gave a sign of life."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from layerwise.messages import Heartbeat, Hello, Role


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which ``shard-2`` comes before ``shard-10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


_OF_NODE = re.compile(r"(?:shard|forward|backward)-(.+)-\d+")


def node_of(hello: Hello) -> str:
    """The node whose supervisor named the process ``<role>-<node>-<number>``; its host, where the name has another form."""
    match = _OF_NODE.fullmatch(hello.name)
    return match[1] if match is not None else hello.host


def is_of(hello: Hello, node: str) -> bool:
    """Whether ``node`` means the process: by its node, its host, or its own name."""
    return node in (node_of(hello), hello.host, hello.name)


@dataclass(slots=True)
class Process:
    """One incarnation of a process, from its `Hello` until it is lost."""

    hello: Hello
    incarnation: int
    joined: float
    seen: float
    job: str | None = None
    """The job it takes part in; it is free when there is none."""
    leaving: bool = False
    """It was told to leave the job and has not answered yet."""
    heartbeat_seconds: float | None = None
    """The time limit of its job; None: the cluster's own."""
    vitals: Heartbeat = field(default_factory=Heartbeat)
    draining: bool = False
    """It gets no new work."""
    reserved: str | None = None
    """The job that is about to need it."""

    @property
    def name(self) -> str:
        """The name that it chose, unique in the cluster."""
        return self.hello.name

    @property
    def role(self) -> Role:
        """What it does."""
        return self.hello.role

    @property
    def free(self) -> bool:
        """Whether it works for no job."""
        return self.job is None

    @property
    def joins(self) -> bool:
        """Whether it works beyond what a job needs, so that no job counts on it."""
        return self.hello.join is not None

    @property
    def available(self) -> bool:
        """Whether any job may have it in one of its places."""
        return self.job is None and not self.draining and self.reserved is None and not self.joins


class Membership:
    """The processes of a cluster. One is lost with its link, or when it was silent for ``heartbeat_timeout`` seconds.

    The time limit of the job that a process works for comes before the cluster's. Not thread-safe.
    """

    def __init__(self, *, heartbeat_timeout: float = 30.0) -> None:
        self.heartbeat_timeout = heartbeat_timeout
        self.drained: set[str] = set()
        """Nodes, hosts and processes that get no new work. Only `drain` and `undrain` change it."""
        self._processes: dict[str, Process] = {}
        self._incarnations: Counter[str] = Counter()
        self._sent: Counter[Role] = Counter()
        self._received: Counter[Role] = Counter()

    def __iter__(self) -> Iterator[Process]:
        return iter(sorted(self._processes.values(), key=lambda one: (one.role, natural_order(one.name))))

    def __len__(self) -> int:
        return len(self._processes)

    def get(self, name: str) -> Process | None:
        """The living process of that name."""
        return self._processes.get(name)

    def of_role(self, role: Role) -> list[Process]:
        """The living processes of one role, in natural order of their names."""
        return [one for one in self if one.role is role]

    def join(self, hello: Hello, now: float) -> Process:
        """A process presented itself; `lose` the one of the same name before."""
        if hello.name in self._processes:
            raise ValueError(f"{hello.name} is already there")
        self._incarnations[hello.name] += 1
        process = Process(hello, self._incarnations[hello.name], joined=now, seen=now)
        process.draining = self._is_drained(hello)
        self._processes[hello.name] = process
        return process

    def lose(self, name: str) -> Process | None:
        """A process is gone; gives what it was."""
        process = self._processes.pop(name, None)
        if process is not None:
            self._sent[process.role] += process.vitals.sent_bytes
            self._received[process.role] += process.vitals.received_bytes
        return process

    def heard(self, name: str, now: float, vitals: Heartbeat | None = None) -> None:
        """Any message is a sign of life; a heartbeat brings the process's own figures."""
        process = self._processes[name]
        process.seen = now
        if vitals is not None:
            process.vitals = vitals

    def overdue(self, now: float) -> list[Process]:
        """Processes that were silent for too long."""
        return [
            one
            for one in self
            if now - one.seen > (self.heartbeat_timeout if one.heartbeat_seconds is None else one.heartbeat_seconds)
        ]

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard."""
        for one in self:
            one.seen = min(one.seen + seconds, now)

    def assign(self, names: Iterable[str], job: str, heartbeat_seconds: float) -> None:
        """These processes now work for ``job``, under its heartbeat time limit."""
        for name in names:
            process = self._processes[name]
            process.job, process.leaving, process.heartbeat_seconds = job, False, heartbeat_seconds
            process.reserved = None

    def leave(self, name: str) -> None:
        """The process was told to leave its job; it is free once it says so (`release`)."""
        self._processes[name].leaving = True

    def release(self, name: str, job: str) -> None:
        """The process has left ``job``."""
        process = self._processes.get(name)
        if process is not None and process.job == job:
            process.job, process.leaving, process.heartbeat_seconds = None, False, None

    def of_node(self, node: str) -> list[Process]:
        """The living processes that ``node`` means (see `is_of`)."""
        return [one for one in self if is_of(one.hello, node)]

    def drain(self, node: str) -> None:
        """The processes of ``node``, also those that come yet, get no new work."""
        self.drained.add(node)
        for one in self:
            one.draining = self._is_drained(one.hello)

    def undrain(self, node: str) -> None:
        """They do again, unless they are drained under another name."""
        self.drained.discard(node)
        for one in self:
            one.draining = self._is_drained(one.hello)

    def reserve(self, names: Iterable[str], job: str) -> None:
        """No other job gets these free processes."""
        for name in names:
            self._processes[name].reserved = job

    def unreserve(self, job: str) -> None:
        """``job`` needs them no more."""
        for one in self._processes.values():
            if one.reserved == job:
                one.reserved = None

    def _is_drained(self, hello: Hello) -> bool:
        return any(is_of(hello, node) for node in self.drained)

    def wire_bytes(self, role: Role) -> tuple[int, int]:
        """Bytes sent and received by all processes of ``role`` that ever were here."""
        living = [one.vitals for one in self._processes.values() if one.role is role]
        sent = self._sent[role] + sum(one.sent_bytes for one in living)
        return sent, self._received[role] + sum(one.received_bytes for one in living)
