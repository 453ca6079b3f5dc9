"""scikit-learn's handwritten digits: 1,797 images of 8x8 grey values from 0 to 16, in 10 classes."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from layerwise.data.dataset import TensorDataset, TrainingData, describe_data, split_dataset
from layerwise.errors import ConfigError
from layerwise.sections import Digits

SIDE = 8
NUM_CLASSES = 10
MIDDLE_GREY = 8.0


def load_digits(spec: Digits) -> TrainingData:
    """Images ``float32 [1, 8, 8]``, or ``[64]`` with ``layout: flat``, scaled to -1 .. 1.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    table = torch.from_numpy(_table())
    shape = (-1, SIDE * SIDE) if spec.layout == "flat" else (-1, 1, SIDE, SIDE)
    images = (table[:, :-1] / MIDDLE_GREY - 1).to(torch.float32).reshape(shape).contiguous()
    whole = TensorDataset([images], [table[:, -1].to(torch.int64).contiguous()])
    train, validation = split_dataset(whole, spec.validation or 0.0, spec.split_seed)
    return describe_data(train, validation, num_classes=NUM_CLASSES)


def _table() -> NDArray[np.float64]:
    """One row a sample: 64 grey values and the class."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigError(
            "data.name: digits come with scikit-learn, which is not installed; install it with pip install scikit-learn"
        )
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():  # 50 times faster than importing scikit-learn for it
        with gzip.open(path, "rt", encoding="ascii") as file:
            return np.loadtxt(file, delimiter=",", dtype=np.float64)
    from sklearn.datasets import load_digits as from_sklearn

    found = from_sklearn()
    return np.column_stack([found.data, found.target]).astype(np.float64)
