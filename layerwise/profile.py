"""What a probe learned of a job's model and data: enough to place blocks, without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.errors import MalformedMessageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorProfile:
    """What is known of one tensor: torch's name of its dtype, and its sizes as ``(fixed, for each sample)``.

    ``None`` stands for a size that follows neither rule, as far as was seen.
    """

    dtype: str
    sizes: tuple[tuple[int, int] | None, ...]

    def fits(self, dtype: str, shape: tuple[int, ...], num_samples: int) -> bool:
        """Whether a tensor of ``num_samples`` samples may look so."""
        return (
            dtype == self.dtype
            and len(shape) == len(self.sizes)
            and all(
                one is None or size == one[0] + one[1] * num_samples
                for size, one in zip(shape, self.sizes, strict=True)
            )
        )

    def describe(self, num_samples: int) -> str:
        """The dtype and shape that ``num_samples`` samples have."""
        sizes = ("?" if one is None else str(one[0] + one[1] * num_samples) for one in self.sizes)
        return f"{self.dtype}[{', '.join(sizes)}]"


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
    outputs: tuple[TensorProfile | None, ...] = ()
    """What it puts out in training, ``None`` where there is no tensor (empty: not known)."""
    single_output: bool = True
    """It puts out a bare tensor."""
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
                layer["outputs"] = tuple(_tensor(one) for one in layer.get("outputs", ()))
                layers.append(LayerProfile(**layer))
            value["notes"] = tuple(value.get("notes", ()))
            return cls(layers=tuple(layers), **value)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise MalformedMessageError(f"not a profile document ({error}): {text[:200]!r}") from error


def _tensor(value: Any) -> TensorProfile | None:
    if value is None:
        return None
    sizes = tuple(None if one is None else (int(one[0]), int(one[1])) for one in value["sizes"])
    return TensorProfile(dtype=value["dtype"], sizes=sizes)
