"""What a replay builds blocks from: the job as its cuts tell it, its model, its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerwise.assembly import assemble, foreign_parameters
from layerwise.build import build_modules, training_of
from layerwise.cut_shelf import CutShelf
from layerwise.cuts import durable_cuts, layer_files, load_manifest
from layerwise.data import TrainingData, load_dataset
from layerwise.device import transfers_in_order
from layerwise.errors import CorruptError, NotFoundError
from layerwise.events import WeightMode
from layerwise.head import JobHead, job_head
from layerwise.ids import Microbatch
from layerwise.job import JobSpec, parse_job
from layerwise.layer import LayerCopy
from layerwise.layer_file import load_layer
from layerwise.layer_ledger import LedgerState
from layerwise.log_header import LogHeader
from layerwise.messages import LayerFile, Tensors
from layerwise.profile import Profile
from layerwise.replay.life_index import Owners
from layerwise.replay.recorded_block import EmittedEvents, RecordedBlock
from layerwise.settings import ResolvedSettings


class _Unheard:
    """Nobody waits for cuts here."""

    def cut_taken(self, version: int) -> None:
        """See `layerwise.cut_shelf.CutEvents`."""

    def cut_saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        """See `layerwise.cut_shelf.CutEvents`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedJob:
    """A job's definition and its directory. ``saved`` are the versions of the cuts that lie there."""

    directory: Path
    manifest: dict[str, Any]
    spec: JobSpec
    settings: ResolvedSettings
    profile: Profile
    data: TrainingData
    head: JobHead
    owners: Owners
    saved: tuple[int, ...]
    allowed_imports: tuple[str, ...]

    def samples(self, microbatch: Microbatch) -> tuple[Tensors, Tensors]:
        """Inputs and targets, as a forward worker loads them."""
        inputs, targets = self.data.training_batch(self.spec.train.seed, microbatch)
        return _tensors(inputs), _tensors(targets)

    def build(
        self, header: LogHeader, copies: Sequence[LayerCopy] | None, *, inside: bool, device: torch.device
    ) -> tuple[RecordedBlock, EmittedEvents]:
        """A block as ``header``'s process built it, on ``device``: with its initial weights, or restored from ``copies``.

        ``inside``: not a new life begins, the one that made the copies goes on.
        """
        modules = build_modules(self.spec, self.data.info, self.allowed_imports, restored=copies is not None)
        below = any(one.requires_grad for module in modules[: header.start] for one in module.parameters())
        own = [module.to(device) for module in modules[header.start : header.stop]]
        last = header.stop == len(modules)
        settings = replace(
            self.settings, plan=header.plan, mode="synchronous" if header.position_order else "asynchronous"
        )
        training = replace(training_of(self.spec, settings, device), rate_factor=header.rate_factor)
        emitted = EmittedEvents()
        layers = assemble(
            own,
            header.layer_names,
            training,
            emitted,
            start=header.start,
            life=header.life,
            states=None if copies is None else [_state(one, inside=inside) for one in copies],
            profiles=self.profile.layers[header.start : header.stop],
        )
        for layer, copy in zip(layers, copies or (), strict=False):
            try:
                layer.restore(copy)
                if header.moments_forgotten and not inside:
                    layer.forget_moments()
            except ValueError as error:
                raise CorruptError(
                    f"the cut of version {copy.state.version} does not fit the job's model: {error}"
                ) from error
        block = RecordedBlock(
            layers,
            header.plan,
            CutShelf(len(layers), _Unheard(), None),
            mode=WeightMode(header.backward_weights),
            head=self.head if last else None,
            trainable_below=below,
            transfers=transfers_in_order(device),
            precision=training.precision,
        )
        return block, emitted

    def saved_file(self, version: int, layer: int) -> LayerFile | None:
        """The file of ``layer`` in the cut of ``version``, if that lies on disk."""
        if version not in self.saved:
            return None
        files = layer_files(load_manifest(self.directory, version))
        return next((one for one in files if one.layer == layer), None)

    def saved_copy(self, version: int, layer: int) -> LayerCopy | None:
        """What it holds.

        Raises:
            CorruptError: the file is damaged.
        """
        file = self.saved_file(version, layer)
        return None if file is None else load_layer(self.directory, version, file)


def recorded_job(directory: str | Path, allowed_imports: Sequence[str] = ()) -> RecordedJob:
    """Read a job's definition from its newest cut, and load its data.

    Raises:
        NotFoundError: no cut was saved, so nothing tells how the job was set up.
        ConfigError, NotAllowedError: the model or the data can't be used here.
    """
    path = Path(directory)
    saved = durable_cuts(path)
    if not saved:
        raise NotFoundError(
            f"no saved cut in {path}: what a job was set up with lies beside its cuts, so it can be replayed from its "
            f"first one on"
        )
    manifest = load_manifest(path, saved[-1])
    spec = parse_job(manifest["spec"], source=f"cut {saved[-1]} in {path}")
    data = load_dataset(spec.data, allowed_imports)
    modules = build_modules(spec, data.info, allowed_imports, restored=True)
    foreign = foreign_parameters(modules, 0)
    return RecordedJob(
        directory=path,
        manifest=manifest,
        spec=spec,
        settings=ResolvedSettings.from_json(json.dumps(manifest["settings"])),
        profile=Profile.from_json(json.dumps(manifest["profile"])),
        data=data,
        head=job_head(spec, allowed_imports),
        owners={
            index: tuple(sorted({owner for _, (owner, _) in shared})) for index, shared in enumerate(foreign) if shared
        },
        saved=saved,
        allowed_imports=tuple(allowed_imports),
    )


def _state(copy: LayerCopy, *, inside: bool) -> LedgerState:
    # A ledger that is made from a saved state counts that as a change; a life that goes on has not changed.
    return replace(copy.state, revision=copy.state.revision - 1) if inside else copy.state


def _tensors(values: Sequence[torch.Tensor]) -> Tensors:
    return Tensors(tuple(values), single=len(values) == 1)
