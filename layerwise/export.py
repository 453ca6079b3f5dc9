"""From cuts to files that plain PyTorch loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from layerwise.cuts import layer_files, load_manifest
from layerwise.disk import write_durably
from layerwise.errors import ConfigError
from layerwise.layer_file import load_layer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def cut_state_dict(directory: str | Path, version: int) -> dict[str, torch.Tensor]:
    """All parameters and buffers of a cut, named as in ``nn.Sequential(*layers).state_dict()``.

    A parameter that several layers hold is there once, under the lowest layer's name; buffers that a state dict would
    leave out are in it.
    """
    files = layer_files(load_manifest(directory, version))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        copy = load_layer(directory, version, file)
        for name, tensor in (*copy.parameters.items(), *copy.buffers.items()):
            found[f"{file.layer}.{name}"] = tensor
    return found


def export(directory: str | Path, version: int, destination: str | Path, layers: Sequence[nn.Module]) -> Path:
    """Write the cut as ``model.safetensors`` and ``config.json`` into ``destination``; gives the first one's path.

    ``layers`` are the job's model, built anew: it says which names a state dict has. Names of shared parameters are
    all written, so that ``nn.Sequential(*layers).load_state_dict`` takes the file as it is.

    Raises:
        NotFoundError, CorruptError: the cut is not there or damaged.
        ConfigError: the model is another one than the cut's, or ``destination`` can't be written.
    """
    manifest = load_manifest(directory, version)
    found = cut_state_dict(directory, version)
    model = nn.Sequential(*layers)
    owners = {id(tensor): name for name, tensor in reversed(list(model.named_parameters(remove_duplicate=False)))}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = owners.get(id(tensor), name)
        if source not in found or found[source].shape != tensor.shape:
            raise ConfigError(
                f"the cut of version {version} does not fit the job's model: {name} is not in it as it should be"
            )
        state[name] = found[source].clone()
    folder = Path(destination)
    config: dict[str, Any] = {
        "format": "layerwise-model",
        "format_version": 1,
        "job": manifest.get("job"),
        "version": version,
        "layers": [type(layer).__name__ for layer in layers],
        "model": manifest.get("spec", {}).get("model"),
        "spec": manifest.get("spec"),
    }
    try:
        write_durably(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode(), "export")
        write_durably(folder / WEIGHTS, safetensors.torch.save(state, {"format": "pt"}), "export")
    except OSError as error:
        raise ConfigError(f"{folder} can't be written into: {error.strerror}") from error
    return folder / WEIGHTS
