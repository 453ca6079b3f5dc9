"""A disk that loses what it was not made to keep: what a power cut may leave, by the letter of POSIX.

Operations are recorded as `layerwise.disk` reports them and played into a small file system in memory, which knows of each
file and folder what was synced. A power cut keeps that, and of everything else a part that chance decides: of unsynced data
a beginning, or all of it with zeros in between; of unsynced entries of a folder any that do not need one that was lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from layerwise.fault_points import Operation


@dataclass(slots=True)
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass(slots=True, eq=False)
class Folder:
    """``entries`` are those now, ``synced`` those on the disk, ``pending`` the changes between, in order."""

    entries: dict[str, Node] = field(default_factory=dict)
    synced: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, change: dict[str, Node | None]) -> None:
        """Set entries, or take them out where ``None``: all of one call, or none."""
        self.pending.append(change)
        _apply(self.entries, change)


Node = File | Folder


class Disk:
    """Below ``root``, which is on the disk."""

    def __init__(self, root: Path) -> None:
        self._root = PurePosixPath(root)
        self._top = Folder()

    def play(self, operation: Operation) -> None:
        """An operation has happened."""
        folder, name = self._find(operation.path)
        match operation.kind:
            case "make-folder":
                folder.change({name: Folder()})
            case "create":
                folder.change({name: File()})
            case "write":
                file = folder.entries[name]
                assert isinstance(file, File)
                file.data += bytes(operation.data)
            case "sync":
                file = folder.entries[name]
                assert isinstance(file, File)
                file.synced = file.data
            case "rename":
                target = PurePosixPath(operation.target).name
                folder.change({target: folder.entries[name], name: None})
            case "sync-folder":
                whole = self._top if name == "" else folder.entries[name]
                assert isinstance(whole, Folder)
                whole.synced, whole.pending = dict(whole.entries), []
            case "delete" | "delete-folder":
                if name in folder.entries:
                    folder.change({name: None})

    def cut(self, target: Path, chance: random.Random, keep: float) -> None:
        """Put into ``target`` what a power cut leaves; ``keep`` is the probability of each thing not synced to be there."""
        _leave(self._top, target, chance, keep)

    def _find(self, path: str) -> tuple[Folder, str]:
        """The folder that holds ``path``, and its name there ("" for the root itself)."""
        parts = PurePosixPath(path).relative_to(self._root).parts
        folder = self._top
        for part in parts[:-1]:
            found = folder.entries[part]
            assert isinstance(found, Folder)
            folder = found
        return folder, parts[-1] if parts else ""


def _leave(folder: Folder, target: Path, chance: random.Random, keep: float) -> None:
    target.mkdir(exist_ok=True)
    entries, lost = dict(folder.synced), set[str]()
    for change in folder.pending:
        if chance.random() < keep and not lost & change.keys():
            _apply(entries, change)
        else:
            lost |= change.keys()
    for name, node in entries.items():
        if isinstance(node, Folder):
            _leave(node, target / name, chance, keep)
        else:
            (target / name).write_bytes(_left_of(node, chance, keep))


def _left_of(file: File, chance: random.Random, keep: float) -> bytes:
    new = file.data[len(file.synced) :]
    if keep in (0.0, 1.0) or not new:
        return file.data if keep == 1.0 else file.synced
    length = chance.randint(0, len(new))
    if chance.random() < 0.5:
        return file.synced + new[:length]
    gap = chance.randint(0, length)
    return file.synced + new[:gap] + bytes(length - gap) + new[length:]


def _apply(entries: dict[str, Node], change: Iterable[tuple[str, Node | None]] | dict[str, Node | None]) -> None:
    for name, node in dict(change).items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node
