"""Run one seed of the simulated world and print what happened: ``python -m tests.simulation.run --seed 17``."""

from __future__ import annotations

import argparse
import pprint
import sys

from tests.simulation.cluster import SimulatedCluster
from tests.simulation.scenario import draw, lose_shards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--standby", action="store_true", help="with standby copies, and shards that are killed")
    parser.add_argument("--quiet", action="store_true", help="no trace, only the scenario and how it ended")
    arguments = parser.parse_args()
    scenario = lose_shards(arguments.seed) if arguments.standby else draw(arguments.seed)
    cluster = SimulatedCluster(scenario, trace=not arguments.quiet)
    out = sys.stdout
    try:
        cluster.run()
        verdict = "clean"
    except AssertionError as error:
        verdict = f"FAILED: {error or 'an assertion'}"
        raise
    finally:
        for line in cluster.world.trace or ():
            out.write(f"{line}\n")
        out.write(f"{pprint.pformat(scenario)}\n")
        out.write(f"seed {arguments.seed}: {cluster.world.now:.2f} s simulated, {cluster.world.num_events} events\n")
    out.write(f"{verdict}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
