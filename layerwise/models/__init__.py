"""Built-in models and the user's own: an ordered list of ``nn.Module``, each the unit of update."""

from layerwise.models.build import SharedTensor, build_model, check_layers, layer_names, shared_tensors
from layerwise.models.weights import load_weights, model_tensors

__all__ = [
    "SharedTensor",
    "build_model",
    "check_layers",
    "layer_names",
    "load_weights",
    "model_tensors",
    "shared_tensors",
]
