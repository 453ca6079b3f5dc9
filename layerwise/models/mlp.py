"""Multi-layer perceptron: every linear map with what follows it is one layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from layerwise.optimizers import leave_to_adam
from layerwise.sections import Mlp

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}


class MlpHidden(nn.Module):
    """``[samples, ...] -> [samples, width]``: flatten, linear, batch norm if asked for, activation, dropout."""

    def __init__(self, features: int, width: int, spec: Mlp) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.norm = nn.BatchNorm1d(width) if spec.batchnorm else None
        self.activation = spec.activation
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        hidden: Tensor = self.linear(inputs.flatten(1))
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = ACTIVATIONS[self.activation](hidden)
        outputs: Tensor = self.dropout(hidden)
        return outputs


class MlpHead(nn.Module):
    """``[samples, ...] -> [samples, outputs]``: flatten, linear."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs)
        leave_to_adam(self.linear.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        outputs: Tensor = self.linear(inputs.flatten(1))
        return outputs


def build_mlp(spec: Mlp, features: int, outputs: int) -> list[nn.Module]:
    """One layer for each hidden width, and the head."""
    widths = (features, *spec.hidden)
    hidden = [MlpHidden(before, width, spec) for before, width in zip(widths, spec.hidden, strict=False)]
    return [*hidden, MlpHead(widths[-1], outputs)]
