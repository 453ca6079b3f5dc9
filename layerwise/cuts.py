"""Cuts on disk: what the folders look like, and when a cut counts. No torch here: see `layerwise.layer_file`.

::

    <job directory>/cuts/00000100/layer-000.life-1.safetensors   written aside, synced, renamed: by each layer's shard
                                  layer-001.life-1.safetensors
                                  ...
                                  manifest.life-1.json           written last, the same way: now the cut is durable
                         fences/life-1.layers-0-2.from-0         which life a layer is in: `layerwise.fences`

A folder without a manifest is no cut, and one whose manifest names a file of a life that was replaced before is none
either. The life in a manifest's name is that of the block whose shard wrote it, so that a paused former owner can't
overwrite its successor's. The manifest names its files with sizes and hashes, and holds a hash of itself.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from layerwise import disk
from layerwise.errors import CorruptCutError, LayerwiseError, NotFoundError, UnreadableError, WrongLifeError
from layerwise.fences import Fence, fences_in, shut_out
from layerwise.messages import LayerFile

_CHECKSUM = "checksum"
_FOLDER = re.compile(r"\d{8,}")
_MANIFEST = re.compile(r"manifest\.life-(\d+)\.json")
_CHUNK_BYTES = 8 << 20

log = logging.getLogger(__name__)


def cut_folder(directory: str | Path, version: int) -> Path:
    """Where the cut of ``version`` of the job in ``directory`` lives."""
    return Path(directory) / "cuts" / f"{version:08d}"


def layer_file_name(layer: int, life: int) -> str:
    """The name of a layer's file; the life in it keeps a paused former owner from overwriting its successor's."""
    return f"layer-{layer:03d}.life-{life}.safetensors"


def manifest_name(life: int) -> str:
    """The name of the manifest that the first block's shard writes in ``life``."""
    return f"manifest.life-{life}.json"


def write_layer_file(directory: str | Path, version: int, layer: int, life: int, data: bytes) -> LayerFile:
    """Put one layer's file of a cut on disk durably; says which file it became.

    Raises:
        OSError: the disk refused; nothing with the file's name was left.
    """
    name = layer_file_name(layer, life)
    disk.write_durably(cut_folder(directory, version) / name, data, "cut")
    return LayerFile(layer=layer, life=life, name=name, num_bytes=len(data), digest=file_digest(data))


def commit_manifest(
    directory: str | Path, version: int, manifest_json: str, keep: Iterable[int] = (), *, life: int
) -> None:
    """Make the cut of ``version`` durable: write its manifest, then delete the cuts older than all in ``keep``.

    ``manifest_json`` is an object with at least ``version`` and ``files``, see `load_manifest`. ``life`` is that of
    the block whose shard commits. An old cut that can't be deleted stays for the next time: the new one is durable all
    the same.

    Raises:
        WrongLifeError: a layer's file is of a life that was replaced before that version.
        CorruptCutError: a file that it names is not there, or has another size.
        OSError: the disk refused; the cut is not durable.
    """
    folder = cut_folder(directory, version)
    manifest = json.loads(manifest_json)
    files = layer_files(manifest)
    _check_lives(directory, version, files)
    for file in files:
        path = folder / file.name
        num_bytes = path.stat().st_size if path.is_file() else -1
        if num_bytes != file.num_bytes:
            found = "is missing" if num_bytes < 0 else f"has {num_bytes} bytes"
            raise CorruptCutError(
                f"cut {version} can't be committed: {path} {found}, {file.num_bytes} bytes were saved",
                version=version,
                path=path,
            )
    manifest[_CHECKSUM] = _checksum(manifest)
    disk.sync_folder(folder.parent, "manifest")
    disk.sync_folder(Path(directory), "manifest")
    disk.write_durably(
        folder / manifest_name(life), json.dumps(manifest, indent=1, sort_keys=True).encode(), "manifest"
    )
    # What is below the oldest one to keep is older than anything that a later life can begin at, so that deleting it
    # late does no harm; who was replaced still has no say in it.
    _check_lives(directory, version, files)
    delete_cuts(directory, min({version, *keep}))


