"""From a job's specification and its profile to everything that a run needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.applied import AppliedSet
from layerwise.errors import ConfigError
from layerwise.job import JobSpec, parse_job
from layerwise.partition import partition
from layerwise.profile import Profile
from layerwise.proto.frames import MAX_MESSAGE_BYTES
from layerwise.server.job_record import JobRecord
from layerwise.settings import ResolvedSettings, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job whose model and data were measured: its settings without ``auto``, and which layers each block holds."""

    spec: JobSpec
    settings: ResolvedSettings
    profile: Profile
    blocks: tuple[tuple[int, int], ...]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of all layers in order."""
        return tuple(layer.name for layer in self.profile.layers)


def prepare(spec: JobSpec, profile: Profile) -> Prepared:
    """Settle what the job's ``auto`` values come to and where the model is split.

    Raises:
        ConfigError: the job can't be trained as it is written, given this model and data.
    """
    num_blocks = spec.cluster.shards
    forward = sum(layer.forward_seconds for layer in profile.layers)
    hop_fraction = profile.hop_seconds * num_blocks / forward if forward and profile.hop_seconds else None
    settings = resolve(spec, profile.num_train_samples, num_blocks, hop_fraction)
    blocks = partition(profile, num_blocks, recompute=settings.backward_weights == "recompute")
    _check_travels(spec, settings, profile, blocks)
    return Prepared(spec=spec, settings=settings, profile=profile, blocks=blocks)


def _check_travels(
    spec: JobSpec, settings: ResolvedSettings, profile: Profile, blocks: Sequence[tuple[int, int]]
) -> None:
    """Refuse what would not fit into a message, before hours of training have gone by.

    Raises:
        ConfigError: says what is too large.
    """
    plan = settings.plan
    # An evaluation goes through the blocks a whole batch at a time.
    samples = max(plan.microbatch_samples, min(plan.batch, profile.num_validation_samples))
    for start, _ in blocks:
        source = f"what layer {start - 1} hands on" if start else "the data"
        num_bytes = profile.input_bytes + (profile.layers[start - 1].output_bytes if start else 0)
        num_bytes = num_bytes * samples // profile.microbatch_samples
        if num_bytes > MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"data.batch: {source} has {num_bytes} bytes for {samples} samples, and at most {MAX_MESSAGE_BYTES} can "
                f"travel at once; use a smaller batch"
            )
    if not spec.cluster.num_detached:
        return
    for start, stop in blocks:
        num_bytes = sum(profile.layers[index].parameter_bytes for index in range(start, stop))
        if num_bytes > MAX_MESSAGE_BYTES // 2:
            raise ConfigError(
                f"cluster.backward: the parameters of layers {start}-{stop - 1} have {num_bytes} bytes, and detached "
                f"workers take at most {MAX_MESSAGE_BYTES // 2} at once; use more shards, or attached workers"
            )


def prepared_before(record: JobRecord) -> Prepared | None:
    """What an earlier run of the job was prepared as; None when it never came so far."""
    if not record.settings_json:
        return None
    return Prepared(
        spec=parse_job(record.spec_json, source=f"job {record.job}"),
        settings=ResolvedSettings.from_json(record.settings_json),
        profile=Profile.from_json(record.profile_json),
        blocks=record.blocks,
    )


def restored_sets(layers: Sequence[AppliedSet]) -> tuple[AppliedSet, AppliedSet]:
    """From each layer's set after a restore: what all of them hold, and what at least one holds."""
    done = AppliedSet.intersection(layers)
    held = done.copy()
    top = max(max(one.above, default=one.watermark - 1) for one in layers) + 1
    for index in done.missing(top):
        if any(index in one for one in layers):
            held.add(index)
    return done, held


def partial_drops(layers: Sequence[AppliedSet], done: AppliedSet) -> dict[int, int]:
    """Of what all layers have (``done``), what only some of them dropped, with the lowest of those layers."""
    found = {}
    for index in done.dropped:
        missing = [layer for layer, one in enumerate(layers) if index in one.dropped]
        if len(missing) < len(layers):
            found[index] = missing[0]
    return found
