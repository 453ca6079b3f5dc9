"""How long training stands still when a process of each role is killed, or stopped where it stands."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.chaos_soak import ROLES, standing_job
from benchmarks.report import table, write_section
from layerwise.chaos.recovery import FaultOutcome

CALM_UPDATES = 30


def measure(command: str, count: int, roles: Sequence[str] = ROLES) -> None:
    """Kill each of ``roles`` ``count`` times in one long job, each time when all is well again and a spare is ready."""
    rng = random.Random("recovery")
    outcomes: dict[str, list[FaultOutcome]] = {}
    calm: list[float] = []
    for role in roles:
        folder = Path(tempfile.mkdtemp(prefix="layerwise-recovery-"))
        with standing_job(folder) as standing:
            standing.wait_for_version(10)
            for _ in range(count):
                standing.wait_for_everybody()
                standing.wait_for_version(standing.tail.lowest_version + CALM_UPDATES)
                standing.kill(role, rng)
                while not standing.watch.all_recovered:
                    standing.look()
                standing.wait_for_version(standing.tail.lowest_version + CALM_UPDATES)
            outcomes[role] = list(standing.watch.outcomes(standing.tail.layers))
            calm += _intervals([layer.updated_at for layer in standing.tail.layers.values()])
            standing.stop()
        shutil.rmtree(folder)
        print(f"{role}: {[round(one.stall_seconds or 0.0, 2) for one in outcomes[role]]}", flush=True)
    rows = [
        [
            role,
            _figures([one.stall_seconds for one in found]),
            _figures([one.recovery_seconds for one in found]),
            _figures([one.caught_up_seconds for one in found]),
        ]
        for role, found in outcomes.items()
    ]
    columns = ["killed", "longest time without an update", "every layer has made another update", "where it was before"]
    text = table(columns, rows)
    text += f"\n\nSeconds, median (worst) of {count} kills each, with a warm spare. Between updates of a layer: median "
    text += (
        f"{statistics.median(calm):.3f} s. Two shards, two forward and two detached backward workers on one machine;"
    )
    text += " cuts every 25 updates."
    write_section("Chaos: recovery", command, text)


def _intervals(moments: Sequence[Sequence[float]]) -> list[float]:
    return [later - earlier for one in moments for earlier, later in pairwise(one)]


def _figures(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.2f} ({max(found):.2f})" if found else "-"
