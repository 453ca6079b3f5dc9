"""CIFAR-10 and CIFAR-100 from their official binary archives: label bytes, then 3,072 bytes of a 3x32x32 image."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from layerwise.data.dataset import Batch, Dataset, TrainingData, describe_data, split_dataset
from layerwise.errors import ConfigError
from layerwise.sections import Cifar10, Cifar100

SHAPE = (3, 32, 32)
IMAGE_BYTES = 3072
LARGEST_FILE_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """Where one data set's parts are, and how they look. ``label`` is the position of the label byte that counts."""

    folder: str
    file: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    label: int
    num_classes: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


CIFAR10 = Archive(
    folder="cifar-10-batches-bin",
    file="cifar-10-binary.tar.gz",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    label_bytes=1,
    label=0,
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    deviation=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Archive(
    folder="cifar-100-binary",
    file="cifar-100-binary.tar.gz",
    train=("train.bin",),
    test="test.bin",
    label_bytes=2,
    label=1,
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    deviation=(0.2673, 0.2564, 0.2762),
)


class CifarDataset:
    """Images kept as bytes; a batch is ``float32 [samples, 3, 32, 32]``, normalised by channel, and ``int64``."""

    def __init__(self, records: NDArray[np.uint8], archive: Archive) -> None:
        """``records`` is ``[samples, label bytes + 3072]``."""
        self._images = records[:, archive.label_bytes :]
        self._labels = records[:, archive.label].astype(np.int64)
        self._scale = 255 * torch.tensor(archive.deviation).view(1, 3, 1, 1)
        self._mean = 255 * torch.tensor(archive.mean).view(1, 3, 1, 1)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._labels)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The images at ``indices`` and their labels."""
        chosen = np.asarray(indices, dtype=np.int64)
        images = torch.from_numpy(self._images[chosen]).view(-1, *SHAPE).to(torch.float32)
        return [(images - self._mean) / self._scale], [torch.from_numpy(self._labels[chosen])]


def load_cifar(spec: Cifar10 | Cifar100) -> TrainingData:
    """The archive at ``spec.path``: unpacked or as .tar.gz, itself or in the folder named.

    Without ``spec.validation`` the official test images are validated on; with it a part of the training images.

    Raises:
        ConfigError: not there, incomplete, or not such an archive.
    """
    archive = CIFAR10 if isinstance(spec, Cifar10) else CIFAR100
    source = _source(Path(spec.path).expanduser(), archive)
    wanted = archive.train if spec.validation is not None else (*archive.train, archive.test)
    files = _from_tar(source, wanted) if source.is_file() else _from_folder(source, wanted)
    records = {name: _records(files[name], f"{source}: {name}", archive) for name in wanted}
    whole = CifarDataset(np.concatenate([records[name] for name in archive.train]), archive)
    train: Dataset
    validation: Dataset
    if spec.validation is None:
        train, validation = whole, CifarDataset(records[archive.test], archive)
    else:
        train, validation = split_dataset(whole, spec.validation, spec.split_seed)
    return describe_data(train, validation, num_classes=archive.num_classes)


def _source(path: Path, archive: Archive) -> Path:
    """The folder with the parts, or the .tar.gz file."""
    if path.is_file():
        return path
    candidates = [path, path / archive.folder]
    for folder in candidates:
        if (folder / archive.train[0]).is_file():
            return folder
    if (path / archive.file).is_file():
        return path / archive.file
    raise ConfigError(
        f"data.path: no {archive.train[0]} and no {archive.file} in {path.absolute()} or its {archive.folder}; get "
        f"https://www.cs.toronto.edu/~kriz/{archive.file} and name the file or its folder"
    )


def _from_folder(folder: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    files = {}
    for name in wanted:
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"data.path: {folder / name} can't be read: {error.strerror or error}") from None
    return files


def _from_tar(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The parts by their base names; nothing is written to disk, and only plain files of a possible size are read."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and name not in files and member.isreg() and member.size <= LARGEST_FILE_BYTES:
                    stream = archive.extractfile(member)
                    if stream is not None:
                        files[name] = stream.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.path: {path} can't be read as a tar archive: {error}") from None
    missing = [name for name in wanted if name not in files]
    if missing:
        raise ConfigError(f"data.path: {path} has no {', '.join(missing)}; expected the official binary archive")
    return files


def _records(content: bytes, where: str, archive: Archive) -> NDArray[np.uint8]:
    size = archive.label_bytes + IMAGE_BYTES
    if not content or len(content) % size:
        raise ConfigError(f"data.path: {where} has {len(content)} bytes, expected a multiple of {size}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    largest = int(records[:, archive.label].max())
    if largest >= archive.num_classes:
        raise ConfigError(f"data.path: {where} has a label {largest}, expected at most {archive.num_classes - 1}")
    return records
