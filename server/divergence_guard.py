"""Does training diverge? A pure judge of the loss, update by update.

The level of the loss is an exponential average, and beside it a median of the last updates, which a single hard batch
does not move. Both must have risen for the guard to trip; how far, is measured against the best average, the loss at
the start, and the noise of the losses themselves::

    loss at the start ──┐
                         ╲__                              ┌─ "risen": above 1.5 x the best, above the best by a quarter of
                            ╲___      ____________________│   what was gained since the start, and by 10 standard errors
                                ╲____╱ ◄── the rise begins
                             best ┘     a cut from before it, by the length of the average, is good

Losses that are thrown about after a collapse are their own noise, and one out of all proportion is that for long. So it also counts
when they stay far above the start: several times it, and by 5 standard errors of what is usual now.

Two stalls count as well: the loss is nearly back where it started, and stays there; or it never came below that, and is above it.
Where it blew up within the first updates, those are no start to compare with: once something must have been learned, a loss that is
several times the first two, was never below them, and is beyond its noise, counts too.
Where to trip costs little, it is enough that the loss stays near where it started, long after the beginning or soon after the window
was opened again.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

RISE = 1.5
"""The average may be so many times its best."""
GAIN = 0.25
"""Part of what was gained since the start that may be lost again."""
STANDARD_ERRORS = 10.0
"""Of the average; noise alone does not take it so far from its best."""
BLOWN_UP = 100.0
"""Times the very first loss: two of the next few that are above that are no noise."""
FAR = 3.0
"""Times the loss at the start."""
FAR_ERRORS = 5.0
"""Standard errors above it."""
EARLY_STEPS = 1.5
"""Standard deviations of a single loss: two of the first ones that are lower by that are no luck."""
MIDDLE_STEP = 0.954
"""Median of the distance between two draws of one normal distribution, in its standard deviations."""
LEARNED = 0.9
"""An average below this part of the loss at the start has learned something."""
BACK = 0.75
"""This part of what was gained is lost: "back where it started"."""
NEVER = 0.98
"""An average that never came below this part of the loss at the start has learned nothing."""
NEVER_ERRORS = 5.0
"""Standard errors above the loss at the start, of both: more than an unlucky beginning."""
LEAST_UPDATES_TO_LEARN = 200
EAGER_UPDATES_TO_LEARN = 100
SHARE_TO_LEARN = 0.25
"""Part of the run (and at least the number above) after which something must have been learned."""
FIRST_UPDATES = 5
STREAK = 3
BEGINNING = 1.1
"""The rise began when the average was last so many times its best."""
SHORTEST, LONGEST = 10, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Why the guard tripped at ``version``; what was learned up to ``good_version`` is not spoilt yet."""

    version: int
    good_version: int
    why: str