def durable_cuts(directory: str | Path) -> tuple[int, ...]:
    """The versions of the cuts that count, oldest first. A manifest that can't be read counts: who loads it hears why."""
    cuts = Path(directory) / "cuts"
    versions = sorted(int(one.name) for one in _content(cuts) if _FOLDER.fullmatch(one.name))
    fences = fences_in(directory) if versions else ()
    return tuple(version for version in versions if _find_manifest(directory, version, fences) is not None)


def newest_cut(directory: str | Path) -> int | None:
    """The newest durable cut's version; ``None`` when there is no cut."""
    return max(durable_cuts(directory), default=None)


def is_durable(directory: str | Path, version: int) -> bool:
    """Whether the cut of ``version`` has a manifest, of whatever life."""
    return any(_MANIFEST.fullmatch(path.name) for path in _content(cut_folder(directory, version)))


def load_manifest(directory: str | Path, version: int) -> dict[str, Any]:
    """What the cut's manifest says; its own hash is checked.

    Raises:
        NotFoundError: there is no such cut.
        CorruptCutError: the manifest was cut short or changed.
        UnreadableError: it can't be read for now.
    """
    path = _find_manifest(directory, version, fences_in(directory))
    if path is None:
        there = ", ".join(map(str, durable_cuts(directory))) or "none"
        raise NotFoundError(f"there is no cut of version {version} in {directory}; there are: {there}")
    return _read_manifest(path, version)


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
    """The bytes of ``file``; ``CorruptCutError`` unless size and hash are those of the manifest.

    ``UnreadableError`` when it can't be read for now.
    """
    data = b"".join(_read_chunks(folder, file, file.num_bytes + 1))
    _compare(folder, file, len(data), file_digest(data))
    return data


