"""Text as bytes: windows of a file, or of all files below a folder, for a language model."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from layerwise.data.dataset import Batch, TrainingData, describe_data
from layerwise.errors import ConfigError
from layerwise.job import DEFAULT_CONTEXT
from layerwise.sections import Text

STDLIB = "python-stdlib"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
VOCABULARY = 256


class TextDataset:
    """Windows of ``context`` bytes that do not overlap; the targets are the same bytes one place further on."""

    def __init__(self, text: NDArray[np.uint8], context: int) -> None:
        self._text = text
        self._context = context

    def __len__(self) -> int:
        """How many whole windows there are, the byte after each included."""
        return max(len(self._text) - 1, 0) // self._context

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Inputs and targets ``int64 [samples, context]``."""
        starts = np.asarray(indices, dtype=np.int64) * self._context
        windows = torch.from_numpy(self._text[starts[:, None] + np.arange(self._context + 1)].astype(np.int64))
        return [windows[:, :-1].contiguous()], [windows[:, 1:].contiguous()]


def load_text(spec: Text) -> TrainingData:
    """The text of ``spec``, split by whole files where that comes near the part asked for, else near its end.

    Files count in the order of their names, up to ``spec.bytes`` in all. Which ones are kept for validation follows
    from a hash of their names, so they are spread over the folder.

    Raises:
        ConfigError: nothing there, nothing readable, or less than one window.
    """
    files = _files(spec)
    context = spec.context or DEFAULT_CONTEXT
    texts = _read(files, spec.bytes)
    total = sum(len(text) for text in texts.values())
    if total <= context:
        raise ConfigError(
            f"data.path: {spec.path} holds {total} bytes, expected more than data.context, which is {context}"
        )
    train, validation = _split(texts, round(total * (spec.validation or 0.0)), spec.split_seed)
    parts = TextDataset(train, context), TextDataset(validation, context)
    return describe_data(*parts, vocabulary=VOCABULARY)


def _files(spec: Text) -> dict[str, Path]:
    """Every file by its name relative to the folder, in order."""
    if spec.path == STDLIB:
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    root = Path(spec.path).expanduser()
    if root.is_file():
        return {root.name: root}
    if not root.is_dir():
        raise ConfigError(
            f"data.path: nothing at {root.absolute()}; expected a text file, a folder of them, or {STDLIB} for the "
            "running Python's own sources"
        )
    found = {path.relative_to(root): path for path in root.rglob(spec.pattern) if path.is_file()}
    names = [name for name in sorted(found) if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ConfigError(f"data.pattern: got {spec.pattern!r}, which matches no file below {root.absolute()}")
    return {name.as_posix(): found[name] for name in names}


def _stdlib_files(root: Path) -> dict[str, Path]:
    """Python's own modules without its tests; folders of installed packages, which may be huge, are not entered."""
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def _read(files: dict[str, Path], limit: int | None) -> dict[str, bytes]:
    texts: dict[str, bytes] = {}
    left = limit
    for name, path in files.items():
        if left == 0:
            break
        try:
            with path.open("rb") as file:
                texts[name] = file.read() if left is None else file.read(left)
        except OSError as error:
            raise ConfigError(f"data.path: {path} can't be read: {error.strerror or error}") from None
        if left is not None:
            left -= len(texts[name])
    return texts


def _split(texts: dict[str, bytes], wanted: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training and validation bytes; ``wanted`` is the size of the second."""

    def place(name: str) -> bytes:
        return blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()

    chosen: set[str] = set()
    size = 0
    for name in sorted(texts, key=place):
        if size + len(texts[name]) <= wanted:
            chosen.add(name)
            size += len(texts[name])
    if 2 * size < wanted or len(texts) == 1:
        whole = _joined(texts.values())
        return whole[: len(whole) - wanted], whole[len(whole) - wanted :]
    return _joined(text for name, text in texts.items() if name not in chosen), _joined(
        text for name, text in texts.items() if name in chosen
    )


def _joined(texts: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(texts), dtype=np.uint8)
