"""Where a block computes, and how tensors get there and back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from layerwise.errors import ConfigError
from layerwise.messages import Tensors
from layerwise.tensors import to_host

_NOTHING = nullcontext()


def resolve_device(name: str) -> torch.device:
    """The device that ``--device`` names: "cpu", "cuda:N", "cuda", or "auto" (a GPU where there is one).

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use auto, cpu or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"--device {name}: use auto, cpu or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise ConfigError(f"--device {name}: this machine has {count or 'no'} CUDA device{'s' if count != 1 else ''}")
    return torch.device("cuda", index)


class HostTransfers:
    """Moves tensors between the host, where they travel, and the host, where they are used: nothing to do."""

    device = torch.device("cpu")

    def load(self, tensors: Tensors) -> Tensors:
        """``tensors`` on the device."""
        return tensors

    def unload(self, tensors: Tensors) -> Tensors:
        """``tensors`` in host memory, complete."""
        return tensors

    def finish(self) -> None:
        """Wait until everything begun on the device is done, so that other threads and streams may read it."""

    def computing(self) -> AbstractContextManager[object]:
        """The context that a pass runs in."""
        return _NOTHING


class CudaTransfers(HostTransfers):
    """Moves tensors over a copy stream beside the block's compute stream, from and to pinned memory.

    All passes of a block compute on one stream, so what a layer's lock orders on the host happens in the same order
    on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load(self, tensors: Tensors) -> Tensors:
        """Copied without waiting for the device; the compute stream waits for the copy."""
        with torch.cuda.stream(self._copy):
            moved = tuple(None if one is None else self._load(one) for one in tensors.items)
        self._compute.wait_stream(self._copy)
        return Tensors(moved, tensors.single)

    def _load(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        moved = pinned.to(self.device, non_blocking=True)
        moved.record_stream(self._compute)
        return moved

    def unload(self, tensors: Tensors) -> Tensors:
        """Copied into pinned memory; waits for these copies only."""
        self._copy.wait_stream(self._compute)
        with torch.cuda.stream(self._copy):
            for one in tensors.items:
                if one is not None and one.device.type == "cuda":
                    one.record_stream(self._copy)
            moved = tuple(None if one is None else to_host(one) for one in tensors.items)
        self._copy.synchronize()
        return Tensors(moved, tensors.single)

    def finish(self) -> None:
        """Wait until everything begun on the device is done."""
        torch.cuda.synchronize(self.device)

    def computing(self) -> AbstractContextManager[object]:
        """Work of this thread goes to the block's compute stream."""
        return torch.cuda.stream(self._compute)


def transfers(device: torch.device) -> HostTransfers:
    """What moves tensors to ``device`` and back."""
    return CudaTransfers(device) if device.type == "cuda" else HostTransfers()