class DivergenceGuard:
    """Watches one run of ``num_updates`` updates. Not thread-safe.

    ``can_stall`` false: only a rise trips it, or ``most_not_finite`` losses in a row that are not finite. With ``warmup``
    updates nothing need be learned before they are over. ``eager``: to trip costs little. ``first`` is the loss at the very
    start, where that was before this guard began; ``good_version`` what is not spoilt as far as is known.
    """

    def __init__(
        self,
        num_updates: int,
        *,
        warmup: int = 0,
        can_stall: bool = True,
        eager: bool = False,
        most_not_finite: int = 8,
        first: float | None = None,
        good_version: int = 0,
    ) -> None:
        self.span = min(max(num_updates // 20, SHORTEST), LONGEST)
        """The averages reach back about so many updates."""
        share = int(SHARE_TO_LEARN * num_updates)
        self._to_learn = warmup + max(LEAST_UPDATES_TO_LEARN, share)
        self._can_stall = can_stall
        self._most_not_finite = most_not_finite
        self._decay = 1 - 1 / self.span
        self._slow_decay = 1 - 1 / (8 * self.span)
        self.first = first
        """The loss at the very start, once it is known."""
        # From the first version on a loss near the one at the start is a stall, and what was before the second is good.
        self._calm_version = good_version + self.span
        self._wary = (warmup + max(EAGER_UPDATES_TO_LEARN, share), 0) if eager else None
        self._gathered: tuple[int, float, float] | None = None
        self._not_finite = 0
        self.restart()

    def restart(self, version: int | None = None) -> None:
        """Layers were set back, all of them to ``version`` (or only some): the average begins anew.

        What the loss was at the very start is still known, and that cuts from before were good.
        """
        self._count = 0
        self._opening: list[float] = []
        self._recent: deque[float] = deque(maxlen=self.span)
        self._sum = self._weight = 0.0
        self._square = self._square_weight = 0.0
        self._best = math.inf
        self._risen = self._far = self._back = self._near = self._lost = 0
        if version is not None:
            self._calm_version = min(self._calm_version, version + self.span)
        self._gathered = None
        self._not_finite = 0

    def be_wary(self, version: int) -> None:
        """Training was rolled back; from ``version`` on it is asynchronous again."""
        self._wary = (version, version)

    @property
    def average(self) -> float | None:
        """The exponential average; None before the first update."""
        return self._sum / self._weight if self._weight else None

    @property
    def best(self) -> float | None:
        """The lowest average so far; None in the first updates, where it means nothing."""
        return self._best if math.isfinite(self._best) else None

    def good_version(self, version: int) -> int:
        """Up to where nothing was spoilt, if a divergence showed at ``version``: an average shows it late."""
        calm = self.best is not None and not self._rising()
        return max((max(version, self._calm_version) if calm else self._calm_version) - self.span, 0)

    def add(self, update: int, loss: float, num_samples: int) -> Divergence | None:
        """A microbatch was taken into ``update`` (about) with this mean loss; says when the guard trips."""
        if not math.isfinite(loss):
            self._not_finite += 1
            if self._not_finite < self._most_not_finite:
                return None
            return self._divergence(update, f"the losses of {self._not_finite} microbatches in a row are not finite")
        self._not_finite = 0
        gathered = self._gathered
        if gathered is not None and gathered[0] == update:
            self._gathered = (update, gathered[1] + num_samples * loss, gathered[2] + num_samples)
            return None
        self._gathered = (update, num_samples * loss, float(num_samples))
        return None if gathered is None else self._take(gathered[0] + 1, gathered[1] / gathered[2])

    def _take(self, version: int, loss: float) -> Divergence | None:
        """The update that made ``version`` is complete."""
        if self._recent:
            step = loss - self._recent[-1]
            self._square = self._slow_decay * self._square + step * step / 2
            self._square_weight = self._slow_decay * self._square_weight + 1
        self._recent.append(loss)
        self._sum = self._decay * self._sum + loss
        self._weight = self._decay * self._weight + 1
        self._count += 1
        if self._count <= FIRST_UPDATES:
            self._opening.append(loss)
            if self._count == FIRST_UPDATES:
                opening = self._start()
                self.first = opening if self.first is None else self.first
                self._best = min(opening, self.first)
            return None
        if self._count < self.span:
            return self._judge(version)
        self._best = min(self._best, self._sum / self._weight)
        return self._judge(version)

    def _start(self) -> float:
        """The loss at the start: a mean of the first ones, unless they have blown up already."""
        opening = self._opening
        if sorted(opening)[-2] > BLOWN_UP * abs(opening[0]):
            return 2 * abs(opening[0])
        return min(sum(opening) / len(opening), RISE * median(opening))

    def _rising(self) -> bool:
        average = self.average
        return average is not None and average > BEGINNING * self._best

    def _judge(self, version: int) -> Divergence | None:
        assert self.first is not None
        average, middle = self._sum / self._weight, median(self._recent)
        level = min(average, middle)
        if not self._rising():
            self._calm_version = max(version, self._calm_version)
        variance = self._square / self._square_weight
        beyond_noise = self._best + STANDARD_ERRORS * math.sqrt(variance / (2 * self.span - 1))
        risen = level > max(RISE * self._best, self._best + GAIN * (self.first - self._best), beyond_noise)
        self._risen = self._risen + 1 if risen else 0
        if self._risen >= STREAK:
            what = f"the loss, on average {average:.4g}, rose above {RISE:g} times its best of {self._best:.4g}"
            return self._divergence(version, what)
        far = level > max(FAR * self.first, self.first + FAR_ERRORS * self._usual_error())
        self._far = self._far + 1 if far else 0
        if self._far >= self.span:
            what = f"the loss, on average {average:.4g}, stays far above the {self.first:.4g} that it started with"
            return self._divergence(version, what)
        if not self._can_stall:
            return None
        if self._wary is not None and version > self._wary[0] + self.span:
            self._near = self._near + 1 if level > LEARNED * self.first else 0
            if self._near >= 2 * self.span:
                what = f"the loss, on average {average:.4g}, stays near the {self.first:.4g} that it started with"
                return Divergence(version=version, good_version=self._wary[1], why=what)
        most_lost = self._best + BACK * (self.first - self._best)
        back = self._best < LEARNED * self.first and level > max(most_lost, beyond_noise)
        self._back = self._back + 1 if back else 0
        if self._back >= 2 * self.span:
            what = f"the loss, on average {average:.4g}, is back where it started, after a best of {self._best:.4g}"
            return self._divergence(version, what)
        lost = level > max(FAR * self._early, self._early + EARLY_STEPS * self._usual_step())
        self._lost = self._lost + 1 if lost and self._best > self._early else 0
        if self._lost >= STREAK and self._count >= self._to_learn:
            what = (
                f"the loss, on average {average:.4g}, stays far above the {self._early:.4g} of the very first updates"
            )
            return Divergence(version=version, good_version=0, why=what)
        if self._count == self._to_learn and self._best >= NEVER * self.first:
            error = math.sqrt(variance * (1 / FIRST_UPDATES + 1 / (2 * self.span - 1)))
            if level <= self.first + NEVER_ERRORS * error:
                return None
            what = f"the loss, on average {average:.4g}, never came below the {self.first:.4g} that it started with"
            return Divergence(version=version, good_version=0, why=what)
        return None

    @property
    def _early(self) -> float:
        """The higher one of the first two losses: these are from before most of what a learning rate can do."""
        return max(self._opening[:2])

    def _usual_error(self) -> float:
        """Standard error of the average."""
        return self._usual_step() / math.sqrt(2 * self.span - 1)

    def _usual_step(self) -> float:
        """Standard deviation of a loss, as the middle one of the last steps has it: one that is out of all proportion changes nothing."""
        steps = [abs(later - earlier) for earlier, later in pairwise(self._recent)]
        return median(steps) / MIDDLE_STEP if steps else math.inf

    def _divergence(self, version: int, why: str) -> Divergence:
        return Divergence(version=version, good_version=self.good_version(version), why=why)
