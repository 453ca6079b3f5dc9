"""What a probe learned of a job's model and data: enough to place blocks, without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from layerwise.errors import MalformedMessageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer. Seconds and bytes are for one microbatch of ``Profile.microbatch_samples`` samples."""

    index: int
    name: str
    parameters: int
    trainable: int
    parameter_bytes: int
    state_bytes: int
    """Parameters, buffers and the optimizer's moments together."""
    forward_seconds: float
    backward_seconds: float
    activation_bytes: int
    output_bytes: int
    output_shapes: tuple[tuple[int, ...], ...]
    shares_with: tuple[int, ...] = ()
    """Other layers that hold one of this layer's parameters: they must be in the same block."""
    derived_weights: bool = False
    """Autograd saves weights derived from the parameters (autocast, weight_norm), so `latest` recomputes this layer."""
    clones_input: bool = False
    """The layer writes into its input, so it is given a copy."""
    batch_statistics: bool = False
    """The layer normalises by the mean and variance of the microbatch (BatchNorm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A job's model and data as measured on one shard."""

    layers: tuple[LayerProfile, ...]
    num_train_samples: int
    num_validation_samples: int
    microbatch_samples: int
    input_bytes: int
    hop_seconds: float = 0.0
    data_json: str = ""
    """`layerwise.data_info.DataInfo` as JSON: what a process needs to build the model without loading the data."""
    single_sample_error: str = ""
    """Why the model can't be trained on a microbatch of one sample; empty where it can."""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The inverse of `to_json`; ``MalformedMessageError`` for anything else."""
        try:
            value = json.loads(text)
            layers = []
            for layer in value.pop("layers"):
                layer["output_shapes"] = tuple(tuple(shape) for shape in layer["output_shapes"])
                layer["shares_with"] = tuple(layer["shares_with"])
                layers.append(LayerProfile(**layer))
            value["notes"] = tuple(value.get("notes", ()))
            return cls(layers=tuple(layers), **value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MalformedMessageError(f"not a profile document ({error}): {text[:200]!r}") from error
