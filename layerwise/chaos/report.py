"""What a chaos run ends with: the faults and their cost, what the promises are worth, the result beside a calm run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.audit_report import AuditReport
from layerwise.chaos.comparison import Comparison
from layerwise.chaos.log_facts import LogFacts
from layerwise.chaos.plan import ChaosPlan
from layerwise.chaos.recovery import FaultOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """Nothing moved for ``seconds``; ``stacks`` is what each process was doing."""

    seconds: float
    phase: str
    stacks: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOutcome:
    """Whether the recorded run, executed again, gave the recorded bits; ``detail`` says what was compared."""

    exact: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosReport:
    """One run. ``unfired``: planned faults that did not happen, without which the run does not count.

    ``document`` is the job's own at its end, ``baseline`` that of the same job without faults (``None``: not run).
    """

    plan: ChaosPlan
    directory: str
    document: Mapping[str, Any]
    baseline: Mapping[str, Any] | None
    faults: tuple[FaultOutcome, ...]
    unfired: tuple[str, ...]
    log_facts: LogFacts | None
    audit: AuditReport | None
    replay: ReplayOutcome | None
    resumes: int
    seconds: float
    hang: Hang | None
    problems: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Why this run is none to be proud of, one sentence each; empty: it passed."""
        return tuple(self._failures())

    @property
    def passed(self) -> bool:
        """Every fault happened, the job came to its end, all promises hold, and it has learned what it should."""
        return not self.failures

    @property
    def comparison(self) -> Comparison | None:
        """The result beside the one without faults; ``None``: there is none of both."""
        return Comparison.of(self.document, self.baseline)

    def _failures(self) -> list[str]:
        found = list(self.problems)
        if self.hang is not None:
            found.append(
                f"nothing moved for {self.hang.seconds:.0f} s ({self.hang.phase}); the stacks are in the report"
            )
        found += [f"this planned fault did not happen: {one}" for one in self.unfired]
        state = self.document.get("state")
        if state != "done":
            found.append(f"the job is {state or 'not known'}: {self.document.get('message') or 'no reason is given'}")
        ledger = self.document.get("ledger") or {}
        if state == "done" and ledger.get("samples_applied") != self.document.get("total_samples"):
            found.append(
                f"{ledger.get('samples_applied')} samples were applied of {self.document.get('total_samples')}"
            )
        if self.audit is not None and not self.audit.passed:
            broken = [check.name for check in self.audit.checks if not check.passed]
            found.append(f"the audit contradicts these promises: {', '.join(broken)}")
        if self.replay is not None and not self.replay.exact:
            found.append(f"the replay differs: {self.replay.detail}")
        if state == "done" and (comparison := self.comparison) is not None and not comparison.passed:
            found.append(f"it has learned too little: {comparison}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The report as one document; every key is always there."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "plan": self.plan.to_json(),
            "job": self.document.get("job"),
            "directory": self.directory,
            "seconds": self.seconds,
            "faults": [fault.to_json() for fault in self.faults],
            "unfired": list(self.unfired),
            "resumes": self.resumes,
            **(self.log_facts.to_json() if self.log_facts is not None else LogFacts.nothing().to_json()),
            "audit": None
            if self.audit is None
            else {
                "passed": self.audit.passed,
                "failed_checks": [check.name for check in self.audit.checks if not check.passed],
                "failures": [text for check in self.audit.checks for text in check.failures],
            },
            "replay": None if self.replay is None else {"exact": self.replay.exact, "detail": self.replay.detail},
            "final": final_figures(self.document),
            "baseline": None if self.baseline is None else final_figures(self.baseline),
            "comparison": None if (comparison := self.comparison) is None else comparison.to_json(),
            "ledger": self.document.get("ledger"),
            "hang": None
            if self.hang is None
            else {"seconds": self.hang.seconds, "phase": self.hang.phase, "stacks": dict(self.hang.stacks)},
        }


def final_figures(document: Mapping[str, Any]) -> dict[str, Any]:
    """How a job ended: state, steps, seconds, losses and metrics."""
    return {
        "state": document.get("state"),
        "steps": document.get("steps"),
        "seconds": document.get("seconds"),
        "train_loss": document.get("train_loss"),
        "validation": document.get("validation"),
    }
