"""A layer's file in a cut: safetensors with the tensors under prefixed names, and the rest as JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from layerwise.cuts import cut_folder, read_checked, write_layer_file
from layerwise.errors import CorruptCutError
from layerwise.layer import LayerCopy
from layerwise.layer_ledger import LedgerState
from layerwise.messages import LayerFile

FORMAT = "layerwise-layer"
FORMAT_VERSION = 1
PARAMETER = "parameter:"
BUFFER = "buffer:"
MOMENT = "moment:"
_METADATA = "layerwise"


def save_layer(directory: str | Path, job: str, copy: LayerCopy) -> LayerFile:
    """Write one layer of a cut durably; says which file it became.

    Raises:
        OSError: the disk refused; nothing with the file's name was left.
    """
    return write_layer_file(directory, copy.state.version, copy.layer, copy.life, layer_bytes(job, copy))


def layer_bytes(job: str, copy: LayerCopy) -> bytes:
    """What a layer's file holds."""
    version = copy.state.version
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "job": job,
        "layer": copy.layer,
        "life": copy.life,
        "version": version,
        "state": copy.state.to_json(),
        "orders": {"parameters": list(copy.parameters), "buffers": list(copy.buffers), "moments": list(copy.moments)},
    }
    tensors: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for prefix, group in ((PARAMETER, copy.parameters), (BUFFER, copy.buffers), (MOMENT, copy.moments)):
        for name, tensor in group.items():
            alone = _alone(tensor)
            if alone.numel() and alone.data_ptr() in memory:
                alone = alone.clone()
            memory.add(alone.data_ptr())
            tensors[prefix + name] = alone
    data: bytes = safetensors.torch.save(tensors, {_METADATA: json.dumps(metadata, separators=(",", ":"))})
    return data


def load_layer(directory: str | Path, version: int, file: LayerFile) -> LayerCopy:
    """Read one layer of a cut, size and hash checked first.

    Raises:
        CorruptCutError: the file is missing, cut short or changed, or is not what its name says.
    """
    folder = cut_folder(directory, version)
    return read_layer(read_checked(folder, file), version, file, path=folder / file.name)


def read_layer(data: bytes, version: int, file: LayerFile, *, path: Path) -> LayerCopy:
    """The layer in the bytes of its file, wherever they came from; ``path`` names them in errors.

    Raises:
        CorruptCutError: they are not what ``file`` says.
    """
    try:
        tensors = safetensors.torch.load(data)
        (header_bytes,) = (int.from_bytes(data[:8], "little"),)
        metadata = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"][_METADATA])
        if metadata["format"] != FORMAT or metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {metadata['format']!r} {metadata['format_version']!r}")
        copy = LayerCopy(
            layer=metadata["layer"],
            life=metadata["life"],
            state=LedgerState.from_json(metadata["state"]),
            parameters=_group(tensors, PARAMETER, metadata["orders"]["parameters"]),
            buffers=_group(tensors, BUFFER, metadata["orders"]["buffers"]),
            moments=_group(tensors, MOMENT, metadata["orders"]["moments"]),
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptCutError(
            f"{path} is not a layer's file that this version reads: {error}", version=version, path=path
        ) from error
    if (copy.layer, copy.life, copy.state.version) != (file.layer, file.life, version):
        raise CorruptCutError(
            f"{path} holds layer {copy.layer} of life {copy.life} at version {copy.state.version}, not layer "
            f"{file.layer} of life {file.life} at version {version}",
            version=version,
            path=path,
        )
    return copy


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous on the host and not a part of a larger tensor's memory, as safetensors wants it."""
    host = tensor.detach().cpu().contiguous()
    return host if host.untyped_storage().nbytes() == host.numel() * host.element_size() else host.clone()


def _group(tensors: Mapping[str, torch.Tensor], prefix: str, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: tensors[prefix + name] for name in names}
