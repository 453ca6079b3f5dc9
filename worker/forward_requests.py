"""What the role of a forward worker asks of its shell; `layerwise.worker.forward_role` says how each is answered."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Get the job's data ready."""

    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load the samples of ``attempt``."""

    job: str
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEvaluation:
    """Load validation samples ``[samples.start, samples.stop)``."""

    job: str
    version: int
    samples: Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """The job is over for this worker."""

    job: str


Request = Prepare | Load | LoadEvaluation | Forget
