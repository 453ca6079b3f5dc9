"""``chaos``: a job under planned faults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import allow_import_option, command, output_option, set_option, threads_option
from layerwise.cli.output import print_facts, print_json, print_table
from layerwise.json_text import json_text

if TYPE_CHECKING:
    from layerwise.chaos.plan import ChaosPlan
    from layerwise.chaos.report import ChaosReport
    from layerwise.job import JobSpec

SCENARIOS = (
    "kill-shard",
    "kill-forward",
    "kill-backward",
    "kill-coordinator",
    "kill-all",
    "pause",
    "delay",
    "duplicate",
    "reorder",
    "drop",
    "disk-full",
    "mixed",
)
REPORT_FILE = "report.json"


@command(
    "chaos",
    examples=[
        "layerwise chaos examples/digits.yaml",
        "layerwise chaos job.yaml --scenario kill-shard --seed 7",
        "layerwise chaos job.yaml --scenario drop --no-baseline --set train.steps=60",
        "layerwise chaos job.yaml --output json | jq '.faults[].recovery_seconds'",
    ],
)
@click.argument("spec", metavar="SPEC")
@click.option("--scenario", type=click.Choice(SCENARIOS), default="mixed", show_default=True, help="What goes wrong.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed plans the same faults."
)
@click.option(
    "--baseline/--no-baseline", default=True, show_default=True, help="Train the same job without faults first."
)
@click.option(
    "--replay/--no-replay",
    default=True,
    show_default=True,
    help="Execute the recorded run again and compare every bit.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the runs and the report go.  [default: the job's folder, with the scenario and seed behind it]",
)
@set_option
@allow_import_option
@threads_option
@output_option
def chaos_command(
    spec: str,
    scenario: str,
    seed: int,
    baseline: bool,
    replay: bool,
    directory: Path | None,
    overrides: tuple[str, ...],
    allow_imports: tuple[str, ...],
    threads: int | None,
    output: str,
) -> int:
    """Train the job in SPEC on a cluster of its own, whose processes are killed, paused or disturbed on purpose; then report.

    When what happens is planned from the seed: processes are hit when the job has made so many updates, links at so many
    frames. The report says what each fault cost, whether every sample was applied exactly once on every layer, and how
    the result compares with the same job without faults. Exit status 0: every planned fault happened, the job came to
    its end, all promises hold, and the result is not much worse.
    """
    from layerwise.chaos.chaos_cluster import cluster_for, job_for_chaos, shape_of
    from layerwise.chaos.plan import Scenario, draw_plan
    from layerwise.chaos.run import ChaosRun
    from layerwise.overrides import read_job
    from layerwise.run_directory import directory_for

    given = read_job(spec, overrides).with_absolute_paths(Path.cwd())
    wanted = directory or Path(f"{given.checkpoint_path}-{scenario}-{seed}")
    folder = directory_for(wanted)
    job = job_for_chaos(given, Scenario(scenario), folder / "run")
    plan = draw_plan(Scenario(scenario), seed, shape_of(job, allow_imports))
    _announce(plan)
    calm = None
    if baseline:
        click.echo("training without faults", err=True)
        calm = _calm_document(job_for_chaos(given, Scenario(scenario), folder / "baseline"), allow_imports, threads)
    click.echo("training with them", err=True)
    cluster, fired = cluster_for(job, plan, folder, allow_imports=allow_imports, threads=threads)
    with cluster:
        cluster.wait_for_nodes()
        cluster.wait_for_spare()
        report = ChaosRun(cluster, job, plan, fired=fired).run(
            baseline=calm, replay=replay, allow_imports=allow_imports
        )
    (folder / REPORT_FILE).write_text(json_text(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if output == "json":
        print_json(report.to_json())
    else:
        show_report(report)
    return exit_codes.DONE if report.passed else exit_codes.FAILED


def show_report(report: ChaosReport) -> None:
    """The report for people."""
    rows = [
        [
            outcome.fault,
            outcome.process,
            f"{outcome.at:.1f} s",
            outcome.version,
            _seconds(outcome.recovery_seconds),
            _seconds(outcome.stall_seconds),
            {None: "-", True: "yes", False: "no"}[outcome.replaced],
        ]
        for outcome in report.faults
    ]
    print_table(["fault", "process", "at", "version", "recovery", "longest stall", "replaced"], rows)
    click.echo()
    values = report.to_json()
    audit, replay = values["audit"], values["replay"]
    print_facts(
        {
            "job": values["job"],
            "result": "passed" if report.passed else "FAILED",
            "planned faults": f"{report.plan.num_faults - len(report.unfired)} of {report.plan.num_faults} happened",
            "rewind": f"{values['rewind_updates']} updates at most, {len(values['rewinds'])} new lives",
            "samples redone": values["samples_redone"],
            "resumed": f"{report.resumes} times" if report.resumes else None,
            "audit": None if audit is None else ("passed" if audit["passed"] else ", ".join(audit["failed_checks"])),
            "replay": None
            if replay is None
            else f"{'bit for bit' if replay['exact'] else 'DIFFERS'}: {replay['detail']}",
            "with faults": _figures(values["final"]),
            "without": _figures(values["baseline"]),
            "compared": report.comparison,
            "directory": report.directory,
        }
    )
    for sentence in report.failures:
        click.echo(f"failed: {sentence}", err=True)


def _announce(plan: ChaosPlan) -> None:
    click.echo(f"{plan.num_faults} faults are planned ({plan.scenario}, seed {plan.seed}):", err=True)
    for fault in (*plan.process_faults, *plan.frame_faults, *plan.disk_faults):
        click.echo(f"  {fault}", err=True)


def _calm_document(job: JobSpec, allow_imports: tuple[str, ...], threads: int | None) -> dict[str, Any]:
    from layerwise.embedded import EmbeddedRun
    from layerwise.follow import Quiet

    class Spoken(Quiet):
        def say(self, text: str) -> None:
            click.echo(text, err=True)

    directory = Path(job.checkpoint_path)
    return EmbeddedRun(job, directory, Spoken(), allow_imports=allow_imports, threads=threads).run()


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _figures(values: dict[str, Any] | None) -> str | None:
    if values is None:
        return None
    parts = [f"{values['steps']} updates"]
    if values["train_loss"] is not None:
        parts.append(f"training loss {values['train_loss']:.4g}")
    validation = values["validation"] or {}
    parts += [f"{name} {value:.4g}" for name, value in validation.items() if isinstance(value, float)]
    return ", ".join(parts)
