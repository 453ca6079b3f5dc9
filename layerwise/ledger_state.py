"""What a cut saves of a layer's ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layerwise.applied import AppliedSet
from layerwise.errors import CorruptError
from layerwise.plan import TrainingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """What a cut saves of a layer's ledger, taken when no gradient waits for its update.

    ``samples`` counts samples that earlier updates applied or dropped; ``digest`` is the hash of the layer after its
    last update. ``staleness`` and ``misalignment`` are the histograms of all gradients that led to it, in any life (none
    in a file that was written before they were kept).
    """

    layer: int
    version: int = 0
    revision: int = 0
    samples: int = 0
    digest: str = ""
    applied: AppliedSet = field(default_factory=AppliedSet)
    buffers: AppliedSet = field(default_factory=AppliedSet)
    staleness: tuple[int, ...] = ()
    misalignment: tuple[int, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values for the cut's metadata."""
        return {
            "layer": self.layer,
            "version": self.version,
            "revision": self.revision,
            "samples": self.samples,
            "digest": self.digest,
            "applied": self.applied.to_json(),
            "buffers": self.buffers.to_json(),
            "staleness": list(self.staleness),
            "misalignment": list(self.misalignment),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> LedgerState:
        """The inverse of `to_json`; ``ValueError`` when the values do not describe such a state."""
        numbers = [value.get(name) for name in ("layer", "version", "revision", "samples")]
        digest, applied, buffers = value.get("digest"), value.get("applied"), value.get("buffers")
        if any(type(one) is not int or one < 0 for one in numbers) or not isinstance(digest, str):
            raise ValueError(f"not a layer's ledger: {dict(value)}")
        if not isinstance(applied, dict) or not isinstance(buffers, dict):
            raise ValueError(f"not a layer's ledger: {dict(value)}")
        histograms = [value.get(name, []) for name in ("staleness", "misalignment")]
        for one in histograms:
            if not isinstance(one, list) or any(type(count) is not int or count < 0 for count in one):
                raise ValueError(f"not a layer's ledger: {dict(value)}")
        staleness, misalignment = (tuple(one) for one in histograms if isinstance(one, list))
        layer, version, revision, samples = (int(str(one)) for one in numbers)
        return cls(
            layer=layer,
            version=version,
            revision=revision,
            samples=samples,
            digest=digest,
            applied=AppliedSet.from_json(applied),
            buffers=AppliedSet.from_json(buffers),
            staleness=staleness,
            misalignment=misalignment,
        )

    def check(self, layer: int, plan: TrainingPlan) -> None:
        """Raise `CorruptError` unless ``layer`` can have this state under ``plan``."""
        applied = self.applied
        samples = plan.samples_in(applied.watermark) + sum(
            plan.microbatch(index).num_samples for index in applied.above
        )
        if self.layer != layer:
            raise CorruptError(f"layer {layer} can't be restored from the ledger of layer {self.layer}")
        if len(applied) != plan.gradients_before(self.version) or samples != self.samples:
            raise CorruptError(
                f"layer {layer} can't be restored at version {self.version}: its ledger holds {len(applied)} "
                f"microbatches of {samples} samples and says {self.samples} samples; the plan asks for "
                f"{plan.gradients_before(self.version)} microbatches"
            )
