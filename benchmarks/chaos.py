"""Faults on purpose: mixed runs of real processes, simulated seeds, a soak with kills, recovery times, a calm soak for memory.

python -m benchmarks chaos [--runs 60] [--calm-runs 10] [--seeds 2000] [--soak SECONDS --every 15] [--recovery 20] [--memory SECONDS]

A part is left out with 0. Each writes a section of its own. A run that fails is kept, and listed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import chaos_recovery, chaos_soak
from benchmarks.chaos_standing import ROLES
from benchmarks.report import spread, table, write_section
from benchmarks.runs import ROOT
from layerwise.chaos.chaos_cluster import cluster_for, job_for_chaos, shape_of
from layerwise.chaos.comparison import MOST_DEVIATIONS, worse_than_calm
from layerwise.chaos.plan import ChaosPlan, Scenario, draw_plan
from layerwise.chaos.report import ChaosReport
from layerwise.chaos.run import ChaosRun
from layerwise.job import JobSpec
from layerwise.overrides import read_job

FAILED_RUNS = ROOT / "runs" / "chaos-failures"


def job(directory: Path) -> JobSpec:
    """What the mixed runs train: the digits with a small network, all roles apart, two forward workers."""
    return read_job(
        {
            "name": "chaos",
            "model": {"name": "mlp", "hidden": [64, 64, 64]},
            "data": {"name": "digits", "batch": 32},
            "train": {"steps": 150, "seed": 1, "optimizer": {"name": "adamw", "lr": 1e-2}},
            "cluster": {"shards": 2, "forward": 2, "backward": {"attached": True, "detached": 2}},
            "checkpoint": {"every": 10, "path": str(directory)},
        }
    )


def main(arguments: Sequence[str]) -> None:
    """Measure and write the sections."""
    parser = argparse.ArgumentParser(prog="benchmarks chaos")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--calm-runs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--soak", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=15.0)
    parser.add_argument("--recovery", type=int, default=20)
    parser.add_argument("--memory", type=float, default=600.0)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    given = parser.parse_args(arguments)
    command = f"python -m benchmarks chaos {' '.join(arguments)}".strip()
    if given.runs:
        mixed(command, range(given.first_seed, given.first_seed + given.runs), given.calm_runs)
    if given.seeds:
        simulated(command, given.seeds)
    if given.recovery:
        chaos_recovery.measure(command, given.recovery, given.roles)
    if given.soak:
        chaos_soak.with_kills(command, given.soak, given.every, given.roles)
    if given.memory:
        chaos_soak.for_memory(command, given.memory)


# ---- mixed runs ----


def mixed(command: str, seeds: range, num_calm: int) -> None:
    """Runs under mixed faults beside runs without any."""
    calm = [one_run(ChaosPlan(scenario=Scenario.MIXED, seed=seed)) for seed in range(num_calm)]
    reports: dict[int, ChaosReport] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            plan = draw_plan(Scenario.MIXED, seed, shape_of(job(Path(folder))))
        reports[seed] = one_run(plan)
        report = reports[seed]
        print(f"seed {seed}: {'passed' if report.passed else report.failures}, {report.seconds:.1f} s", flush=True)
    every = list(reports.values())
    planned = Counter(str(fault.kind) for report in every for fault in report.plan.process_faults)
    planned += Counter(str(fault.kind) for report in every for fault in report.plan.frame_faults)
    exact = [report.replay.exact for report in every if report.replay is not None]
    rows = [
        ["runs", f"{len(every)}"],
        ["passed", f"{sum(report.passed for report in every)}"],
        ["faults planned", ", ".join(f"{count} {kind}" for kind, count in sorted(planned.items()))],
        ["faults that happened", f"{sum(report.plan.num_faults - len(report.unfired) for report in every)}"],
        ["clean audits", f"{sum(report.audit is not None and report.audit.passed for report in every)}"],
        ["bit-exact replays", f"{sum(exact)} of {len(exact)}"],
        ["hangs", f"{sum(report.hang is not None for report in every)}"],
        ["new lives of blocks", f"{sum(len(_facts(report, 'rewinds')) for report in every)}"],
        ["longest rewind", f"{max(_facts(report, 'rewind_updates') for report in every)} updates"],
        ["samples redone in a run", spread([_facts(report, "samples_redone") for report in every], 0)],
        ["accuracy with faults", _accuracies(every)],
        [f"accuracy of {num_calm} runs without", _accuracies(calm)],
        ["accuracy is that of runs without", "; ".join(_worse(every, calm)) or "yes"],
        ["seconds of a run", spread([report.seconds for report in every])],
    ]
    text = table(["", ""], rows)
    text += "\n\nEach run has three faults of processes (killed or paused, any role) and four of frames, on a fresh cluster of"
    text += " 2 shards, 2 forward and 2 detached backward workers with a warm spare; 150 updates of a small network on digits."
    text += " The accuracy is that of runs without faults when the mean is no worse than the worst of those, and no single run more than"
    text += f" {MOST_DEVIATIONS:.0f} of their standard deviations below their mean."
    failed = [f"- seed {seed}: {'; '.join(report.failures)}" for seed, report in reports.items() if not report.passed]
    if failed:
        text += "\n\nRuns that failed (`python -m benchmarks chaos --runs 1 --first-seed N` repeats the plan):\n\n"
        text += "\n".join(failed)
    write_section("Chaos: mixed faults", command, text)


def one_run(plan: ChaosPlan) -> ChaosReport:
    """One run on a cluster of its own; what it leaves is kept when it failed."""
    FAILED_RUNS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"seed-{plan.seed}-", dir=FAILED_RUNS))
    spec = job_for_chaos(job(folder / "run"), plan.scenario, folder / "run")
    cluster, fired = cluster_for(spec, plan, folder, threads=1)
    with cluster:
        cluster.wait_for_nodes()
        cluster.wait_for_spare()
        report = ChaosRun(cluster, spec, plan, fired=fired).run()
    if report.passed:
        shutil.rmtree(folder)
    return report


def _facts(report: ChaosReport, name: str) -> Any:
    return report.to_json()[name]


def _worse(every: Sequence[ChaosReport], calm: Sequence[ChaosReport]) -> tuple[str, ...]:
    found, without = _measured(every), _measured(calm)
    if len(found) < 2 or len(without) < 2:
        return ("too few runs to say",)
    return worse_than_calm(found, without)


def _measured(reports: Sequence[ChaosReport]) -> list[float]:
    return [report.document["validation"]["accuracy"] for report in reports if report.document.get("validation")]


def _accuracies(reports: Sequence[ChaosReport]) -> str:
    found = _measured(reports)
    if len(found) < 2:
        return ", ".join(f"{100 * one:.1f} %" for one in found) or "-"
    return f"{100 * statistics.mean(found):.1f} % ± {100 * statistics.stdev(found):.1f} ({100 * min(found):.1f}-{100 * max(found):.1f})"


# ---- simulated seeds ----


def simulated(command: str, count: int) -> None:
    """Seeds of the simulated world, on all cores."""
    began = time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(_simulate, range(count), chunksize=10))
    failed = [seed for seed, (fine, _, _) in enumerate(outcomes) if not fine]
    happened: Counter[str] = sum((found for _, found, _ in outcomes), Counter())
    replaced: Counter[str] = sum((found for _, _, found in outcomes), Counter())
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(happened.items()))
    text = f"{count} seeds of the simulated world: {count - len(failed)} clean; {happened.total()} faults that hit something"
    text += f" while the job ran ({kinds}), beside what the network does. {replaced['pause']} shards were replaced while they"
    text += f" were paused, {replaced['isolate']} while they were cut off."
    text += f" {time.perf_counter() - began:.0f} s on {cores} cores."
    if failed:
        text += f" Failed: {', '.join(map(str, failed))} (`python -m tests.simulation.run --seed N`)."
    write_section("Chaos: simulated seeds", command, text)


def _simulate(seed: int) -> tuple[bool, Counter[str], Counter[str]]:
    """Whether it was clean, and what really happened."""
    from tests.simulation.cluster import SimulatedCluster
    from tests.simulation.scenario import draw

    cluster = SimulatedCluster(draw(seed))
    fine = True
    try:
        cluster.run()
    except Exception as error:
        print(f"simulated seed {seed}: {type(error).__name__}: {error}", flush=True)
        fine = False
    return fine, cluster.happened, cluster.replaced
