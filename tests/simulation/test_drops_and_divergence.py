"""Runs that drop microbatches or diverge while processes die: the draw of seeds must really bring such runs about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.simulation.cluster import SimulatedCluster
from tests.simulation.scenario import BadSamples, FakeDivergence, Fault, Scenario, draw
from tests.simulation.world import Weather


def run(scenario: Scenario) -> dict[str, Any]:
    cluster = SimulatedCluster(scenario)
    try:
        cluster.run()
    except Exception as error:
        error.add_note(f"seed {scenario.seed}")
        raise
    document: dict[str, Any] = cluster.coordinator.role.job(cluster.job)
    return document


def steady(seed: int, **train: Any) -> Scenario:
    """Three shards, an update for each of 60 microbatches, a cut at every second; nothing goes wrong."""
    scenario = replace(
        draw(seed),
        faults=(),
        stops=(),
        stop_after_resume=None,
        weather=Weather(),
        disk_failure=0.0,
        shards=3,
        layers=6,
        forward=2,
        detached=0,
        num_samples=20,
        num_validation=0,
        bad=BadSamples(),
        divergence=None,
        step_seconds=0.001,
        slots=2,
    )
    spec = dict(scenario.spec)
    spec |= {
        "mode": "asynchronous",
        "data": {"name": "digits", "batch": 1},
        "train": {"steps": 60, "optimizer": "sgd", **train},
        "cluster": {"shards": 3, "forward": 2, "backward": {"attached": True, "detached": 0}},
        "async": {"window": 4, "accumulation": 1},
        "checkpoint": {"every": 2, "keep": 1},
    }
    return replace(scenario, spec=spec)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", ["shard-0", "shard-1", "shard-2", "forward-0", "coordinator"])
def test_bad_samples_are_dropped_exactly_once_whoever_dies(target: str, seed: int) -> None:
    bad = BadSamples(torn=frozenset({9, 30, 31}), spoilt=frozenset({10, 25, 40}))
    dies = tuple(Fault(at=0.3 + 0.05 * seed + wait, kind="kill", target=target, seconds=0.2) for wait in (0.0, 0.7))
    document = run(replace(steady(seed, on_bad_sample="drop", max_dropped=1.0), bad=bad, faults=dies))
    listed = {20 * one["epoch"] + one["start"]: one["reason"] for one in document["ledger"]["dropped"]}
    assert listed.keys() == bad.torn | bad.spoilt
    assert all("torn" in listed[index] for index in bad.torn)
    assert all("not finite" in listed[index] for index in bad.spoilt)


def test_what_some_layers_had_applied_before_it_became_bad_is_named_with_the_lowest_layer_that_lacks_it() -> None:
    """A loss that was finite before a shard was lost is not always so the second time: whether depends on the moment."""
    partial = []
    for seed in range(12):
        bad = BadSamples(spoilt=frozenset(range(2, 60, 3)), often=0.5)
        dies = tuple(Fault(at=at + 0.02 * seed, kind="kill", target="shard-0", seconds=0.2) for at in (0.4, 0.8, 1.2))
        document = run(replace(steady(seed, on_bad_sample="drop", max_dropped=1.0), bad=bad, faults=dies))
        partial += [one["missing_from"] for one in document["ledger"]["dropped"] if one["missing_from"] is not None]
    assert partial
    assert set(partial) <= {0, 1}, "shard-0 has the layers 0 and 1, and only those were set back"


@pytest.mark.parametrize("bad", [float("nan"), 50.0], ids=["not finite", "risen"])
@pytest.mark.parametrize("target", ["", "shard-0", "shard-2", "forward-0", "coordinator"])
def test_a_divergence_is_rolled_back_to_a_cut_from_before_it_whoever_dies(target: str, bad: float) -> None:
    # What a coordinator knows of the loss at the start is stored every second.
    times = {"": (), "coordinator": (1.2,)}.get(target, (0.6, 1.1, 1.6))
    dies = tuple(Fault(at=at, kind="kill", target=target, seconds=0.2) for at in times)
    divergence = FakeDivergence(index=40, bad=bad)
    # The average begins anew with each shard that is lost, so enough must be left after the last one.
    document = run(replace(steady(3, on_divergence="rollback", steps=80), divergence=divergence, faults=dies))
    [rollback] = document["rollbacks"]
    assert rollback["version"] < 40
    if not target:
        assert rollback["version"] > 12, "a cut is kept that is not much older than two lengths of the average"
    assert rollback["rate_factor"] == 0.5


def test_a_second_divergence_stays_synchronous_to_the_end() -> None:
    divergence = FakeDivergence(index=40, bad=float("nan"), rate_factor=0.25)
    document = run(replace(steady(4, on_divergence="rollback"), divergence=divergence))
    first, second = document["rollbacks"]
    assert (first["rate_factor"], second["rate_factor"]) == (0.5, 0.25)
    assert second["synchronous_until"] == 60
