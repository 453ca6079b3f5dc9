"""Models, data and a loss as users write them, for jobs that import them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Split(nn.Module):
    """One tensor in, a tuple out; no parameters."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of the features."""
        flat = inputs.flatten(1)
        half = flat.shape[1] // 2
        return flat[:, :half], flat[:, half:]


class Pair(nn.Module):
    """A tuple in and out; one half frozen, a 0-d parameter, an integer buffer."""

    def __init__(self, left: int, right: int, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(left, width)
        self.right = nn.Linear(right, width).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Each half through its map."""
        if self.training:
            self.calls += 1
        left, right = both
        return torch.tanh(self.left(left)) * self.scale, torch.tanh(self.right(right))


class Join(nn.Module):
    """A tuple in, one tensor out; no parameters."""

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        """Side by side."""
        return torch.cat(both, dim=1)


class Frozen(nn.Module):
    """A layer that has parameters and trains none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The map and its input."""
        return inputs + torch.relu(self.linear(inputs))


def tuples(features: int, width: int, outputs: int) -> list[nn.Module]:
    """Layers that pass tuples on, with a frozen layer and two without parameters among them."""
    half = features // 2
    return [
        Split(),
        Pair(half, features - half, width),
        Pair(width, width, width),
        Join(),
        Frozen(2 * width),
        nn.Dropout(0.1),
        nn.Linear(2 * width, outputs),
    ]


def frozen_below(features: int, width: int, outputs: int) -> list[nn.Module]:
    """A model whose lowest layers are frozen, as in fine-tuning; more than one block of them."""
    lower = [nn.Flatten(), nn.Linear(features, width).requires_grad_(False), Frozen(width), Frozen(width)]
    return [*lower, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]


def misfits() -> list[nn.Module]:
    """The second layer takes 8 features, the first gives 12."""
    return [nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(8, 4)]


class Shared(nn.Module):
    """A linear map whose weight may be somebody else's too."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Times the weight."""
        return torch.tanh(inputs.flatten(1) @ self.weight)


def shared(width: int, between: int) -> list[nn.Module]:
    """The first and the last hidden layer share a weight, with ``between`` costly layers in the middle."""
    weight = nn.Parameter(torch.eye(width))
    middle = [nn.Linear(width, width) for _ in range(between)]
    return [Shared(weight), *middle, Shared(weight), nn.Linear(width, 4)]


class BecomesNan(nn.Module):
    """Linear, until the given update; then its outputs are no numbers."""

    def __init__(self, width: int, update: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.update = update
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Counts its calls in a buffer."""
        outputs: Tensor = self.linear(inputs)
        if self.training:
            self.calls += 1
        return outputs * torch.where(self.calls > self.update, float("nan"), 1.0)


def becomes_nan(calls: int) -> list[nn.Module]:
    """The layer at index 2 gives no numbers after ``calls`` microbatches."""
    return [nn.Flatten(), nn.Linear(64, 8), BecomesNan(8, calls), nn.ReLU(), nn.Linear(8, 4)]


class _Slope(torch.autograd.Function):
    """What it is given, with a slope of its own."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, slope: float) -> Tensor:
        """The same."""
        ctx.slope = slope
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Times the slope."""
        return gradients[0] * ctx.slope, None


class BecomesSteep(nn.Module):
    """Linear; from the given microbatch on its gradients are infinite, its outputs never."""

    def __init__(self, width: int, calls: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.most = calls
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Counts its calls in a buffer."""
        if self.training:
            self.calls += 1
        outputs: Tensor = _Slope.apply(self.linear(inputs), float("inf") if self.calls >= self.most else 1.0)
        return outputs


def becomes_steep(calls: int, classes: int = 4) -> list[nn.Module]:
    """The layer at index 2 is infinitely steep from microbatch ``calls`` on, counted from 1."""
    return [nn.Flatten(), nn.Linear(64, 8), BecomesSteep(8, calls), nn.Tanh(), nn.Linear(8, classes)]


class Ramp:
    """A map-style dataset: 64 numbers that name their class."""

    num_classes = 4

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        """How many there are."""
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One input of 64 features and its class."""
        label = index % 4
        generator = torch.Generator().manual_seed(index)
        return torch.randn(64, generator=generator) + label, label


def ramp(samples: int, validation_samples: int) -> tuple[Ramp, Ramp]:
    """Training and validation data."""
    return Ramp(samples), Ramp(validation_samples)


def smooth_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of the user's own."""
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2)


class Gated(Ramp):
    """Gives ``free`` samples in this process before each of ``gates``, FIFOs; there it waits until the FIFO is gone or closed.

    One goes to layerwise itself, which looks at what samples are like.
    """

    def __init__(self, samples: int, gates: list[str], free: int) -> None:
        super().__init__(samples)
        self.gates = list(gates)
        self.free = self.left = free

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """See `Ramp`."""
        while self.left == 0 and self.gates:
            with suppress(FileNotFoundError):
                Path(self.gates[0]).read_bytes()
            del self.gates[0]
            self.left = self.free
        self.left = max(self.left - 1, 0)
        return super().__getitem__(index)


def gated(samples: int, validation_samples: int, gates: list[str], free: int) -> tuple[Gated, Ramp]:
    """Training data behind gates, and validation data."""
    return Gated(samples, gates, free), Ramp(validation_samples)


class Flawed(Ramp):
    """One sample can't be read, and one has no numbers in it."""

    def __init__(self, samples: int, torn: int, empty: int) -> None:
        super().__init__(samples)
        self.torn = torn
        self.empty = empty

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """See `Ramp`."""
        if index == self.torn:
            raise OSError(f"the file of sample {index} is torn")
        inputs, label = super().__getitem__(index)
        return (inputs * float("nan") if index == self.empty else inputs), label


def flawed(samples: int, validation_samples: int, torn: int, empty: int) -> tuple[Flawed, Ramp]:
    """Training data with two bad samples, and validation data without."""
    return Flawed(samples, torn, empty), Ramp(validation_samples)


class Hungry(nn.Module):
    """Linear; where the file ``once`` is, its forward pass takes it away and asks for more memory than there is."""

    def __init__(self, width: int, once: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.once = Path(once)

    def forward(self, inputs: Tensor) -> Tensor:
        """The map of the inputs."""
        if self.once.exists():
            self.once.unlink()
            torch.empty(1 << 62, dtype=torch.uint8)
        outputs: Tensor = self.linear(inputs)
        return outputs


def hungry(once: str) -> list[nn.Module]:
    """The layer at index 2 runs out of memory once the file ``once`` is there."""
    return [nn.Flatten(), nn.Linear(64, 8), Hungry(8, once), nn.ReLU(), nn.Linear(8, 4)]
