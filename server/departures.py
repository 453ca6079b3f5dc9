"""What has to move when processes are to leave their jobs, and whether there are others to move to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerwise.errors import NotAllowedError
from layerwise.messages import Role
from layerwise.server.membership import Membership, Process
from layerwise.server.placement import COMMANDS, suits
from layerwise.server.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The processes ``leaving`` one run, and free ones to reserve for their places: one for every shard at least."""

    run: Run
    leaving: tuple[str, ...]
    successors: tuple[str, ...]


def departures(node: str, leaving: Sequence[Process], runs: Iterable[Run], members: Membership) -> list[Departure]:
    """One for each run that ``leaving``, the processes of ``node``, work for or are reserved for.

    A run that is being stopped needs none: it ends soon. Nor do workers that joined: nobody has to take over from them.

    Raises:
        NotAllowedError: a run would be left without a shard, or without the workers that it can't do without.
    """
    gone = {one.name for one in leaving}
    taken: set[str] = set()
    found = []
    for run in runs:
        here = [one for one in leaving if one.name in run.names and not one.joins]
        promised = [one for one in leaving if one.reserved == run.job]
        if not here and not promised:
            continue
        if run.stopping:
            continue
        successors: list[str] = []
        for role in (Role.SHARD, Role.FORWARD, Role.BACKWARD):
            wanted = sum(one.role is role for one in (*here, *promised))
            free = [
                one.name
                for one in members.of_role(role)
                if one.available and suits(one, run.spec) and one.name not in gone | taken
            ][:wanted]
            _check(node, run, role, [one.name for one in here if one.role is role], len(promised), free, gone)
            successors += free
            taken.update(free)
        found.append(Departure(run=run, leaving=tuple(one.name for one in here), successors=tuple(successors)))
    return found


def _check(
    node: str, run: Run, role: Role, here: Sequence[str], promised: int, free: Sequence[str], gone: set[str]
) -> None:
    noun = COMMANDS[role]
    if role is Role.SHARD:
        short = len(here) + promised > len(free)
    else:
        short = bool(here) and not free and bool(run.workers.missing(without={*gone, *run.workers.joined}))
    if short:
        those = (
            f"{len(here)} {noun}{'' if len(here) == 1 else 's'} of job {run.job} {'is' if len(here) == 1 else 'are'}"
        )
        raise NotAllowedError(
            f"{node} can't be drained: {those} there, and {len(free)} other{' is' if len(free) == 1 else 's are'} free to "
            f"take over; start a {noun} elsewhere, or cancel the job"
        )
