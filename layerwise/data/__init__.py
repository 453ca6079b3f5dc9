"""Built-in data sources and the user's own: samples by index, the same in every process."""

from layerwise.data.dataset import Batch, Dataset, TrainingData
from layerwise.data.load import load_dataset
from layerwise.data.sampling import microbatch_indices, permutation

__all__ = ["Batch", "Dataset", "TrainingData", "load_dataset", "microbatch_indices", "permutation"]
