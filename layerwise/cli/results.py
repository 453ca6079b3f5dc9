"""``evaluate``, ``export`` and ``audit``: what a job has left on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import allow_import_option, command, coordinator_option, device_name, output_option
from layerwise.cli.output import print_facts, print_json
from layerwise.errors import ConfigError, NotFoundError


def job_directory(job: str, coordinator: str | None) -> tuple[Path, dict[str, Any] | None]:
    """The directory that ``job`` names (itself, or that of the coordinator's job) and the job's document if known."""
    path = Path(job).expanduser().absolute()
    if "/" in job or path.is_dir():
        if not path.is_dir():
            raise NotFoundError(f"no directory {path}")
        return path, recorded_result(path)
    if path.is_file() and not re.search(r"-\d+$", job):  # as every id ends
        raise ConfigError(f"{job} is a file; expected the directory of a run, or the id of a cluster's job")
    from layerwise.cli.jobs import coordinator_client

    with coordinator_client(coordinator) as client:
        document = client.get_job(job)
    directory = Path(document["directory"])
    if not directory.is_dir():
        raise NotFoundError(f"the directory of job {job}, {directory}, is not on this machine; run this where it is")
    return directory, document


def recorded_result(directory: Path) -> dict[str, Any] | None:
    """The document that a run on a cluster of its own has left, if it came to its end."""
    from layerwise.run_directory import load_result

    return load_result(directory)


def chosen_cut(directory: Path, cut: int | None) -> int:
    """The version that ``--cut`` says, by default the newest one."""
    from layerwise.cuts import durable_cuts

    versions = durable_cuts(directory)
    if not versions:
        raise NotFoundError(f"no saved cut in {directory}; the job has not come so far, or this is no job's directory")
    if cut is None:
        return versions[-1]
    if cut not in versions:
        raise NotFoundError(f"no cut at version {cut} in {directory}; there are {', '.join(map(str, versions))}")
    return cut


@command(
    "evaluate",
    examples=[
        "layerwise evaluate runs/digits",
        "layerwise evaluate runs/digits --cut 100",
        "layerwise evaluate digits-1",
    ],
)
@click.argument("job", metavar="DIRECTORY|JOB")
@click.option("--cut", type=click.IntRange(min=0), metavar="VERSION", help="Which cut.  [default: the newest]")
@click.option("--device", type=device_name, default="auto", show_default=True, metavar="auto|cpu|cuda:N")
@allow_import_option
@coordinator_option
@output_option
def evaluate_command(
    job: str, cut: int | None, device: str, allow_imports: tuple[str, ...], coordinator: str | None, output: str
) -> int:
    """Compute a cut's loss and metrics on the job's validation data with plain PyTorch, in this process."""
    directory, _ = job_directory(job, coordinator)
    version = chosen_cut(directory, cut)
    from layerwise.device import resolve_device
    from layerwise.evaluation import evaluate_cut

    found = evaluate_cut(directory, version, device=resolve_device(device), allowed_imports=allow_imports)
    result = {"directory": str(directory), **found}
    if output == "json":
        print_json(result)
    else:
        print_facts(result)
    return exit_codes.DONE


@command("export", examples=["layerwise export runs/digits", "layerwise export runs/digits model --cut 100"])
@click.argument("job", metavar="DIRECTORY|JOB")
@click.argument("destination", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--cut", type=click.IntRange(min=0), metavar="VERSION", help="Which cut.  [default: the newest]")
@allow_import_option
@coordinator_option
@output_option
def export_command(
    job: str,
    destination: Path | None,
    cut: int | None,
    allow_imports: tuple[str, ...],
    coordinator: str | None,
    output: str,
) -> int:
    """Write a cut as model.safetensors and config.json into DESTINATION (default: export/ in the job's directory).

    The file is a state dict of torch.nn.Sequential over the model's layers.
    """
    directory, _ = job_directory(job, coordinator)
    version = chosen_cut(directory, cut)
    from layerwise.evaluation import export_cut

    path = export_cut(directory, version, destination or directory / "export", allowed_imports=allow_imports)
    if output == "json":
        print_json({"path": str(path), "version": version, "directory": str(directory)})
    else:
        click.echo(path)
    return exit_codes.DONE


@command("audit", examples=["layerwise audit runs/digits", "layerwise audit digits-1 --output json"])
@click.argument("job", metavar="DIRECTORY|JOB")
@coordinator_option
@output_option
def audit_command(job: str, coordinator: str | None, output: str) -> int:
    """Recompute from the event log, and from the sample ledger of a job that has ended, whether every promise was kept.

    Exit status 1 when one was not.
    """
    directory, document = job_directory(job, coordinator)
    from layerwise.job_audit import audit_job

    report = audit_job(directory, document)
    if output == "json":
        print_json(report.to_json())
    else:
        for line in report.lines():
            click.echo(line)
    return exit_codes.DONE if report.passed else exit_codes.FAILED
