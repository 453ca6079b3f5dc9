"""Where a block computes, and how tensors get there and back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from layerwise.errors import ConfigError
from layerwise.messages import Tensors
from layerwise.tensors import to_host

_NOTHING = nullcontext()
_USED = ("Stream", "stream", "synchronize", "empty_cache", "current_device", "default_generators", "get_device_name")
"""What is used of torch's module of an accelerator, such as `torch.cuda`."""


def resolve_device(name: str) -> torch.device:
    """The device that ``--device`` names: "cpu", "cuda:N", "cuda", or "auto" (a GPU where there is one).

    Any accelerator will do that torch drives as it drives CUDA.

    Raises:
        ConfigError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and not all(hasattr(torch.get_device_module(accelerator), one) for one in _USED):
        accelerator = None
    if name == "auto":
        return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use auto, cpu or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 0
    index = device.index or 0
    if index >= count:
        raise ConfigError(
            f"--device {name}: this machine has {count or 'no'} {device.type.upper()} device{'s' if count != 1 else ''}"
        )
    return torch.device(device.type, index)


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

    def give_back(self) -> None:
        """Let other processes have what the device's allocator keeps without needing it."""


class InOrderTransfers(HostTransfers):
    """Moves tensors to and from an accelerator in the order in which this thread says so, without other streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def load(self, tensors: Tensors) -> Tensors:
        """Copied at its place among the device's work."""
        return Tensors(tuple(None if one is None else one.to(self.device) for one in tensors.items), tensors.single)

    def unload(self, tensors: Tensors) -> Tensors:
        """Copied once the work before it is done; waits for that."""
        return Tensors(tuple(None if one is None else to_host(one) for one in tensors.items), tensors.single)


class StreamTransfers(HostTransfers):
    """Moves tensors over a copy stream beside the block's compute stream, from and to pinned memory.

    All passes of a block compute on one stream, so what a layer's lock orders on the host happens in the same order
    on the device. Tensors that the passes replace are made on it too (`computing`): the allocator takes their memory
    back in the order of the stream that they were made on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._compute = self._module.Stream(device)
        self._copy = self._module.Stream(device)

    def load(self, tensors: Tensors) -> Tensors:
        """Copied without waiting for the device; the compute stream waits for the copy."""
        with self._module.stream(self._copy):
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
        with self._module.stream(self._copy):
            for one in tensors.items:
                if one is not None and one.device == self.device:
                    one.record_stream(self._copy)
            moved = tuple(None if one is None else to_host(one) for one in tensors.items)
        self._copy.synchronize()
        return Tensors(moved, tensors.single)

    def finish(self) -> None:
        """Wait until everything begun on the device is done."""
        self._module.synchronize(self.device)

    def give_back(self) -> None:
        """Empty the allocator's cache."""
        self._module.empty_cache()

    def computing(self) -> AbstractContextManager[object]:
        """Work of this thread goes to the block's compute stream."""
        return self._module.stream(self._compute)  # type: ignore[no-any-return]


def transfers(device: torch.device) -> HostTransfers:
    """What moves tensors to ``device`` and back while others compute."""
    return HostTransfers() if device.type == "cpu" else StreamTransfers(device)


def transfers_in_order(device: torch.device) -> HostTransfers:
    """The same for a single thread that does one thing after the other."""
    return HostTransfers() if device.type == "cpu" else InOrderTransfers(device)
