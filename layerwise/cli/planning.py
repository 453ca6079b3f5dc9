"""``plan``, ``verify`` and ``schema``: about jobs that need not run yet."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import allow_import_option, command, device_name, output_option, set_option
from layerwise.cli.output import format_bytes, format_count, print_facts, print_json, print_table

if TYPE_CHECKING:
    from layerwise.server.preparation import Prepared
    from layerwise.settings import ResolvedSettings

VERIFIED_STEPS = 20


@command("schema", examples=["layerwise schema > job.schema.json"])
@output_option
def schema_command(output: str) -> int:
    """Print the JSON Schema of job files, for editors and checks; in one line with ``--output json``."""
    from layerwise.job import job_schema

    click.echo(json.dumps(job_schema(), indent=2 if output == "table" else None))
    return exit_codes.DONE


@command("plan", examples=["layerwise plan job.yaml", "layerwise plan job.yaml --set cluster.shards=4 --output json"])
@click.argument("spec", metavar="SPEC")
@set_option
@allow_import_option
@click.option(
    "--device",
    type=device_name,
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda:N",
    help="Where the layers are measured.",
)
@output_option
def plan_command(
    spec: str, overrides: tuple[str, ...], allow_imports: tuple[str, ...], device: str, output: str
) -> int:
    """Measure the model of SPEC here; show how it would be split, what each shard would need, what staleness to expect.

    Nothing is trained. Seconds are for one microbatch on this machine's device. Links between shards are not measured:
    where an automatic window would be larger on slow ones, that is shown beside it.
    """
    from layerwise.overrides import read_job

    job = read_job(spec, overrides)
    import torch

    from layerwise.cluster import num_cores
    from layerwise.device import resolve_device
    from layerwise.job_plan import plan_blocks
    from layerwise.probe import probe
    from layerwise.server.preparation import prepare

    torch.set_num_threads(max(1, num_cores() // job.cluster.shards))
    prepared = prepare(job, probe(job, device=resolve_device(device), allowed_imports=allow_imports))
    settings = prepared.settings
    blocks = plan_blocks(prepared.profile, settings, prepared.blocks)
    slow = settings_on_slow_links(prepared)
    if output == "json":
        print_json(
            {
                "name": job.name,
                "blocks": [asdict(block) for block in blocks],
                "settings": json.loads(settings.to_json()),
                "settings_on_slow_links": json.loads(slow.to_json()),
                "layers": json.loads(prepared.profile.to_json())["layers"],
                "notes": list(prepared.profile.notes),
                "warnings": list(settings.warnings),
            }
        )
        return exit_codes.DONE
    rows = [
        [
            str(block.block),
            f"{block.start}-{block.stop - 1}",
            f"{block.first_layer} .. {block.last_layer}" if block.stop - block.start > 1 else block.first_layer,
            format_count(block.parameters),
            format_bytes(block.state_bytes),
            format_bytes(block.store_bytes),
            f"{block.forward_seconds * 1e3:.2f} + {block.backward_seconds * 1e3:.2f} ms",
            f"{block.cost_share:.0%}",
            f"{block.expected_staleness:.2f}",
        ]
        for block in blocks
    ]
    columns = [
        "block",
        "layers",
        "names",
        "parameters",
        "weights",
        "activations",
        "forward + backward",
        "share",
        "staleness",
    ]
    print_table(columns, rows)
    click.echo()
    print_facts(
        {
            "mode": settings.mode,
            "steps": settings.steps,
            "epochs": settings.epochs,
            "samples": f"{prepared.profile.num_train_samples} to train on, "
            f"{prepared.profile.num_validation_samples} to validate on",
            "update": f"{settings.plan.batch} samples in {settings.accumulation} microbatches",
            "window": f"{settings.window} microbatches",
            "backward weights": settings.backward_weights,
            "delay policy": settings.delay_policy,
            "staleness": f"{settings.expected_staleness} updates at most with in-order arrival, "
            f"{settings.max_staleness} promised",
            "standby copies": f"every {settings.standby_every} updates, with up to "
            f"{format_bytes(max(block.standby_bytes for block in blocks))} more on a shard"
            if settings.standby_every
            else None,
            "on slow links": f"window {slow.window}, accumulation {slow.accumulation}, staleness "
            f"{slow.expected_staleness} at most, {slow.max_staleness} promised"
            if slow.window != settings.window
            else None,
        }
    )
    for note in prepared.profile.notes:
        click.echo(f"note: {note}", err=True)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    return exit_codes.DONE


def settings_on_slow_links(prepared: Prepared) -> ResolvedSettings:
    """The settings where a hop takes as long as the forward pass of the whole model."""
    from layerwise.settings import resolve

    spec, profile, shards = prepared.spec, prepared.profile, prepared.spec.cluster.shards
    return resolve(spec, profile.num_train_samples, shards, float(shards) if shards > 1 else None)


@command(
    "verify",
    examples=[
        "layerwise verify examples/digits.yaml",
        "layerwise verify job.yaml --set async.accumulation=4 --steps 5",
    ],
)
@click.argument("spec", metavar="SPEC")
@set_option
@allow_import_option
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=VERIFIED_STEPS,
    show_default=True,
    help="Updates; all of the job's, if it has fewer.",
)
@click.option(
    "--device",
    type=device_name,
    default="cpu",
    show_default=True,
    metavar="auto|cpu|cuda:N",
    help="Where both are computed.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
@output_option
def verify_command(
    spec: str,
    overrides: tuple[str, ...],
    allow_imports: tuple[str, ...],
    steps: int,
    device: str,
    quiet: bool,
    output: str,
) -> int:
    """Train the job of SPEC with window 1 and with a plain PyTorch loop, and compare the two bit for bit.

    Compared are parameters, buffers and optimizer state. Exit status 1 when a bit differs. A synchronous job keeps its
    window, since it makes the same promise.
    """
    from layerwise.cli.following import shown_progress, signals_call
    from layerwise.embedded import EmbeddedRun
    from layerwise.errors import JobFailedError
    from layerwise.overrides import read_job

    changes = ["train.evaluate_every=null", "checkpoint.every=null"]
    job = read_job(spec, (*overrides, *changes)).with_absolute_paths(Path.cwd())
    from layerwise.verify import updates_to_verify, verify

    changes = ["train.epochs=null", f"train.steps={updates_to_verify(job, steps, allow_imports)}"]
    if job.mode == "asynchronous":
        changes.append("async.window=1")
    job = read_job(json.loads(job.to_json()), changes)
    with tempfile.TemporaryDirectory(prefix="layerwise-verify-") as folder:
        directory = Path(folder) / "run"
        with shown_progress(quiet=quiet) as view:
            run = EmbeddedRun(
                job, directory, view, temporary=True, allow_imports=allow_imports, threads=1, devices=(device,)
            )
            with signals_call(run.interrupt):
                document = run.run()
        if document["state"] != "done":
            if run.interrupts and document["state"] == "cancelled":
                return exit_codes.INTERRUPTED
            raise JobFailedError(f"the run to compare with failed: {document.get('message')}")
        import torch

        from layerwise.cuts import load_manifest, newest_cut
        from layerwise.device import resolve_device
        from layerwise.settings import ResolvedSettings

        torch.set_num_threads(1)
        version = newest_cut(directory) or 0
        settings = ResolvedSettings.from_json(json.dumps(load_manifest(directory, version)["settings"]))
        found = verify(job, settings, directory, version, device=resolve_device(device), allowed_imports=allow_imports)
    if output == "json":
        print_json(
            {
                "equal": found.equal,
                "version": found.version,
                "num_tensors": found.num_tensors,
                "num_elements": found.num_elements,
                "accumulation": settings.accumulation,
                "difference": str(found.difference) if found.difference is not None else None,
            }
        )
    elif found.equal:
        click.echo(
            f"equal bit for bit after {found.version} updates: {found.num_tensors} tensors, "
            f"{format_count(found.num_elements)} elements of parameters, buffers and optimizer state"
        )
    else:
        click.echo(f"different after {found.version} updates: {found.difference}")
    return exit_codes.DONE if found.equal else exit_codes.FAILED
