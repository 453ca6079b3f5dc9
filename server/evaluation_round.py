"""One evaluation of one cut: which validation ranges are out, and what came back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.ids import Microbatch
from layerwise.messages import Evaluated, Metric

MOST_EVALUATIONS = 1000
"""Evaluations that a job remembers, the newest ones, so that its document and the manifests of its cuts can be sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of one evaluation: means over all validation samples, and how long training paused for it."""

    version: int
    seconds: float
    means: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in the job document."""
        return {"version": self.version, "seconds": self.seconds, **self.means}


def num_evaluations(listed: Sequence[Mapping[str, Any]]) -> int:
    """How many there were in all: each one that is ``listed`` knows its number, counted from 1."""
    return int(listed[-1].get("number", len(listed))) if listed else 0


def with_evaluations(
    listed: tuple[Mapping[str, Any], ...], made: Iterable[Evaluation]
) -> tuple[Mapping[str, Any], ...]:
    """``listed`` with those that were ``made`` since, the newest `MOST_EVALUATIONS` of them."""
    for one in made:
        listed = (*listed, {**one.to_json(), "number": num_evaluations(listed) + 1})
    return listed[-MOST_EVALUATIONS:]


class EvaluationRound:
    """Hands the validation samples of a cut out in ranges and sums up the answers, each range once.

    The sums are made in position order, so the result does not depend on who answered first. Not thread-safe.
    """

    def __init__(self, version: int, *, num_samples: int, range_samples: int, now: float) -> None:
        self.version = version
        self.began = now
        self.progressed = now
        starts = range(0, num_samples, range_samples)
        self._waiting = [Microbatch(0, start, min(start + range_samples, num_samples)) for start in reversed(starts)]
        self._held: dict[str, set[Microbatch]] = {}
        self._answers: dict[Microbatch, Evaluated] = {}
        self._num_ranges = len(self._waiting)

    @property
    def complete(self) -> bool:
        """Every range has an answer."""
        return len(self._answers) == self._num_ranges

    def lease(self, worker: str, capacity: int) -> tuple[Microbatch, ...]:
        """Fill ``worker`` up to ``capacity`` ranges."""
        held = self._held.setdefault(worker, set())
        ranges = []
        while self._waiting and len(held) < capacity:
            one = self._waiting.pop()
            if one not in self._answers:
                held.add(one)
                ranges.append(one)
        return tuple(ranges)

    def answer(self, answer: Evaluated, now: float) -> bool:
        """A range is evaluated; False for a repeat and for another cut's."""
        where = Microbatch(0, answer.start, answer.stop)
        known = where in self._answers or any(where in held for held in self._held.values()) or where in self._waiting
        if answer.version != self.version or not known:
            return False
        for held in self._held.values():
            held.discard(where)
        if where in self._answers:
            return False
        self._answers[where] = answer
        self.progressed = now
        return True

    def give_back(self, worker: str, where: Microbatch) -> bool:
        """``worker`` does not evaluate this range after all; False when it does not hold it."""
        held = self._held.get(worker, set())
        if where not in held:
            return False
        held.remove(where)
        self._waiting.append(where)
        return True

    def lose(self, worker: str) -> None:
        """``worker`` is gone; its ranges go to others."""
        self._waiting.extend(sorted(self._held.pop(worker, set()), reverse=True))

    def result(self) -> dict[str, float]:
        """The mean of the loss, and of each metric, over what they count (samples or tokens)."""
        parts: defaultdict[str, list[Metric]] = defaultdict(list)
        for where in sorted(self._answers):
            answer = self._answers[where]
            parts["loss"].append(answer.loss)
            for metric in answer.metrics:
                parts[metric.name].append(metric)
        means = {}
        for name, metrics in parts.items():
            count = math.fsum(metric.count for metric in metrics)
            if count:
                means[name] = math.fsum(metric.total for metric in metrics) / count
        return means
