"""What a job has come to, so far or at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The facts of one job, the same as ``layerwise status --output json``; ``document`` is that whole object.

    ``state`` is "queued", "preparing", "running", "stopping", "done", "failed" or "cancelled", and ``message`` says
    why. ``steps``, ``epochs`` and ``samples`` are those of the whole job. ``seconds`` and ``samples_per_second`` are
    those of this run, which a resume begins anew: ``seconds`` counts from its first microbatch's admission to its last
    update, without evaluations (the newest 1,000 of those are in ``evaluations``, each with its number). ``staleness``
    has mean, p50, p99 and max in updates over all gradients that led to the layers' states, in whichever run or life, and
    the same for each layer in ``layers``; gradients that were lost with a shard and made again count once, in the audit
    each time. ``ledger`` counts unique (epoch, sample) pairs. What is not known yet is None.
    """

    job: str
    state: str
    message: str
    steps: int
    epochs: float
    samples: int
    seconds: float
    samples_per_second: float | None
    train_loss: float | None
    validation: Mapping[str, Any] | None
    evaluations: tuple[Mapping[str, Any], ...]
    staleness: Mapping[str, Any]
    ledger: Mapping[str, Any]
    window: int | None
    accumulation: int | None
    backward_weights: str | None
    directory: Path
    document: Mapping[str, Any]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read a coordinator's job document."""
        return cls(
            job=str(document["job"]),
            state=str(document["state"]),
            message=str(document.get("message") or ""),
            steps=int(document.get("steps") or 0),
            epochs=float(document.get("epochs") or 0.0),
            samples=int(document.get("samples") or 0),
            seconds=float(document.get("seconds") or 0.0),
            samples_per_second=document.get("samples_per_second"),
            train_loss=document.get("train_loss"),
            validation=document.get("validation"),
            evaluations=tuple(document.get("evaluations") or ()),
            staleness=document.get("staleness") or {},
            ledger=document.get("ledger") or {},
            window=document.get("window"),
            accumulation=document.get("accumulation"),
            backward_weights=document.get("backward_weights"),
            directory=Path(document.get("directory") or "."),
            document=document,
        )
