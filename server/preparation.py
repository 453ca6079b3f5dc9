"""From a job's specification and its profile to everything that a run needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.applied import AppliedSet
from layerwise.errors import ConfigError
from layerwise.job import JobSpec, parse_job
from layerwise.partition import partition
from layerwise.plan import TrainingPlan
from layerwise.profile import Profile
from layerwise.proto.frames import MAX_MESSAGE_BYTES
from layerwise.server.job_record import JobRecord
from layerwise.settings import ResolvedSettings, resolve

FEWEST_FOR_STATISTICS = 2
"""A microbatch with no more samples has no mean and variance worth the name."""


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
    _check_fewest_samples(settings.plan, profile)
    settings = replace(settings, warnings=(*settings.warnings, *_batch_statistics(settings, profile)))
    blocks = partition(profile, num_blocks, recompute=settings.backward_weights == "recompute")
    _check_travels(spec, settings, profile, blocks)
    return Prepared(spec=spec, settings=settings, profile=profile, blocks=blocks)


def _check_fewest_samples(plan: TrainingPlan, profile: Profile) -> None:
    """Refuse now what would fail at the end of the first epoch.

    Raises:
        ConfigError: a microbatch has a single sample, and the model can't be trained on that.
    """
    last = (
        plan.microbatch(min(plan.microbatches_per_epoch, plan.num_microbatches) - 1) if plan.num_microbatches else None
    )
    if last is None or last.num_samples > 1 or not profile.single_sample_error:
        return
    which = "the last one of an epoch has" if plan.microbatch_samples > 1 else "each has"
    raise ConfigError(
        f"async.accumulation: {plan.num_samples} samples in batches of {plan.batch} are cut into microbatches of "
        f"{plan.microbatch_samples}, {which} a single sample, and that fails ({profile.single_sample_error}); choose "
        f"another accumulation, data.batch or data.validation"
    )


def _batch_statistics(settings: ResolvedSettings, profile: Profile) -> list[str]:
    """A warning where BatchNorm sees hardly more than one sample at a time."""
    samples = settings.plan.microbatch_samples
    layers = [str(layer.index) for layer in profile.layers if layer.batch_statistics]
    if samples > FEWEST_FOR_STATISTICS or not layers:
        return []
    several = "layers" if len(layers) > 1 else "layer"
    return [
        f"async.accumulation: {settings.accumulation} leaves microbatches of {samples} "
        f"{'sample' if samples == 1 else 'samples'}, whose mean and variance the BatchNorm of {several} "
        f"{', '.join(layers)} is to use; lower it, raise data.batch, or normalise otherwise"
    ]


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
