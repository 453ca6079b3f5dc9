"""Losses and metrics: what the last block makes of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from layerwise.errors import ConfigError
from layerwise.imports import load_import
from layerwise.section import Import
from layerwise.sections import Accuracy, CrossEntropy, LossSpec, MetricSpec

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, targets)``: the mean over the samples, 0-d. Targets are one tensor or a sequence of them."""

RESERVED = ("loss", "number", "samples", "seconds", "version")
"""What an evaluation's result says beside the metrics."""


@dataclass(frozen=True, slots=True)
class BuiltMetric:
    """``name`` and ``measure(output, targets) -> (sum, count)``; sums and counts of several batches may be added."""

    name: str
    measure: Callable[[Any, Any], tuple[float, float]]


def build_loss(spec: LossSpec, allowed_imports: Sequence[str] = ()) -> Loss:
    """The loss that the job names. An imported one is called as ``function(output, targets, **arguments)``.

    Raises:
        ConfigError: the function can't be loaded.
        NotAllowedError: its module is not covered by ``allowed_imports``.
    """
    if isinstance(spec, Import):
        function = load_import(spec.target, allowed_imports, key="loss.import")
        return partial(_imported_loss, function, spec.arguments, spec.target)
    if isinstance(spec, CrossEntropy):
        return partial(_cross_entropy, label_smoothing=spec.label_smoothing)
    return _mean_squared_error


def build_metrics(specs: Sequence[MetricSpec], allowed_imports: Sequence[str] = ()) -> list[BuiltMetric]:
    """The metrics that the job names. An imported one returns ``(sum, count)``, or a mean, which counts once a batch.

    Raises:
        ConfigError: a function can't be loaded, or two metrics have one name, or one has a name that is `RESERVED`.
        NotAllowedError: a module is not covered by ``allowed_imports``.
    """
    built = []
    for spec in specs:
        if isinstance(spec, Import):
            function = load_import(spec.target, allowed_imports, key="metrics.import")
            name = spec.target.rpartition(":")[2].rpartition(".")[2]
            built.append(BuiltMetric(name, partial(_imported_metric, function, spec.arguments, spec.target)))
        elif isinstance(spec, Accuracy):
            name = "accuracy" if spec.top == 1 else f"accuracy_top_{spec.top}"
            built.append(BuiltMetric(name, partial(_accuracy, top=spec.top)))
        else:
            built.append(BuiltMetric("mae", _absolute_error))
    names = [one.name for one in built]
    for name in names:
        if name in RESERVED:
            raise ConfigError(
                f"metrics.import: got a function called {name!r}, expected another name than {', '.join(RESERVED)}, which a "
                f"result has already; rename it, or import it from a module of yours under another name"
            )
        if names.count(name) > 1:
            raise ConfigError(f"metrics: got {name!r} {names.count(name)} times, expected each name once")
    return built


def _one(value: Any) -> Any:
    """The only tensor of a sequence, or what was given."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _wide(output: Tensor) -> Tensor:
    """Half precision is too coarse for sums over a batch."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def _classes_last(output: Tensor, targets: Tensor, key: str) -> Tensor:
    """``output`` with its classes in the last dimension: ``[samples, ..., classes]`` or ``[samples, classes, ...]``.

    Raises:
        ConfigError: neither fits the targets' shape.
    """
    if output.shape[:-1] == targets.shape:
        return output
    if output.ndim == targets.ndim + 1 and (output.shape[0], *output.shape[2:]) == tuple(targets.shape):
        return output.movedim(1, -1)
    raise ConfigError(
        f"{key}: the output {list(output.shape)} does not fit targets {list(targets.shape)}; expected one more "
        "dimension, the classes, last or second"
    )


def _cross_entropy(output: Any, targets: Any, *, label_smoothing: float) -> Tensor:
    scores, labels = _wide(_one(output)), _one(targets)
    if labels.is_floating_point():
        raise ConfigError(
            f"loss: cross-entropy takes classes, whole numbers, as targets, and got {str(labels.dtype).removeprefix('torch.')}; "
            "use mse, or a loss of your own, for numbers that are measured"
        )
    scores = _classes_last(scores, labels, "loss")
    return functional.cross_entropy(
        scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).long(), label_smoothing=label_smoothing
    )


def _same_shape(output: Any, targets: Any, key: str) -> tuple[Tensor, Tensor]:
    values, wanted = _wide(_one(output)), _one(targets)
    if values.shape != wanted.shape and values.ndim == wanted.ndim + 1 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    if values.shape != wanted.shape:
        raise ConfigError(
            f"{key}: the output {list(values.shape)} does not fit targets {list(wanted.shape)}; expected one shape"
        )
    return values, wanted.to(values.dtype)


def _mean_squared_error(output: Any, targets: Any) -> Tensor:
    return functional.mse_loss(*_same_shape(output, targets, "loss"))


def _accuracy(output: Any, targets: Any, *, top: int) -> tuple[float, float]:
    labels = _one(targets)
    scores = _classes_last(_one(output), labels, "metrics: accuracy")
    if top == 1:
        hits = scores.argmax(dim=-1) == labels
    else:
        hits = (scores.topk(min(top, scores.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)).any(dim=-1)
    return float(hits.sum()), float(labels.numel())


def _absolute_error(output: Any, targets: Any) -> tuple[float, float]:
    values, wanted = _same_shape(output, targets, "metrics: mae")
    return float((values - wanted).abs().sum(dtype=torch.float64)), float(wanted.numel())


def _imported_loss(
    function: Callable[..., Any], arguments: dict[str, Any], target: str, output: Any, targets: Any
) -> Tensor:
    loss = function(_one(output), _one(targets), **arguments)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"loss.import: {target} returned {shape}, expected a 0-d tensor, the mean over the samples")
    return loss


def _imported_metric(
    function: Callable[..., Any], arguments: dict[str, Any], target: str, output: Any, targets: Any
) -> tuple[float, float]:
    found = function(_one(output), _one(targets), **arguments)
    try:
        if isinstance(found, (tuple, list)):
            total, count = found
            return float(total), float(count)
        return float(found), 1.0
    except (TypeError, ValueError):
        raise ConfigError(f"metrics.import: {target} returned {type(found).__name__}, expected (sum, count)") from None