def check_cut(directory: str | Path, version: int) -> dict[str, Any]:
    """Read every file of a cut and compare size and hash with the manifest, which is returned.

    As fast as the disk and 8 MB of memory allow; nothing is parsed.

    Raises:
        NotFoundError: there is no such cut.
        CorruptCutError: the file at its ``path`` is missing, cut short or changed.
        UnreadableError: one can't be read for now.
    """
    manifest = load_manifest(directory, version)
    folder = cut_folder(directory, version)
    for file in layer_files(manifest):
        digest, num_bytes = xxhash.xxh3_128(), 0
        for chunk in _read_chunks(folder, file, _CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
        _compare(folder, file, num_bytes, digest.hexdigest())
    return manifest


def newest_sound_cut(
    directory: str | Path, *, below: int | None = None
) -> tuple[int | None, tuple[CorruptCutError, ...]]:
    """The newest cut whose files are all as they were saved, and what is wrong with those that are newer.

    ``below`` leaves out the cuts from that version on: the one that failed, and those after it. ``None`` when no cut is sound.

    Raises:
        UnreadableError: a file can't be read for now, so that nobody knows.
    """
    damaged: list[CorruptCutError] = []
    for version in reversed(durable_cuts(directory)):
        if below is not None and version >= below:
            continue
        try:
            check_cut(directory, version)
        except CorruptCutError as error:
            damaged.append(error)
        except NotFoundError:
            continue  # deleted while we looked
        else:
            return version, tuple(damaged)
    return None, tuple(damaged)


def delete_cuts(directory: str | Path, oldest: int) -> None:
    """Delete the cuts, finished or not, that are older than version ``oldest``.

    A manifest goes before its files, so that a crash on the way leaves no cut that misses some.
    """
    cuts = Path(directory) / "cuts"
    for folder in _content(cuts):
        if not _FOLDER.fullmatch(folder.name) or int(folder.name) >= oldest:
            continue
        try:
            _delete_cut(folder)
        except FileNotFoundError:
            continue  # another block of the job has deleted the folder
        except OSError as error:
            log.warning("%s is not cleaned up: %s", folder, error)


def delete_layer_files(directory: str | Path, version: int, files: Iterable[LayerFile]) -> None:
    """Delete files of a cut that will not be finished; what can't be deleted stays for `delete_cuts`."""
    folder = cut_folder(directory, version)
    try:
        for file in files:
            disk.delete(folder / file.name, "cut")
        if folder.is_dir() and not _content(folder):
            disk.delete_folder(folder, "cut")
    except FileNotFoundError:
        return  # another block of the job, or the commit of a newer cut, has deleted the folder
    except OSError as error:
        log.warning("%s is not cleaned up: %s", folder, error)


def _content(folder: Path) -> list[Path]:
    """What is in ``folder``, in order; nothing when there is no such folder (any more: others delete cuts as well)."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _delete_cut(folder: Path) -> None:
    manifests = [path for path in _content(folder) if _MANIFEST.fullmatch(path.name)]
    for path in manifests:
        disk.delete(path, "manifest")
    if manifests:
        disk.sync_folder(folder, "manifest")
    for path in _content(folder):
        disk.delete(path, "cut")
    disk.delete_folder(folder, "cut")


def _find_manifest(directory: str | Path, version: int, fences: Iterable[Fence]) -> Path | None:
    """The manifest that counts, of the highest life; one that can't be read is not passed over."""
    folder = cut_folder(directory, version)
    found: dict[int, Path] = {}
    for path in _content(folder):
        match = _MANIFEST.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    above = [fence for fence in fences if fence.version < version]
    for life in sorted(found, reverse=True):
        try:
            files = layer_files(_read_manifest(found[life], version)) if above else ()
        except (LayerwiseError, FileNotFoundError):
            return found[life]
        if not shut_out(above, ((file.layer, file.life) for file in files), version):
            return found[life]
    return None


def _read_manifest(path: Path, version: int) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"the cut of version {version} is being deleted: {path} is gone") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise CorruptCutError(
            f"{path} is not readable as JSON ({error}); use an older cut", version=version, path=path
        ) from None
    if not isinstance(manifest, dict) or manifest.pop(_CHECKSUM, None) != _checksum(manifest):
        raise CorruptCutError(
            f"{path} does not fit its own checksum: it was changed or cut short; use an older cut",
            version=version,
            path=path,
        )
    if manifest.get("version") != version:
        raise CorruptCutError(
            f"{path} is of version {manifest.get('version')}, not {version}", version=version, path=path
        )
    return manifest


def _check_lives(directory: str | Path, version: int, files: Iterable[LayerFile]) -> None:
    reason = shut_out(fences_in(directory), ((file.layer, file.life) for file in files), version)
    if reason:
        raise WrongLifeError(f"cut {version} can't be committed: {reason}")


def _read_chunks(folder: Path, file: LayerFile, num_bytes: int) -> Iterator[bytes]:
    path = folder / file.name
    try:
        with path.open("rb") as opened:
            while chunk := opened.read(num_bytes):
                yield chunk
    except FileNotFoundError:
        raise CorruptCutError(
            f"{path} is missing, but the manifest beside it names it; use an older cut",
            version=int(folder.name),
            path=path,
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    """A passing error of a network is no reason to give up a cut that is sound."""
    return UnreadableError(
        f"{path} can't be read ({error.strerror or error}); try again once that is mended, or move {path.parent} away to "
        f"go on from an older cut"
    )


def _compare(folder: Path, file: LayerFile, num_bytes: int, digest: str) -> None:
    path = folder / file.name
    found = ""
    if num_bytes != file.num_bytes:
        found = f"has {num_bytes} bytes, the manifest says {file.num_bytes}"
    elif digest != file.digest:
        found = "does not have the hash that the manifest says"
    if found:
        raise CorruptCutError(f"{path} {found}; use an older cut", version=int(folder.name), path=path)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
