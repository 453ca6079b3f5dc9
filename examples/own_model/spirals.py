"""A model and data of one's own: which of three spiral arms does a point of the plane lie on?

`build` returns the model as an ordered list of modules, `points` a map-style dataset. Their arguments are keys of the
job file beside ``import:``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ARMS = 3


class Residual(nn.Module):
    """``[samples, width] -> [samples, width]``: a small correction of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        correction: Tensor = torch.relu(self.linear(self.norm(inputs)))
        return inputs + correction


def build(width: int, depth: int) -> list[nn.Module]:
    """The layers in order. Each is updated on its own; what one returns, the next one is called with."""
    return [nn.Linear(2, width), *(Residual(width) for _ in range(depth)), nn.Linear(width, ARMS)]


class Points:
    """Points with some noise; item ``i`` is a pair of input ``[2]`` and the number of its arm."""

    num_classes = ARMS

    def __init__(self, samples: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.arms = torch.arange(samples) % ARMS
        radius = torch.rand(samples, generator=generator).sqrt()
        angle = 2 * math.pi * (self.arms / ARMS + radius)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        self.points = points + noise * torch.randn(points.shape, generator=generator)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample."""
        return self.points[index], int(self.arms[index])


def points(samples: int, noise: float = 0.02) -> Points:
    """The data set; layerwise takes the validation part off it."""
    return Points(samples, noise)
