"""How long training stands still when a process of each role is killed, or a worker is stopped where it stands.

One job trains all the time. The faults take turns, so that while a worker is stopped, or the coordinator is away, the
spare that takes the place of the last one killed becomes ready; each begins when all places are filled again.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.chaos_standing import ROLES, Standing, standing_job
from benchmarks.report import table, write_section
from layerwise.chaos.recovery import FaultOutcome
from layerwise.ids import COORDINATOR

TASK_SECONDS = 2.0
PAUSE_SECONDS = 1.5 * TASK_SECONDS
HEARTBEAT_SECONDS = 6.0
"""Longer than a pause: who is stopped keeps its place, and only the time-out of its tasks helps."""
FIRST_UPDATES, CALM_UPDATES = 150, 5
"""Before the first fault (of them the last two thirds count as calm training), and between two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault. ``aim``: the longest time without an update in seconds, ``beyond_calm``: more than in calm training."""

    role: str
    paused: bool = False
    aim: float
    beyond_calm: bool = False

    def __str__(self) -> str:
        return f"{self.role} stopped for {PAUSE_SECONDS:g} s" if self.paused else f"{self.role} killed"


KINDS = (
    Kind(role="shard", aim=5.0),
    Kind(role=COORDINATOR, aim=0.0, beyond_calm=True),
    Kind(role="forward", paused=True, aim=TASK_SECONDS, beyond_calm=True),
    Kind(role="forward", aim=1.0),
    Kind(role="backward", paused=True, aim=TASK_SECONDS, beyond_calm=True),
    Kind(role="backward", aim=1.0),
)


def measure(command: str, count: int, roles: Sequence[str] = ROLES) -> None:
    """Let each fault of ``roles`` happen ``count`` times in one long job."""
    rng, began = random.Random("recovery"), time.monotonic()
    kinds = [kind for kind in KINDS if kind.role in roles]
    folder = Path(tempfile.mkdtemp(prefix="layerwise-recovery-"))
    with standing_job(folder, task=TASK_SECONDS, heartbeat=HEARTBEAT_SECONDS) as standing:
        standing.wait_for_version(FIRST_UPDATES)
        moments = [layer.updated_at[FIRST_UPDATES // 3 :] for layer in standing.tail.layers.values()]
        calm = [later - earlier for one in moments for earlier, later in pairwise(one)]
        for _ in range(count):
            for kind in kinds:
                _hit(standing, kind, rng)
        outcomes = standing.watch.outcomes(standing.tail.layers)
        standing.stop()
    shutil.rmtree(folder)
    found = {kind: outcomes[place :: len(kinds)] for place, kind in enumerate(kinds)}
    text = table(
        ["", "longest time without an update", "aim", "every layer has made another update", "where it was before"],
        [_row(kind, outcomes, max(calm)) for kind, outcomes in found.items()],
    )
    text += f"\n\nSeconds, median (worst) of {count} each, with a warm spare, in {time.monotonic() - began:.0f} s. A task may take"
    text += f" {TASK_SECONDS:g} s, a process be silent for {HEARTBEAT_SECONDS:g} s. Between updates of a layer, before the first fault:"
    text += f" {_figures(calm)}; the aim for a stopped worker is a task's time beyond the longest of those, for the coordinator nothing"
    text += " beyond it. Two shards, two forward and two detached backward workers (and attached ones) on one machine;"
    text += " cuts every 25 updates."
    write_section("Chaos: recovery", command, text)


def _hit(standing: Standing, kind: Kind, rng: random.Random) -> None:
    """One fault, and what follows, until all is well again."""
    standing.wait_for_everybody(spare=not kind.paused and kind.role != COORDINATOR)
    standing.wait_for_version(standing.tail.lowest_version + CALM_UPDATES)
    if kind.paused:
        standing.pause(kind.role, PAUSE_SECONDS, rng)
    else:
        standing.kill(kind.role, rng)
    standing.wait_until(lambda: standing.watch.all_recovered and not standing.paused, f"recovery ({kind})")
    outcome = standing.watch.outcomes(standing.tail.layers)[-1]
    print(f"{outcome.fault}: {_figures([outcome.stall_seconds])}", flush=True)


def _row(kind: Kind, found: Sequence[FaultOutcome], calm: float) -> list[str]:
    stalls = [one.stall_seconds for one in found if one.stall_seconds is not None]
    aim = kind.aim + (calm if kind.beyond_calm else 0.0)
    held = "held" if stalls and max(stalls) <= aim else f"missed {sum(one > aim for one in stalls)} times"
    return [
        str(kind),
        _figures(stalls),
        f"{aim:.2f}: {held}",
        _figures([one.recovery_seconds for one in found]),
        _figures([one.caught_up_seconds for one in found]),
    ]


def _figures(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.2f} ({max(found):.2f})" if found else "-"
