"""Whether the tensors of a message fit the block that they are for, asked before anything acts on them.

message            from              must look like
Offer              worker            as a Forward, where it brings tensors
Forward            worker            the data's samples, of the microbatch's number, with values that the data have
Forward            block before      what the last layer of the block before puts out
BoundaryGradient   block after       what this block's last layer puts out
PushGradient       detached worker   the layer's own trainable parameters
TaskFinished       detached worker   what the block was given
EvaluateForward    worker            the data's validation samples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.data_info import DataInfo
from layerwise.messages import (
    BoundaryGradient,
    EvaluateForward,
    Forward,
    Message,
    NamedTensors,
    Offer,
    PushGradient,
    Samples,
    TaskFinished,
    TaskRequest,
    Tensors,
)
from layerwise.profile import Profile, TensorProfile

Parameters = Mapping[str, tuple[str, tuple[int, ...]]]
"""The dtype and shape of each of a layer's trainable parameters, by name and in order."""

IGNORED_CLASS = -100
"""The target that torch's cross-entropy leaves out."""


class FrameChecks:
    """What fits layers ``[start, stop)``. Any thread.

    ``parameters`` are those of each layer of the block. ``classes`` and ``tokens`` bound targets and inputs where
    they are known to be classes and tokens. Without ``detached`` no worker has business with the block's tasks.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        start: int,
        stop: int,
        parameters: Mapping[int, Parameters],
        detached: bool,
        classes: int | None = None,
        tokens: int | None = None,
    ) -> None:
        info = DataInfo.from_json(profile.data_json) if profile.data_json else None
        self._samples = _of_data(info.input_dtypes, info.input_shapes) if info is not None else ()
        self._targets = _of_data(info.target_dtypes, info.target_shapes) if info is not None else ()
        before = profile.layers[start - 1] if start else None
        self._first = before is None
        self._inputs = self._samples if before is None else before.outputs
        self._single_input = len(self._samples) == 1 if before is None else before.single_output
        self._outputs = profile.layers[stop - 1].outputs
        self._num_validation = profile.num_validation_samples
        self._parameters = parameters
        self._detached = detached
        self._classes = classes
        self._tokens = tokens

    def fault(self, message: Message) -> str:
        """What does not fit, in a few words; empty when all does."""
        match message:
            case Offer(samples=None):
                return ""
            case (
                Forward(dropped=why, inputs=inputs, targets=targets)
                | Offer(samples=Samples(dropped=why, inputs=inputs, targets=targets))
            ) if why:
                return "a dropped microbatch came with tensors" if inputs.items or targets.items else ""
            case BoundaryGradient(dropped=why) if why:
                return "a dropped microbatch came with gradients" if message.gradients.items else ""
            case Forward(inputs=inputs, targets=targets) | Offer(samples=Samples(inputs=inputs, targets=targets)):
                return self._fault_of_samples(inputs, targets, message.attempt.microbatch.num_samples)
            case EvaluateForward():
                if not 0 <= message.start < message.stop <= self._num_validation:
                    return f"there are no validation samples {message.start} to {message.stop}"
                # Layers may put out other things in evaluation than in training, so only the data's are known.
                return (
                    self._fault_of_samples(message.inputs, message.targets, message.stop - message.start)
                    if self._first
                    else _fault("target", message.targets, self._targets, message.stop - message.start)
                )
            case BoundaryGradient():
                return _fault_of_gradients(message.gradients, self._outputs, message.attempt.microbatch.num_samples)
            case TaskRequest() | PushGradient() | TaskFinished() if not self._detached:
                return "the job has no detached backward workers"
            case PushGradient():
                return self._fault_of_push(message.layer, message.gradients)
            case TaskFinished() if message.gradients is not None:
                return _fault_of_gradients(message.gradients, self._inputs, message.attempt.microbatch.num_samples)
        return ""

    def _fault_of_samples(self, inputs: Tensors, targets: Tensors, samples: int) -> str:
        found = _fault("input", inputs, self._inputs, samples) or _fault("target", targets, self._targets, samples)
        if found:
            return found
        if self._inputs and inputs.single != self._single_input:
            return f"the input is {'a tensor' if inputs.single else 'a tuple'}"
        if self._first:
            return _fault_of_values("token", inputs, self._tokens, ()) or _fault_of_values(
                "class", targets, self._classes, (IGNORED_CLASS,)
            )
        return ""

    def _fault_of_push(self, layer: int, gradients: NamedTensors) -> str:
        parameters = self._parameters.get(layer)
        if parameters is None:
            return f"layer {layer} is not in this block"
        if gradients.names != tuple(parameters):
            return f"it names {_short(gradients.names)}, layer {layer} trains {_short(tuple(parameters))}"
        for (name, (dtype, shape)), one in zip(parameters.items(), gradients.items, strict=True):
            if one is not None and (_dtype(one) != dtype or tuple(one.shape) != shape):
                return f"the gradient of {name} is {_describe(one)}, the parameter {dtype}{list(shape)}"
        return ""


def _of_data(dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[TensorProfile, ...]:
    return tuple(
        TensorProfile(dtype=dtype, sizes=((0, 1), *((size, 0) for size in shape)))
        for dtype, shape in zip(dtypes, shapes, strict=True)
    )


def _fault(what: str, found: Tensors, expected: Sequence[TensorProfile | None], samples: int) -> str:
    """What of ``found`` is not as ``expected`` (which is empty when nothing is known)."""
    if not expected:
        return ""
    if len(found.items) != len(expected):
        return f"{len(found.items)} {what}s came, expected {len(expected)}"
    for position, (one, profile) in enumerate(zip(found.items, expected, strict=True)):
        if (one is None) != (profile is None):
            return f"{what} {position} is {'missing' if one is None else 'not expected'}"
        if one is not None and profile is not None and not profile.fits(_dtype(one), tuple(one.shape), samples):
            return f"{what} {position} is {_describe(one)}, expected {profile.describe(samples)} for {samples} samples"
    return ""


def _fault_of_gradients(found: Tensors, expected: Sequence[TensorProfile | None], samples: int) -> str:
    if all(one is None for one in found.items):
        return ""  # nothing below is trainable, and nobody was told how many outputs there are
    present = [profile if one is not None else None for one, profile in zip(found.items, expected, strict=False)]
    if expected and len(found.items) == len(expected):
        return _fault("gradient", found, present, samples)
    return _fault("gradient", found, expected, samples)


def _fault_of_values(what: str, found: Tensors, count: int | None, others: tuple[int, ...]) -> str:
    """Which value is outside ``[0, count)`` and none of ``others``: a layer would fail on it, or read what is not its own."""
    if count is None:
        return ""
    for one in found.items:
        if one is None or one.is_floating_point() or one.numel() == 0:
            continue
        low, high = int(one.min()), int(one.max())
        if high >= count or (low < 0 and low not in others):
            return f"a {what} is {high if high >= count else low}, expected 0 to {count - 1}"
    return ""


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(tensor: Any) -> str:
    return f"{_dtype(tensor)}{list(tensor.shape)}"


def _short(names: tuple[str, ...]) -> str:
    text = ", ".join(names) or "nothing"
    return text if len(text) <= 200 else text[:197] + "..."
