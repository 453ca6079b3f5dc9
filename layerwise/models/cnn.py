"""Plain convolutional network: every convolution with what follows it is one layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from layerwise.optimizers import leave_to_adam
from layerwise.sections import Cnn

LARGEST_HEAD_GRID = 4
"""The head averages larger feature maps down to this many rows and columns."""


class CnnHidden(nn.Module):
    """``[samples, channels, height, width]``: 3x3 convolution, batch norm, ReLU, 2x2 max pooling, dropout."""

    def __init__(self, before: int, channels: int, *, pool: bool, spec: Cnn) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, channels, kernel_size=3, padding=1, bias=not spec.batchnorm)
        self.norm = nn.BatchNorm2d(channels) if spec.batchnorm else None
        self.pool = pool
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        hidden: Tensor = self.convolution(inputs)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = functional.relu(hidden)
        if self.pool:
            hidden = functional.max_pool2d(hidden, 2)
        outputs: Tensor = self.dropout(hidden)
        return outputs


class CnnHead(nn.Module):
    """``[samples, channels, height, width] -> [samples, outputs]``: average down to a small grid, flatten, linear."""

    def __init__(self, channels: int, height: int, width: int, outputs: int) -> None:
        super().__init__()
        self.grid = (min(height, LARGEST_HEAD_GRID), min(width, LARGEST_HEAD_GRID))
        self.linear = nn.Linear(channels * self.grid[0] * self.grid[1], outputs)
        leave_to_adam(self.linear.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        hidden = inputs
        if hidden.shape[-2:] != self.grid:
            hidden = functional.adaptive_avg_pool2d(hidden, self.grid)
        outputs: Tensor = self.linear(hidden.flatten(1))
        return outputs


def build_cnn(spec: Cnn, image: tuple[int, int, int], outputs: int) -> list[nn.Module]:
    """One layer for each entry of ``spec.channels``, and the head; ``image`` is channels, height, width."""
    before, height, width = image
    layers: list[nn.Module] = []
    for channels in spec.channels:
        pool = min(height, width) >= 2
        layers.append(CnnHidden(before, channels, pool=pool, spec=spec))
        before = channels
        if pool:
            height, width = height // 2, width // 2
    leave_to_adam(*(parameter for parameter in layers[0].parameters() if parameter.ndim > 1))
    return [*layers, CnnHead(before, height, width, outputs)]
