"""From a job's specification and its profile to everything that a run needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.applied import AppliedSet
from layerwise.job import JobSpec, parse_job
from layerwise.partition import partition
from layerwise.profile import Profile
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
    return Prepared(spec=spec, settings=settings, profile=profile, blocks=blocks)


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
