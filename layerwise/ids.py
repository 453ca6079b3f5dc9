"""The names of things: jobs, layers, versions, microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

COORDINATOR = "coordinator"
"""What every other process calls the coordinator."""

JobId = NewType("JobId", str)
LayerIndex = NewType("LayerIndex", int)
Version = NewType("Version", int)
Life = NewType("Life", int)
Revision = NewType("Revision", int)
Number = NewType("Number", int)
"""Admission number: one sequence for each job, given by the route's first shard to an attempt."""


@dataclass(frozen=True, slots=True, order=True)
class Microbatch:
    """A range of sample positions in one epoch's permutation: a microbatch's only name, for ever.

    The positions are half-open, ``[start, stop)``; which samples they stand for follows from the job's seed.
    """

    epoch: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.epoch < 0 or not 0 <= self.start < self.stop:
            raise ValueError(f"no such sample range: epoch {self.epoch}, [{self.start}, {self.stop})")

    @property
    def num_samples(self) -> int:
        """How many samples the range holds."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.epoch}:{self.start}-{self.stop}"


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try at a microbatch. ``attempt`` counts from 1; it never enters any arithmetic or random seed."""

    microbatch: Microbatch
    attempt: int = 1

    def __str__(self) -> str:
        return f"{self.microbatch}#{self.attempt}"


ATTEMPTS_OF_GENERATION = 1000


def first_attempt(generation: int) -> int:
    """What the attempts are numbered from under the route of ``generation``, so that no attempt's name is used twice in a job."""
    return generation * ATTEMPTS_OF_GENERATION + 1
