"""From a job file's data to datasets."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.data.arrays import load_arrays
from layerwise.data.cifar import load_cifar
from layerwise.data.dataset import TrainingData
from layerwise.data.digits import load_digits
from layerwise.data.imported import load_imported
from layerwise.data.text import load_text
from layerwise.sections import Arrays, DataSpec, Digits, ImportData, Text


def load_dataset(data: DataSpec, allowed_imports: Sequence[str] = ()) -> TrainingData:
    """Load the data that a job names, with its split; every process gets the same from the same files.

    The split follows ``data.split_seed``, not the seed of the training, so that runs with other seeds are validated on
    the same samples and none is trained on them.

    Raises:
        ConfigError: the data is not there or not what it should be; the message says where it was looked for.
        NotAllowedError: ``data.import`` names a module that ``allowed_imports`` does not cover.
    """
    if isinstance(data, Digits):
        return load_digits(data)
    if isinstance(data, Text):
        return load_text(data)
    if isinstance(data, Arrays):
        return load_arrays(data)
    if isinstance(data, ImportData):
        return load_imported(data, allowed_imports)
    return load_cifar(data)
