"""On what a block is computed: all that decides about the last bits of floating-point results."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Processor, software and number of threads.

    ``instructions`` is the instruction set that torch chose its kernels for. ``device`` is "cpu" or the name of a GPU;
    ``precision`` that of the job.
    """

    processor: str
    instructions: str
    torch: str
    threads: int
    device: str
    precision: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for the event log's header."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Machine:
        """The inverse of `to_json`; ``TypeError`` or ``ValueError`` for anything else."""
        found = cls(**value)
        texts = (found.processor, found.instructions, found.torch, found.device, found.precision)
        if any(type(one) is not str for one in texts) or type(found.threads) is not int:
            raise ValueError(f"not a machine: {value!r}")
        return found

    def differences(self, other: Machine) -> tuple[str, ...]:
        """In what ``other`` differs from this one, in words."""
        here, there = asdict(self), asdict(other)
        return tuple(
            f"{name}: {here[name]} was recorded, here is {there[name]}" for name in here if here[name] != there[name]
        )


def this_machine(device: torch.device, precision: str) -> Machine:
    """What this process computes on."""
    import torch

    return Machine(
        processor=processor_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        device=device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        precision=precision,
    )


def processor_name(described: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        for line in described.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.machine()
