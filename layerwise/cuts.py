"""Cuts on disk: what the folders look like, and when a cut counts. No torch here: see `layerwise.layer_file`.

::

    <job directory>/cuts/00000100/layer-000.life-1.safetensors   written aside, synced, renamed: by each layer's shard
                                  layer-001.life-1.safetensors
                                  ...
                                  manifest.json                  written last, the same way: now the cut is durable

A folder without a manifest is no cut. The manifest names its files with sizes and hashes, and holds a hash of itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from layerwise.errors import CorruptError, NotFoundError
from layerwise.messages import LayerFile

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"
_FOLDER = re.compile(r"\d{8,}")

log = logging.getLogger(__name__)


def cut_folder(directory: str | Path, version: int) -> Path:
    """Where the cut of ``version`` of the job in ``directory`` lives."""
    return Path(directory) / "cuts" / f"{version:08d}"


def layer_file_name(layer: int, life: int) -> str:
    """The name of a layer's file; the life in it keeps a paused former owner from overwriting its successor's."""
    return f"layer-{layer:03d}.life-{life}.safetensors"


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write ``path`` so that after any crash it is whole or not there: aside, synced, renamed, folder synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has what was created, renamed or deleted in ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_manifest(directory: str | Path, version: int, manifest_json: str, keep: Iterable[int] = ()) -> None:
    """Make the cut of ``version`` durable: write its manifest, then delete the older cuts that are not in ``keep``.

    ``manifest_json`` is an object with at least ``version`` and ``files``, see `load_manifest`. An old cut that can't
    be deleted stays for the next time: the new one is durable all the same.

    Raises:
        CorruptError: a file that it names is not there, or has another size.
        OSError: the disk refused; the cut is not durable.
    """
    folder = cut_folder(directory, version)
    manifest = json.loads(manifest_json)
    for file in layer_files(manifest):
        path = folder / file.name
        num_bytes = path.stat().st_size if path.is_file() else -1
        if num_bytes != file.num_bytes:
            found = "is missing" if num_bytes < 0 else f"has {num_bytes} bytes"
            raise CorruptError(f"cut {version} can't be committed: {path} {found}, {file.num_bytes} bytes were saved")
    manifest[_CHECKSUM] = _checksum(manifest)
    sync_folder(folder.parent)
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    delete_cuts(directory, {version, *keep})


def durable_cuts(directory: str | Path) -> tuple[int, ...]:
    """The versions that have a manifest, oldest first."""
    cuts = Path(directory) / "cuts"
    folders = [one for one in cuts.iterdir() if _FOLDER.fullmatch(one.name)] if cuts.is_dir() else []
    return tuple(sorted(int(one.name) for one in folders if (one / MANIFEST).is_file()))


def newest_cut(directory: str | Path) -> int | None:
    """The newest durable cut's version; ``None`` when there is no cut."""
    return max(durable_cuts(directory), default=None)


def load_manifest(directory: str | Path, version: int) -> dict[str, Any]:
    """What the cut's manifest says; its own hash is checked.

    Raises:
        NotFoundError: there is no such cut.
        CorruptError: the manifest was cut short or changed.
    """
    path = cut_folder(directory, version) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        there = ", ".join(map(str, durable_cuts(directory))) or "none"
        raise NotFoundError(f"there is no cut of version {version} in {directory}; there are: {there}") from None
    except ValueError as error:
        raise CorruptError(f"{path} is not readable as JSON ({error}); use an older cut") from None
    if not isinstance(manifest, dict) or manifest.pop(_CHECKSUM, None) != _checksum(manifest):
        raise CorruptError(f"{path} does not fit its own checksum: it was changed or cut short; use an older cut")
    if manifest.get("version") != version:
        raise CorruptError(f"{path} is of version {manifest.get('version')}, not {version}")
    return manifest


def layer_files(manifest: Mapping[str, Any]) -> tuple[LayerFile, ...]:
    """The files that a manifest names, lowest layer first."""
    files = [
        LayerFile(layer=one["layer"], life=one["life"], name=one["name"], num_bytes=one["bytes"], digest=one["digest"])
        for one in manifest["files"]
    ]
    return tuple(sorted(files, key=lambda one: one.layer))


def file_digest(data: bytes | memoryview) -> str:
    """The hash of a file's bytes, as in its manifest: XXH3, 128 bits, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def read_checked(folder: Path, file: LayerFile) -> bytes:
    """The bytes of ``file``; ``CorruptError`` unless size and hash are those of the manifest."""
    path = folder / file.name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing, but the manifest beside it names it; use an older cut") from None
    if len(data) != file.num_bytes:
        raise CorruptError(f"{path} has {len(data)} bytes, the manifest says {file.num_bytes}; use an older cut")
    if file_digest(data) != file.digest:
        raise CorruptError(f"{path} does not have the hash that the manifest says; use an older cut")
    return data


def void_cuts(directory: str | Path, after: int) -> None:
    """Take back the cuts above version ``after``: their manifests go, so that nobody goes on from them.

    Raises:
        OSError: the disk refused.
    """
    for version in durable_cuts(directory):
        if version > after:
            folder = cut_folder(directory, version)
            (folder / MANIFEST).unlink(missing_ok=True)
            sync_folder(folder)


def delete_cuts(directory: str | Path, keep: Iterable[int]) -> None:
    """Delete the cuts, finished or not, that are older than the newest in ``keep`` and not in it.

    In the folders that stay, files that their manifest does not name are deleted. A manifest goes before its files,
    so that a crash on the way leaves no cut that misses some.
    """
    kept = set(keep)
    cuts = Path(directory) / "cuts"
    for folder in sorted(cuts.iterdir()) if kept and cuts.is_dir() else []:
        if not _FOLDER.fullmatch(folder.name) or int(folder.name) > max(kept):
            continue
        try:
            if int(folder.name) in kept:
                _delete_strays(directory, int(folder.name), folder)
            else:
                _delete_cut(folder)
        except (OSError, CorruptError) as error:
            log.warning("%s is not cleaned up: %s", folder, error)


def _delete_cut(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    sync_folder(folder)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()


def _delete_strays(directory: str | Path, version: int, folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        return
    named = {MANIFEST, *(file.name for file in layer_files(load_manifest(directory, version)))}
    for path in folder.iterdir():
        if path.name not in named:
            path.unlink(missing_ok=True)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
