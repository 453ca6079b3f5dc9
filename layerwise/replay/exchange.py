"""What the blocks of a replayed run hand to each other, in place of links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import NamedTensors, Tensors
from layerwise.tensors import tensor_from_bytes, tensor_to_bytes

Samples = Callable[[Microbatch], tuple[Tensors, Tensors]]
"""Inputs and targets of a microbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """What a block gets of a forward pass; ``needed_from`` is the lowest layer so far that lacks the microbatch."""

    inputs: Tensors
    targets: Tensors
    needed_from: int


class Exchange:
    """Outputs on their way up and gradients on their way down, each kept until it is used.

    A boundary between blocks is named by the first layer above it. What was handed over for an attempt that nobody goes
    on with is forgotten when the receiver begins a later attempt at the same microbatch, or when all blocks begin anew.
    """

    def __init__(self, samples: Samples, *, num_layers: int) -> None:
        self._samples = samples
        self._num_layers = num_layers
        self._forwards: dict[int, dict[Attempt, Handed]] = {}
        self._gradients: dict[int, dict[Attempt, Tensors]] = {}

    def waiting(self, boundary: int) -> int:
        """Outputs that wait at ``boundary``."""
        return len(self._forwards.get(boundary, {}))

    def put_forward(self, boundary: int, attempt: Attempt, handed: Handed) -> None:
        """The block below ``boundary`` has run its forward pass."""
        self._forwards.setdefault(boundary, {})[attempt] = handed

    def take_forward(self, boundary: int, attempt: Attempt) -> Handed | None:
        """What the block above ``boundary`` begins with; ``None`` while it is not there."""
        if boundary == 0:
            inputs, targets = self._samples(attempt.microbatch)
            return Handed(inputs=travelled(inputs), targets=travelled(targets), needed_from=self._num_layers)
        handed = self._forwards.get(boundary, {}).pop(attempt, None)
        if handed is not None:
            _forget_older(self._forwards[boundary], attempt)
        return handed

    def begin(self, top: int, attempt: Attempt) -> None:
        """The block that ends below ``top`` begins ``attempt``: gradients that are there already are not for it."""
        _forget_older(self._gradients.get(top, {}), attempt)
        self.drop_gradient(top, attempt)

    def put_gradient(self, boundary: int, attempt: Attempt, gradients: Tensors) -> None:
        """The block above ``boundary`` has finished its backward pass."""
        self._gradients.setdefault(boundary, {})[attempt] = gradients

    def gradient(self, boundary: int, attempt: Attempt) -> Tensors | None:
        """What the backward pass of the block below ``boundary`` begins with; ``None`` while it is not there."""
        return self._gradients.get(boundary, {}).get(attempt)

    def drop_gradient(self, boundary: int, attempt: Attempt) -> None:
        """It was used."""
        self._gradients.get(boundary, {}).pop(attempt, None)

    def clear(self) -> None:
        """All blocks begin anew: nothing is on its way."""
        self._forwards.clear()
        self._gradients.clear()


def _forget_older(waiting: dict[Attempt, Handed] | dict[Attempt, Tensors], attempt: Attempt) -> None:
    for other in [one for one in waiting if one.microbatch == attempt.microbatch and one.attempt < attempt.attempt]:
        del waiting[other]


def travelled(tensors: Tensors) -> Tensors:
    """``tensors`` as they arrive after a journey: alone in their memory, dense, with the strides that travel."""
    return Tensors(tuple(_travelled(one) for one in tensors.items), tensors.single)


def travelled_by_name(named: NamedTensors) -> NamedTensors:
    """The same for named tensors."""
    return NamedTensors(named.names, tuple(_travelled(one) for one in named.items))


def _travelled(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    header, data = tensor_to_bytes(tensor)
    arrived = torch.empty(header.num_bytes, dtype=torch.uint8).numpy()
    arrived[:] = data
    return tensor_from_bytes(header, arrived)
