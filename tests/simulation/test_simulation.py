"""The real roles on a simulated network, disk and clock: every run ends with a clean audit, whatever goes wrong.

A failing seed is named in the failure; ``python -m tests.simulation.run --seed N`` repeats it with a trace.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from layerwise.server.placement import RETURN_SECONDS
from tests.simulation.cluster import SimulatedCluster
from tests.simulation.found import FOUND
from tests.simulation.scenario import Fault, draw, lose_shards

NUM_SEEDS = 500
SEEDS_AT_ONCE = 20
NUM_STANDBY_SEEDS = 40

ON_A_SLOW_DISK = {
    230: "a commit of the route before, refused because of a life that had begun since, that cost the job its last cut",
    **dict.fromkeys(range(200, 206), "other routes that change while a cut is written"),
}


def run(seed: int, *, slower: float = 1.0) -> SimulatedCluster:
    """``slower``: so many times as long as drawn does the disk take."""
    scenario = draw(seed)
    cluster = SimulatedCluster(replace(scenario, disk_delay=slower * scenario.disk_delay))
    try:
        cluster.run()
    except Exception as error:
        error.add_note(f"seed {seed}: repeat it with `python -m tests.simulation.run --seed {seed}`")
        raise
    return cluster


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_AT_ONCE))
def test_every_run_ends_with_a_clean_audit(first: int) -> None:
    for seed in range(first, first + SEEDS_AT_ONCE):
        run(seed)


@pytest.mark.parametrize("what", FOUND, ids=lambda what: f"seed {FOUND[what].seed} of its time")
def test_what_was_found_once_stays_mended(what: str) -> None:
    cluster = SimulatedCluster(FOUND[what])
    try:
        cluster.run()
    except Exception as error:
        error.add_note(f"the scenario in tests/simulation/found.py that found {what}")
        raise


@pytest.mark.parametrize("seed", ON_A_SLOW_DISK)
def test_routes_may_change_while_cuts_are_written(seed: int) -> None:
    run(seed, slower=8.0)


def test_blocks_of_lost_shards_go_on_from_standby_copies() -> None:
    """With rare cuts, frequent copies and several shards that are killed; also what holds the copies may be lost."""
    lines = []
    for seed in range(NUM_STANDBY_SEEDS):
        cluster = SimulatedCluster(lose_shards(seed))
        try:
            cluster.run()
        except Exception as error:
            error.add_note(
                f"seed {seed} of `lose_shards`: repeat it with `tests.simulation.run --seed {seed} --standby`"
            )
            raise
        lines += [event.message for event in cluster.coordinator.role.events(cluster.job, 0)]
    restored = sum("from its copy in the memory of" in line for line in lines)
    assert restored > NUM_STANDBY_SEEDS // 3, f"{restored} copies were used in {NUM_STANDBY_SEEDS} runs"


def test_a_network_that_swallows_what_two_shards_say_ends_no_run() -> None:
    """Nobody is told, so that a silent peer must be found out before the run counts as one in which nothing moves."""
    limit = 36.0  # timeouts.lease and four of timeouts.task
    long = [
        seed
        for seed in range(1000)
        if any(one.kind == "blackhole" and one.seconds > limit for one in draw(seed).faults)
    ]
    found_out = [run(seed).world.num_silent > 0 for seed in long]
    assert sum(found_out) >= 3


def test_drained_processes_really_leave() -> None:
    """What the runs with drains are worth: jobs do stop for them, and go on elsewhere."""
    drained = [seed for seed in range(40) if draw(seed).drains]
    lines = []
    for seed in drained[:8]:
        cluster = run(seed)
        lines += [event.message for event in cluster.coordinator.role.events(cluster.job, 0)]
    assert sum("must leave; stopping at the next update" in line for line in lines) > 3
    assert any(line.startswith("at version") and line.endswith("left") for line in lines)


def test_memory_really_runs_out() -> None:
    """What the runs with little memory are worth: shards end in mid-pass, and their blocks go on elsewhere."""
    short = [seed for seed in range(80) if any(fault.kind == "memory" for fault in draw(seed).faults)]
    lines = []
    for seed in short[:6]:
        cluster = run(seed)
        lines += [event.message for event in cluster.coordinator.role.events(cluster.job, 0)]
    assert sum("was lost (" in line and "memory ran out (MemoryError)" in line for line in lines) > 2


def test_guests_really_join_and_leave() -> None:
    """What the runs with guests are worth: some join, leave in mid-job, find a new coordinator, or are drained."""
    visited = [seed for seed in range(40) if draw(seed).guests]
    lines = []
    for seed in visited[:8]:
        cluster = run(seed)
        lines += [event.message for event in cluster.coordinator.role.events(cluster.job, 0)]
    assert sum(" joins" in line for line in lines) > 5
    assert sum("which had joined, left" in line for line in lines) > 3


def silences_a_shard(seed: int, *kinds: str) -> bool:
    """For so long that a spare, which there is, could have its place: by the heartbeat, or by links that are cut at once."""
    scenario = draw(seed)
    limits = {"pause": scenario.spec["timeouts"]["heartbeat"] + RETURN_SECONDS, "isolate": RETURN_SECONDS}
    return scenario.spare_shards > 0 and any(
        fault.kind in kinds and fault.target.startswith("shard") and fault.seconds > limits[fault.kind]
        for fault in scenario.faults
    )


def test_shards_are_really_cut_off_and_replaced_while_they_are_silent() -> None:
    """What the runs with pauses and isolations are worth: a fault that hits nobody, or that nobody notices, shows nothing."""
    happened: Counter[str] = Counter()
    replaced: Counter[str] = Counter()
    paused = [seed for seed in range(NUM_SEEDS) if silences_a_shard(seed, "pause")]
    isolated = [seed for seed in range(3 * NUM_SEEDS) if silences_a_shard(seed, "isolate")]  # they are rare
    for seed in {*paused, *isolated}:
        cluster = run(seed)
        happened += cluster.happened
        replaced += cluster.replaced
    assert happened["isolate"] > 3
    assert replaced["isolate"] > 3
    assert replaced["pause"] > 3


def test_a_fault_that_hits_nobody_has_not_happened() -> None:
    calm = replace(draw(7), faults=(), stops=(), stop_after_resume=None)
    absent = (
        Fault(at=0.2, kind="kill", target="shard-9", seconds=0.1),
        Fault(at=0.2, kind="sever", target="forward-0", other="backward-9", seconds=0.0),
        Fault(at=0.2, kind="break", target="shard-9", other="shard-0", seconds=0.1),
    )
    late = Fault(at=200.0, kind="kill", target="shard-0", seconds=0.1)
    there = Fault(at=0.2, kind="pause", target="shard-0", seconds=0.05)
    cluster = SimulatedCluster(replace(calm, faults=(*absent, late, there)))
    cluster.run()
    assert cluster.happened == {"pause": 1}


def test_a_seed_repeats_exactly() -> None:
    once, again = (SimulatedCluster(draw(7), trace=True) for _ in range(2))
    once.run()
    again.run()
    assert once.world.trace == again.world.trace
