"""What an audit found: one check for each promise, with what was examined and what contradicts it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from layerwise.dropped import DroppedMicrobatch

CLAIMS: dict[str, str] = {
    "log": "the logs of all blocks can be read, number their records without gaps, belong together and reach as far as the cuts",
    "versions": "versions and revisions rise one by one within a life, and every event names the version it met",
    "lives": "a new life of a layer begins at exactly a saved version of the one before",
    "exactly-once": "every layer takes each microbatch in once at most, as a gradient or as a tombstone",
    "updates": "every update closes after as many gradients as the plan says, and counts its samples rightly",
    "tickets": "every gradient belongs to one open forward pass of the same attempt",
    "numbers": "an admission number belongs to one attempt",
    "buffers": "buffers are written once for each microbatch and layer",
    "staleness-identity": "applied + dropped + aborted + open ages equal the tickets left open over all updates",
    "staleness-bound": "no gradient is staler than was promised, and updates say the largest staleness of theirs",
    "learning-rates": "learning rates follow from sample counts and staleness, on every layer alike",
    "rollbacks": "after a rollback all layers halve their learning rate, and none is stale until the window opens again",
    "position-order": "where position order was promised, each update is made of exactly the plan's microbatches",
    "agreement": "all layers end at one version, with the same microbatches",
    "ledger": "samples leased = applied + dropped, and the logs say the same",
}
"""Every check by name, with the promise it tests."""

_MAX_FAILURES = 5
_MAX_DROPPED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCheck:
    """One promise. ``applicable`` is false where it is not made yet, as for the end of a job that still runs.

    ``examined`` counts what was looked at, ``num_failures`` what contradicts the promise; ``failures`` are the first
    few.
    """

    name: str
    applicable: bool
    examined: int
    detail: str
    num_failures: int = 0
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing contradicts the promise."""
        return self.num_failures == 0

    @property
    def claim(self) -> str:
        """The promise."""
        return CLAIMS[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What the logs say of one layer. ``staleness[t]`` counts gradients of staleness ``t`` updates, over all lives."""

    layer: int
    name: str
    life: int
    version: int
    microbatches: int
    dropped: int
    open_tickets: int
    staleness: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The outcome of an audit. ``dropped`` is what the layers' last lives hold as dropped, in position order."""

    job: str
    checks: tuple[AuditCheck, ...]
    layers: tuple[LayerFacts, ...]
    dropped: tuple[DroppedMicrobatch, ...] = ()

    @property
    def passed(self) -> bool:
        """Every check passed."""
        return all(check.passed for check in self.checks)

    def check(self, name: str) -> AuditCheck:
        """The check called ``name``."""
        return next(check for check in self.checks if check.name == name)

    def with_failures(self, name: str, failures: Sequence[str]) -> AuditReport:
        """The same report where check ``name`` fails for these reasons too."""
        if not failures:
            return self
        checks = tuple(
            replace(
                check,
                num_failures=check.num_failures + len(failures),
                failures=(*failures, *check.failures)[:_MAX_FAILURES],
            )
            if check.name == name
            else check
            for check in self.checks
        )
        return replace(self, checks=checks)

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--output json``."""
        return {
            "job": self.job,
            "passed": self.passed,
            "checks": [
                {
                    "name": check.name,
                    "claim": check.claim,
                    "passed": check.passed,
                    "applicable": check.applicable,
                    "examined": check.examined,
                    "detail": check.detail,
                    "num_failures": check.num_failures,
                    "failures": list(check.failures),
                }
                for check in self.checks
            ],
            "layers": [
                {
                    "layer": facts.layer,
                    "name": facts.name,
                    "life": facts.life,
                    "version": facts.version,
                    "microbatches": facts.microbatches,
                    "dropped": facts.dropped,
                    "open_tickets": facts.open_tickets,
                    "staleness": list(facts.staleness),
                }
                for facts in self.layers
            ],
            "dropped": [
                {
                    "epoch": one.microbatch.epoch,
                    "start": one.microbatch.start,
                    "stop": one.microbatch.stop,
                    "reason": one.reason,
                    "missing_from": one.missing_from,
                }
                for one in self.dropped
            ],
        }

    def lines(self) -> list[str]:
        """The report for a terminal, one line each."""
        width = max(map(len, CLAIMS))
        result = []
        for check in self.checks:
            mark = "FAIL" if not check.passed else "ok" if check.applicable else "-"
            result.append(f"{mark:4}  {check.name:{width}}  {check.claim} ({check.detail})")
            result.extend(f"      {'':{width}}  {sentence}" for sentence in check.failures)
            if check.num_failures > len(check.failures):
                result.append(f"      {'':{width}}  and {check.num_failures - len(check.failures)} more")
        result.extend(str(one) for one in self.dropped[:_MAX_DROPPED])
        if len(self.dropped) > _MAX_DROPPED:
            result.append(f"and {len(self.dropped) - _MAX_DROPPED} more; --output json has them all")
        count = sum(check.passed for check in self.checks)
        result.append(f"job {self.job}: {count} of {len(self.checks)} checks passed")
        return result


@dataclass(slots=True)
class Findings:
    """Gathers what an audit examines and what it finds wrong."""

    examined: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLAIMS, 0))
    num_failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLAIMS, 0))
    failures: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in CLAIMS})
    not_applicable: dict[str, str] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        """``number`` things more were examined for check ``name``."""
        self.examined[name] += number

    def fail(self, name: str, sentence: str) -> None:
        """``sentence`` says what contradicts promise ``name``."""
        self.num_failures[name] += 1
        if len(self.failures[name]) < _MAX_FAILURES:
            self.failures[name].append(sentence)

    def skip(self, name: str, why: str) -> None:
        """Promise ``name`` is not made here."""
        self.not_applicable[name] = why

    def report(
        self, job: str, details: dict[str, str], layers: Iterable[LayerFacts], dropped: Iterable[DroppedMicrobatch]
    ) -> AuditReport:
        """Everything found; ``details[name]`` says what was examined."""
        checks = []
        for name in CLAIMS:
            detail = self.not_applicable.get(name) or f"{self.examined[name]:,} {details[name]}"
            checks.append(
                AuditCheck(
                    name=name,
                    applicable=name not in self.not_applicable,
                    examined=self.examined[name],
                    detail=detail,
                    num_failures=self.num_failures[name],
                    failures=tuple(self.failures[name]),
                )
            )
        return AuditReport(job=job, checks=tuple(checks), layers=tuple(layers), dropped=tuple(dropped))
