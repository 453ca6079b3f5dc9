"""A loss that is not finite ends the job with a sentence that names the first layer, wherever that layer is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.simulation.cluster import SimulatedCluster
from tests.simulation.processes import SimulatedShard
from tests.simulation.scenario import BadSamples, Scenario, draw
from tests.simulation.world import Weather


def calm(seed: int) -> Scenario:
    """Three shards, nothing goes wrong."""
    scenario = replace(
        draw(seed), faults=(), stops=(), weather=Weather(), disk_failure=0.0, shards=3, layers=6, detached=0
    )
    spec = dict(scenario.spec)
    spec["cluster"] = {"shards": 3, "forward": scenario.forward, "backward": {"attached": True, "detached": 0}}
    spec["async"] = {"window": 3, "accumulation": 1}
    spec["mode"] = "asynchronous"
    spec["train"] = {**spec["train"], "on_bad_sample": "fail"}
    return replace(scenario, spec=spec, bad=BadSamples())


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (-1, "its input samples are not finite already"),
        (1, "layer 1 (layer-1) is the first"),
        (3, "layer 3 (layer-3) is the first"),
        (5, "layer 5 (layer-5) is the first"),
        (6, "all layers' outputs are finite"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(layer: int, said: str) -> None:
    cluster = SimulatedCluster(calm(2))
    for process in cluster.world.processes.values():
        if isinstance(process, SimulatedShard):
            process.not_finite = (4, layer)

    with pytest.raises(AssertionError, match="the job failed: the loss of microbatch"):
        cluster.run()

    document = cluster.coordinator.role.job(cluster.job)
    assert said in document["message"]
    assert "resume" in document["message"]
