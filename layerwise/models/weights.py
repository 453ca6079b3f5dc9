"""A whole model's weights as one flat map, as ``torch.nn.Sequential(*layers)`` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from layerwise.errors import ConfigError


def model_tensors(layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers, ``<layer index>.<name in the layer>``; the tensors themselves, not copies."""
    return {
        f"{index}.{name}": tensor for index, layer in enumerate(layers) for name, tensor in layer.state_dict().items()
    }


def load_weights(layers: Sequence[nn.Module], path: str | Path) -> None:
    """Start from the ``.safetensors`` file at ``path``: it holds every tensor of this model, and no others.

    Raises:
        ConfigError: no such file, not readable, or for another model; the layers are unchanged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"init: no file at {path}; expected a model.safetensors as layerwise export writes it")
    try:
        saved: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"init: {path} can't be read as safetensors: {error}") from None
    own = model_tensors(layers)
    for problem, names in (("lacks", own.keys() - saved.keys()), ("has beside the model's", saved.keys() - own.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ConfigError(f"init: {path} is for another model: it {problem} {len(names)} tensors ({shown})")
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            raise ConfigError(
                f"init: {path} is for another model: {name} has shape {list(saved[name].shape)}, "
                f"expected {list(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
