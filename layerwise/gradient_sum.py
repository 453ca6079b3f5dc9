"""The gradients of one update, added up: sum of n_i g_i, divided by the sum of n_i."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Gradients = Sequence[torch.Tensor | None]
"""One layer's gradients in the order of its trainable parameters; ``None`` where the microbatch gave none."""


class GradientSum:
    """Adds microbatches' mean gradients, each weighted by its samples, in the order of the calls.

    A lone gradient is used as it came: 3g/3 is not g in floating point. ``None`` stays ``None`` until some microbatch
    gives a gradient. Gradients handed in are never written to: autograd may have given the same memory to somebody
    else.
    """

    def __init__(self, num_parameters: int) -> None:
        self._num_parameters = num_parameters
        self.clear()

    def clear(self) -> None:
        """Begin the next update."""
        self._first: tuple[Gradients, int] | None = None
        self._total: list[torch.Tensor | None] = []

    def add(self, gradients: Gradients, num_samples: int) -> None:
        """Add one microbatch's gradients, the mean over its ``num_samples`` samples."""
        if self._first is None and not self._total:
            self._first = (gradients, num_samples)
            return
        if self._first is not None:
            first, samples = self._first
            self._first = None
            self._total = [None if one is None else one * samples for one in first]
        for position, gradient in enumerate(gradients):
            total = self._total[position]
            if gradient is None:
                continue
            if total is None:
                self._total[position] = gradient * num_samples
            else:
                total.add_(gradient, alpha=num_samples)

    def mean(self, samples: int) -> list[torch.Tensor | None]:
        """The gradients to step with; ``samples`` is what the sum is divided by. The caller may not write to them."""
        if self._first is not None:
            return list(self._first[0])
        for total in self._total:
            if total is not None:
                total.div_(samples)
        return self._total or [None] * self._num_parameters


def first_not_finite(gradients: Mapping[str, torch.Tensor | None]) -> str | None:
    """The name of the first gradient with a value that is not finite; ``None``: there is none.

    One value that is not finite makes a sum so, and a sum costs a hundredth of a step; each element is looked at only
    when a sum is not finite, which finite values can also make by an overflow.
    """
    totals = [one.sum() for one in gradients.values() if one is not None]
    if not totals or torch.isfinite(sum(totals[1:], totals[0])):
        return None
    for name, gradient in gradients.items():
        if gradient is not None and not torch.isfinite(gradient).all():
            return name
    return None
