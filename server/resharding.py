"""The same job on another number of shards: every layer keeps its own files, only where it is placed changes."""

from __future__ import annotations

from dataclasses import replace

from layerwise.errors import ConfigError
from layerwise.job import JobSpec, parse_job
from layerwise.server.job_record import JobRecord
from layerwise.server.preparation import prepare, prepared_before
from layerwise.settings import ResolvedSettings


def with_shards(record: JobRecord, num_shards: int) -> tuple[JobRecord, list[str]]:
    """``record`` as a job of ``num_shards`` shards, and what its user has to know of that, a sentence each.

    What the updates are stays: batches, accumulation, the policies. A window that the job left to us stays where it fits
    the new number (at least one microbatch a shard, at most two), and is decided anew where it does not.

    Raises:
        ConfigError: the job can't be split so.
    """
    known = parse_job(record.spec_json, source=f"job {record.job}")
    if known.cluster.shards == num_shards:
        return record, []
    spec = known.with_shards(num_shards)
    record = replace(record, spec_json=spec.to_json())
    before = prepared_before(record)
    if before is None:
        return record, []
    prepared = prepare(_as_decided(spec, before.settings), before.profile)
    settings = prepared.settings
    if settings.plan != before.settings.plan:
        raise ConfigError(f"on {num_shards} shards job {record.job} would train under another plan: {settings.plan}")
    blocks = ", ".join(f"{start}-{stop - 1}" for start, stop in prepared.blocks)
    notes = [f"{num_shards} shards instead of {len(before.blocks)}, with layers {blocks}"]
    if settings.window != before.settings.window:
        notes.append(
            f"async.window: {settings.window} from here on instead of {before.settings.window}, which was chosen for "
            f"{len(before.blocks)} shards"
        )
    said = (*record.warnings, *before.settings.warnings)
    fresh = tuple(one for one in settings.warnings if one not in said)
    record = replace(
        record,
        settings_json=settings.to_json(),
        blocks=prepared.blocks,
        warnings=(*record.warnings, *fresh),
    )
    return record, [*notes, *fresh]


def _as_decided(spec: JobSpec, before: ResolvedSettings) -> JobSpec:
    """``spec`` with what was decided for the job before, but for a window that does not fit its number of shards."""
    shards = spec.cluster.shards
    fits = spec.asynchrony.window != "auto" or shards <= before.window <= 2 * shards
    decided = {
        "window": before.window if fits else "auto",
        "accumulation": before.accumulation,
        "backward_weights": before.backward_weights,
        "delay_policy": before.delay_policy,
    }
    return spec.model_copy(update={"asynchrony": spec.asynchrony.model_copy(update=decided)})
