"""Compares a cut with the plain PyTorch loop, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.cuts import layer_files, load_manifest
from layerwise.data import load_dataset
from layerwise.errors import ConfigError
from layerwise.job import JobSpec
from layerwise.layer_file import load_layer
from layerwise.reference import train_reference
from layerwise.settings import ResolvedSettings, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where two states differ first: ``kind`` is "parameter", "buffer" or "moment".

    ``largest`` is the largest absolute difference.
    """

    kind: str
    name: str
    what: str
    num_different: int = 0
    largest: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """``difference`` is ``None`` when all ``num_tensors`` tensors of the cut equal the plain loop's."""

    version: int
    num_tensors: int
    num_elements: int
    difference: Difference | None

    @property
    def equal(self) -> bool:
        """Whether every bit is the same."""
        return self.difference is None


def updates_to_verify(spec: JobSpec, most: int, allowed_imports: Sequence[str] = ()) -> int:
    """``most``, or how many updates the job has if those are fewer. Loads the data of a job that is given in epochs.

    Raises:
        ConfigError, NotAllowedError: such a job's data can't be loaded, or contradicts its settings.
    """
    updates = spec.train.steps
    if updates is None:
        num_samples = len(load_dataset(spec.data, allowed_imports).train)
        updates = resolve(spec, num_samples, spec.cluster.shards).steps
    return min(updates, most)


def verify(
    spec: JobSpec,
    settings: ResolvedSettings,
    directory: str | Path,
    version: int,
    *,
    device: torch.device | None = None,
    allowed_imports: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Train the job's plain loop up to ``version`` and compare it with the cut in ``directory``.

    Use the number of torch threads that the shards used: sums of floating-point numbers depend on how they are split.

    Raises:
        ConfigError: the run was asynchronous with a window above 1, dropped samples or was rolled back, which is another
            computation than the plain loop's.
        NotFoundError, CorruptError: the cut is not there, or damaged.
    """
    if settings.mode == "asynchronous" and settings.window > 1:
        raise ConfigError(
            f"async.window: got {settings.window}, expected 1 (or mode: synchronous): only then a run equals a plain "
            f"PyTorch loop"
        )
    manifest = load_manifest(directory, version)
    dropped, rollbacks = manifest.get("ledger", {}).get("dropped", ()), manifest.get("rollbacks", ())
    if dropped or rollbacks:
        num_dropped = manifest["ledger"].get("num_dropped", len(dropped)) if dropped else 0
        what = f"{num_dropped} microbatches were dropped" if dropped else "training was rolled back"
        raise ConfigError(
            f"{directory} can't be compared with a plain PyTorch loop: {what}; `layerwise audit` checks it"
        )
    saved = cut_state(directory, version)
    loop = train_reference(
        spec, settings, updates=version, device=device, allowed_imports=allowed_imports, progress=progress
    )
    expected = {name: tensor.cpu() for name, tensor in loop.state().items()}
    return Verification(
        version=version,
        num_tensors=len(saved),
        num_elements=sum(tensor.numel() for tensor in saved.values()),
        difference=first_difference(saved, expected),
    )


def cut_state(directory: str | Path, version: int) -> dict[str, torch.Tensor]:
    """All tensors of a cut as ``parameter:<layer>.<name>``, ``buffer:...``, ``moment:...``, in the order of layers."""
    found: dict[str, torch.Tensor] = {}
    for file in layer_files(load_manifest(directory, version)):
        copy = load_layer(directory, version, file)
        for kind, group in (("parameter", copy.parameters), ("buffer", copy.buffers), ("moment", copy.moments)):
            found.update({f"{kind}:{file.layer}.{name}": tensor for name, tensor in group.items()})
    return found


def first_difference(saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Difference | None:
    """The first tensor, in the order of ``saved``, whose bits differ, or that only one side has."""
    for full, tensor in saved.items():
        kind, _, name = full.partition(":")
        other = expected.get(full)
        if other is None:
            return Difference(kind=kind, name=name, what="the run has it, the plain loop does not")
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return Difference(
                kind=kind,
                name=name,
                what=f"{tensor.dtype}{list(tensor.shape)} in the run, {other.dtype}{list(other.shape)} in the plain loop",
            )
        different = _bits(tensor) != _bits(other)
        if bool(different.any()):
            number = int(different.sum())
            largest = float((tensor.double() - other.double()).abs().max())
            return Difference(
                kind=kind,
                name=name,
                what=f"{number} of {tensor.numel()} elements differ, by at most {largest:g}",
                num_different=number,
                largest=largest,
            )
    for full in expected:
        if full not in saved:
            kind, _, name = full.partition(":")
            return Difference(kind=kind, name=name, what="the plain loop has it, the run does not")
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers: -0.0 is not 0.0 here, and a NaN equals itself."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(sizes[flat.element_size()]) if flat.element_size() in sizes else flat
