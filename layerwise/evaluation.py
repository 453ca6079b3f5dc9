"""A cut's loss and metrics on the job's validation data, with plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.build import build_modules, training_of
from layerwise.cuts import load_manifest
from layerwise.data import Batch, load_dataset
from layerwise.data_info import DataInfo
from layerwise.errors import ConfigError, CorruptError
from layerwise.export import cut_state_dict, export
from layerwise.head import job_head
from layerwise.ids import Microbatch
from layerwise.job import JobSpec, parse_job
from layerwise.reference import PlainLoop
from layerwise.settings import ResolvedSettings


def evaluate_cut(
    directory: str | Path,
    version: int,
    *,
    device: torch.device,
    allowed_imports: Sequence[str] = (),
) -> dict[str, Any]:
    """Mean ``loss`` and metrics of the cut at ``version``, with ``samples`` and ``version``.

    Raises:
        NotFoundError, CorruptError: the cut is not there, or damaged.
        ConfigError: the job has no validation data, or its model or data can't be used here.
    """
    spec, manifest = _job_of(directory, version)
    settings = ResolvedSettings.from_json(json.dumps(manifest["settings"]))
    data = load_dataset(spec.data, allowed_imports)
    if not len(data.validation):
        raise ConfigError(
            f"job {spec.name} keeps no validation data (data.validation), so there is nothing to evaluate on"
        )
    modules = build_modules(spec, data.info, allowed_imports, restored=True)
    load_cut(modules, directory, version)

    def nothing(microbatch: Microbatch) -> Batch:
        raise AssertionError(f"evaluation does not train on {microbatch}")

    loop = PlainLoop(modules, training_of(spec, settings, device), job_head(spec, allowed_imports), nothing)
    return {**loop.evaluate(data.validation), "samples": len(data.validation), "version": version}


def export_cut(
    directory: str | Path, version: int, destination: str | Path, *, allowed_imports: Sequence[str] = ()
) -> Path:
    """Write the cut as one file that plain PyTorch loads; see `layerwise.export.export`."""
    spec, manifest = _job_of(directory, version)
    # What the model must know of the data is in the cut: the data themselves may be elsewhere by now.
    info = DataInfo.from_json(manifest["profile"]["data_json"])
    return export(directory, version, destination, build_modules(spec, info, allowed_imports, restored=True))


def load_cut(modules: Sequence[nn.Module], directory: str | Path, version: int) -> None:
    """Put a cut's parameters and buffers into the job's freshly built layers.

    Raises:
        CorruptError: they are not those of this model.
    """
    saved = cut_state_dict(directory, version)
    model = nn.Sequential(*modules)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise CorruptError(
                f"the cut at version {version} in {directory} does not hold {name} of this job's model as it should"
            )
        tensor.data.copy_(saved[name])


def _job_of(directory: str | Path, version: int) -> tuple[JobSpec, dict[str, Any]]:
    manifest = load_manifest(directory, version)
    return parse_job(manifest["spec"], source=f"cut {version} in {directory}"), manifest
