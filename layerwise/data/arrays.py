"""Tensors in a file: .safetensors, or .npz without pickled objects."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.data.dataset import Dataset, TensorDataset, TrainingData, describe_data, split_dataset
from layerwise.errors import ConfigError
from layerwise.sections import Arrays


def load_arrays(spec: Arrays) -> TrainingData:
    """The tensors that ``spec.inputs`` and ``spec.targets`` name; float64 becomes float32, other dtypes stay.

    Whole-number targets of one dimension count as classes. Without ``validation`` and ``validation_path`` nothing is
    kept for validation.

    Raises:
        ConfigError: no such file, not readable without pickle, a key missing, or different numbers of samples.
    """
    whole, targets = _dataset(spec.path, spec, "data.path")
    train: Dataset
    validation: Dataset
    if spec.validation_path is not None:
        train = whole
        validation, other = _dataset(spec.validation_path, spec, "data.validation_path")
        targets = [torch.cat([targets[0].flatten(), other[0].flatten()]), *targets[1:]]
    else:
        train, validation = split_dataset(whole, spec.validation or 0.0, spec.split_seed)
    return describe_data(train, validation, num_classes=_num_classes(targets[0], whole))


def _num_classes(labels: Tensor, whole: Dataset) -> int | None:
    _, targets = whole.batch([0])
    if targets[0].ndim != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        return None
    return int(labels.max()) + 1


def _dataset(path: str, spec: Arrays, key: str) -> tuple[TensorDataset, list[Tensor]]:
    source = Path(path).expanduser()
    if not source.is_file():
        raise ConfigError(f"{key}: no file at {source.absolute()}; expected a .safetensors or .npz file with arrays")
    names = (*spec.inputs, *spec.targets)
    if source.suffix == ".safetensors":
        tensors = _safetensors(source, names, key)
    elif source.suffix == ".npz":
        tensors = _npz(source, names, key)
    else:
        raise ConfigError(f"{key}: got {path!r}, expected a file that ends in .safetensors or .npz")
    for name, one in zip(names, tensors, strict=True):
        if one.ndim == 0 or len(one) != len(tensors[0]) or len(one) == 0:
            raise ConfigError(
                f"{key}: {name} in {source} has shape {list(one.shape)}, expected the same number of samples first in "
                f"every array, and at least 1; {names[0]} has {list(tensors[0].shape)}"
            )
    tensors = [one.to(torch.float32) if one.dtype == torch.float64 else one for one in tensors]
    inputs, targets = tensors[: len(spec.inputs)], tensors[len(spec.inputs) :]
    return TensorDataset(inputs, targets), targets


def _safetensors(source: Path, names: Sequence[str], key: str) -> list[Tensor]:
    try:
        with safe_open(source, framework="pt") as file:
            present = list(file.keys())
            _check_names(source, names, present, key)
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{key}: {source} can't be read as safetensors: {error}") from None


def _npz(source: Path, names: Sequence[str], key: str) -> list[Tensor]:
    try:
        with np.load(source, allow_pickle=False) as file:
            _check_names(source, names, file.files, key)
            arrays = [file[name] for name in names]
        return [torch.from_numpy(np.ascontiguousarray(one.astype(one.dtype.newbyteorder("=")))) for one in arrays]
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{key}: {source} can't be read as npz of plain numbers: {error}") from None


def _check_names(source: Path, names: Sequence[str], present: Sequence[str], key: str) -> None:
    missing = [name for name in names if name not in present]
    if missing:
        raise ConfigError(
            f"{key}: {source} has no {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'} "
            "(choose with data.inputs and data.targets)"
        )
