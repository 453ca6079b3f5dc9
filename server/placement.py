"""Which free processes a job gets, and why it waits when it gets none. Jobs start strictly first in, first out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layerwise.job import JobSpec
from layerwise.messages import Role
from layerwise.server.job_record import JobRecord
from layerwise.server.membership import Membership, Process

RETURN_SECONDS = 3.0
"""So long the place of a lost shard is kept for a process of the same name, which its supervisor starts at once."""

COMMANDS = {Role.SHARD: "shard", Role.FORWARD: "forward worker", Role.BACKWARD: "backward worker"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The processes of one job: ``shards[block]``, forward workers, and the block that each backward worker is for."""

    shards: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[tuple[str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.shards, *self.forward, *(name for name, _ in self.backward))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacancy:
    """A place of a run that a process left, for ``block`` (-1: a forward worker's).

    A shard's is kept for ``expected``, which may be started again under its name, for some time after ``since``.
    """

    role: Role
    block: int
    expected: str = ""
    since: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why a job waits. ``lacking``: even all processes of the cluster together would not do."""

    reason: str
    lacking: bool


def needed(spec: JobSpec) -> dict[Role, int]:
    """How many processes of each role a job takes."""
    return {
        Role.SHARD: spec.cluster.shards,
        Role.FORWARD: spec.cluster.forward,
        Role.BACKWARD: spec.cluster.num_detached,
    }


def suits(process: Process, spec: JobSpec) -> bool:
    """Whether a process may work for a job: the right device, and every import of the job's allowed."""
    return _right_device(process, spec) and not missing_imports(process, spec)


def missing_imports(process: Process, spec: JobSpec) -> tuple[str, ...]:
    """The modules that the job would import and the process does not allow."""
    modules = sorted({target.partition(":")[0] for target in spec.imports})
    return tuple(module for module in modules if not _is_allowed(module, process.hello.allowed_imports))


def place(spec: JobSpec, members: Membership) -> Places | Shortage:
    """Choose free processes in the order of their names; shards are spread over devices first."""
    chosen: dict[Role, list[Process]] = {}
    reasons, lacking = [], False
    for role, count in needed(spec).items():
        suitable = [one for one in members.of_role(role) if suits(one, spec) and not one.draining and not one.joins]
        free = [one for one in suitable if one.available]
        if len(free) < count:
            reasons.append(_shortage(role, count, free, suitable, members, spec))
            lacking = lacking or len(suitable) < count
        chosen[role] = _spread(free)[:count] if role is Role.SHARD else free[:count]
    if reasons:
        return Shortage(reason="; ".join(reasons), lacking=lacking)
    return Places(
        shards=tuple(one.name for one in chosen[Role.SHARD]),
        forward=tuple(one.name for one in chosen[Role.FORWARD]),
        backward=tuple((one.name, place % spec.cluster.shards) for place, one in enumerate(chosen[Role.BACKWARD])),
    )


def places_before(record: JobRecord) -> Places:
    """Who works for the job according to its record."""
    shards = sorted((one for one in record.placement if one.role is Role.SHARD), key=lambda one: one.block)
    return Places(
        shards=tuple(one.process for one in shards),
        forward=tuple(one.process for one in record.placement if one.role is Role.FORWARD),
        backward=tuple((one.process, one.block) for one in record.placement if one.role is Role.BACKWARD),
    )


def replacement(vacancy: Vacancy, spec: JobSpec, members: Membership, now: float, *, job: str = "") -> Process | None:
    """A free process for the vacancy; while the one before it may come back, no other.

    Those that are reserved for ``job`` come first.
    """
    reserved = [one for one in members.of_role(vacancy.role) if one.free and one.reserved == job]
    free = [*reserved, *(one for one in members.of_role(vacancy.role) if one.available and suits(one, spec))]
    same = next((one for one in free if one.name == vacancy.expected), None)
    if same is not None or not vacancy.expected or now - vacancy.since > RETURN_SECONDS:
        return same or next(iter(free), None)
    return None


def _right_device(process: Process, spec: JobSpec) -> bool:
    wanted, device = spec.cluster.device, process.hello.device
    if process.role is Role.FORWARD or wanted == "auto" or device == "auto":
        return True
    return device == wanted or (wanted == "cuda" and device.startswith("cuda:"))


def _is_allowed(module: str, allowed: Iterable[str]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in allowed)


def _spread(free: list[Process]) -> list[Process]:
    """Processes on a device that has none yet come first; on one CPU device that changes nothing."""
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for position, one in enumerate(free):
        device = (one.hello.host, one.hello.device)
        seen[device] = seen.get(device, 0) + 1
        ranked.append((seen[device] if one.hello.device != "cpu" else 1, position, one))
    return [one for _, _, one in sorted(ranked, key=lambda item: item[:2])]


def _shortage(
    role: Role, count: int, free: list[Process], suitable: list[Process], members: Membership, spec: JobSpec
) -> str:
    noun = COMMANDS[role]
    verb = "is" if len(free) == 1 else "are"
    text = f"needs {count} {noun}{'' if count == 1 else 's'}; {len(free)} of {len(suitable)} {verb} free"
    users = sorted({one.job for one in suitable if one.job is not None})
    if users:
        text += f" (the others work for {', '.join(users)})"
    joining = sum(one.joins for one in members.of_role(role))
    if joining:
        text += f"; {joining} more {'was' if joining == 1 else 'were'} started with --join, and no job counts on those"
    drained = sum(one.draining and suits(one, spec) for one in members.of_role(role))
    if drained:
        text += f"; {drained} more {'is' if drained == 1 else 'are'} on drained nodes"
    unfit = [one for one in members.of_role(role) if not suits(one, spec)]
    forbidden = sorted({module for one in unfit for module in missing_imports(one, spec)})
    if forbidden:
        text += f"; {len(unfit)} more would have to be started with --allow-import {' '.join(forbidden)}"
    elif unfit:
        text += f"; {len(unfit)} more are not on {spec.cluster.device}"
    return text
