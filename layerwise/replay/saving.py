"""The state in which a replay stopped, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerwise.cuts import commit_manifest, cut_folder
from layerwise.errors import NotAllowedError
from layerwise.layer import LayerCopy, TrainedLayer
from layerwise.layer_file import save_layer
from layerwise.replay.recorded_job import RecordedJob

STATE_FILE = "layers.json"


def check_empty(folder: Path) -> None:
    """Refuse a folder in which something lies.

    Raises:
        NotAllowedError: it is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NotAllowedError(f"{folder} is not empty; name a new folder for the state of the layers")


def save_cut(folder: Path, job: RecordedJob, copies: Mapping[int, LayerCopy]) -> Path:
    """Save ``copies`` (of all layers, at one version) as a cut, which `evaluate` and `export` read; gives its folder."""
    check_empty(folder)
    (version,) = {copy.state.version for copy in copies.values()}
    files = [save_layer(folder, job.manifest["job"], copy) for _, copy in sorted(copies.items())]
    named = [
        {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
        for one in files
    ]
    manifest = {**job.manifest, "version": version, "files": named, "evaluations": []}
    commit_manifest(folder, version, json.dumps(manifest), life=max(one.life for one in files))
    return cut_folder(folder, version)


def save_layers(folder: Path, layers: Mapping[int, TrainedLayer]) -> Path:
    """Save the layers as they are, perhaps in mid-update: one safetensors file each, and what they count.

    Tensors are called ``parameter:NAME``, ``buffer:NAME`` and ``moment:PARAMETER/KEY``.
    """
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = []
    for index, layer in sorted(layers.items()):
        name = f"layer-{index:03d}.safetensors"
        save_file({key: one.contiguous().clone() for key, one in _tensors(layer).items()}, folder / name)
        facts.append(
            {
                "layer": index,
                "name": layer.module.name,
                "file": name,
                "life": layer.ledger.life,
                "version": layer.ledger.version,
                "accumulated": layer.ledger.accumulated,
            }
        )
    (folder / STATE_FILE).write_text(json.dumps({"layers": facts}, indent=2) + "\n", encoding="utf-8")
    return folder


def _tensors(layer: TrainedLayer) -> dict[str, torch.Tensor]:
    buffers = zip(layer.module.buffer_names, layer.module.buffers, strict=True)
    return {
        **{f"parameter:{name}": one.detach() for name, one in layer.owned_parameters().items()},
        **{f"buffer:{name}": one for name, one in buffers},
        **{f"moment:{name}": one for name, one in layer.moments().items()},
    }
