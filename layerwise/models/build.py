"""From a job file's model to an ordered list of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data_info import DataInfo
from layerwise.errors import ConfigError
from layerwise.imports import call_import
from layerwise.models.cnn import build_cnn
from layerwise.models.mlp import build_mlp
from layerwise.models.resnet import build_resnet
from layerwise.models.transformer_lm import build_transformer_lm
from layerwise.section import Import
from layerwise.sections import Cnn, Mlp, ModelSpec, Resnet, TransformerLm

BYTES = 256


def build_model(model: ModelSpec, seed: int, info: DataInfo, allowed_imports: Sequence[str] = ()) -> list[nn.Module]:
    """The model's layers in order, on the CPU, with initial weights that follow from ``seed`` alone.

    torch's global random generator is left as it was.

    Raises:
        ConfigError: the model does not fit the data, or the user's function did not return a list of modules.
        NotAllowedError: ``model.import`` names a module that ``allowed_imports`` does not cover.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, Import):
            found = call_import(model.target, model.arguments, allowed_imports, key="model.import")
            return check_layers(found, model.target)
        return _builtin(model, info)


def _builtin(model: Mlp | Cnn | Resnet | TransformerLm, info: DataInfo) -> list[nn.Module]:
    shape, dtype = info.input_shapes[0], info.input_dtypes[0]
    if len(info.input_shapes) != 1:
        raise ConfigError(f"model.name: {model.name} takes one input tensor, the data has {len(info.input_shapes)}")
    if isinstance(model, TransformerLm):
        if len(shape) != 1 or not dtype.startswith(("int", "uint")):
            raise ConfigError(f"model.name: transformer-lm takes rows of tokens, the data has {dtype}{list(shape)}")
        if shape[0] > model.context:
            raise ConfigError(f"model.context: got {model.context}, expected at least {shape[0]}, as the data has")
        return build_transformer_lm(model, model.vocabulary or info.vocabulary or BYTES)
    if not dtype.startswith(("float", "bfloat")):
        raise ConfigError(f"model.name: {model.name} takes floating-point inputs, the data has {dtype}{list(shape)}")
    outputs = _outputs(model, info)
    if isinstance(model, Mlp):
        return build_mlp(model, prod(shape), outputs)
    if len(shape) != 3:
        raise ConfigError(
            f"model.name: {model.name} takes images [channels, height, width], the data has {list(shape)}"
        )
    if isinstance(model, Cnn):
        return build_cnn(model, (shape[0], shape[1], shape[2]), outputs)
    return build_resnet(model, shape[0], outputs)


def _outputs(model: Mlp | Cnn | Resnet, info: DataInfo) -> int:
    if model.outputs is not None:
        if info.num_classes is not None and model.outputs < info.num_classes:
            raise ConfigError(
                f"model.outputs: got {model.outputs}, expected at least the number of classes, {info.num_classes}"
            )
        return model.outputs
    if info.num_classes is not None:
        return info.num_classes
    if info.target_dtypes[0].startswith("float"):
        return prod(info.target_shapes[0])
    raise ConfigError("model.outputs: nothing is given, expected the number of classes, which this data does not tell")


def check_layers(found: Any, source: str) -> list[nn.Module]:
    """``found`` as a list of modules.

    Raises:
        ConfigError: it is something else, or empty. ``source`` names where it came from.
    """
    if isinstance(found, nn.Module) and not isinstance(found, (nn.Sequential, nn.ModuleList)):
        raise ConfigError(f"model.import: {source} returned one {type(found).__name__}, expected a list of its layers")
    if not isinstance(found, (list, tuple, nn.Sequential, nn.ModuleList)):
        raise ConfigError(f"model.import: {source} returned a {type(found).__name__}, expected a list of nn.Module")
    layers = list(found)
    for position, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise ConfigError(
                f"model.import: {source} returned a {type(layer).__name__} at position {position}, expected nn.Module"
            )
    if not layers:
        raise ConfigError(f"model.import: {source} returned no layers, expected at least one")
    return layers


def layer_names(layers: Sequence[nn.Module]) -> list[str]:
    """A short name for each layer, unique by its index: ``3-lm-block``."""
    return [
        f"{index}-{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '-', type(layer).__name__).lower()}"
        for index, layer in enumerate(layers)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTensor:
    """Memory that several layers use as a parameter or buffer. ``name`` is the first layer's name for it."""

    name: str
    layers: tuple[int, ...]


def shared_tensors(layers: Sequence[nn.Module]) -> list[SharedTensor]:
    """Parameters and buffers (or views of them) that more than one layer holds, in the order of their first layer."""
    users: dict[int, tuple[str, list[int]]] = {}
    for index, layer in enumerate(layers):
        named: list[tuple[str, Tensor]] = [*layer.named_parameters(), *layer.named_buffers()]
        for name, tensor in named:
            if tensor.numel() == 0:
                continue
            _, indices = users.setdefault(tensor.untyped_storage().data_ptr(), (name, []))
            if index not in indices:
                indices.append(index)
    return [SharedTensor(name=name, layers=tuple(indices)) for name, indices in users.values() if len(indices) > 1]
