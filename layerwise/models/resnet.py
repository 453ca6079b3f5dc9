"""Residual networks with basic blocks (He et al., 2015); stem, residual blocks and head are a layer each."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from layerwise.optimizers import leave_to_adam
from layerwise.sections import Resnet

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class ResnetStem(nn.Module):
    """First convolution: 7x7, stride 2 and max pooling for ImageNet; 3x3 and nothing else for CIFAR's small images."""

    def __init__(self, channels: int, width: int, *, small: bool) -> None:
        super().__init__()
        self.small = small
        self.convolution = (
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
            if small
            else nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        )
        self.norm = nn.BatchNorm2d(width)
        leave_to_adam(self.convolution.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[samples, channels, height, width]`` to ``width`` channels, a quarter of the size unless ``small``."""
        hidden = functional.relu(self.norm(self.convolution(inputs)))
        return hidden if self.small else functional.max_pool2d(hidden, kernel_size=3, stride=2, padding=1)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(before, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
            if stride != 1 or before != channels
            else nn.Identity()
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """``[samples, before, height, width]`` to ``channels`` channels, both sides divided by ``stride``."""
        hidden = functional.relu(self.first_norm(self.first(inputs)))
        hidden = self.second_norm(self.second(hidden))
        return functional.relu(hidden + self.shortcut(inputs))


class ResnetHead(nn.Module):
    """Average over the image and one linear map: ``[samples, channels, height, width] -> [samples, outputs]``."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)
        leave_to_adam(self.linear.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        outputs: Tensor = self.linear(inputs.mean(dim=(2, 3)))
        return outputs


def build_resnet(spec: Resnet, channels: int, outputs: int) -> list[nn.Module]:
    """Stem, 8 (depth 18) or 16 (depth 34) blocks, head."""
    layers: list[nn.Module] = [ResnetStem(channels, spec.width, small=spec.stem == "cifar")]
    before = spec.width
    for stage, number in enumerate(BLOCKS[spec.depth]):
        for position in range(number):
            layers.append(ResnetBlock(before, spec.width << stage, stride=2 if stage > 0 and position == 0 else 1))
            before = spec.width << stage
    layers.append(ResnetHead(before, outputs))
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return layers
