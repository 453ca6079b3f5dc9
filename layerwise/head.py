"""What follows the last layer: the loss, and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from layerwise.job import JobSpec
from layerwise.layer_compute import Precision
from layerwise.losses import BuiltMetric, Loss, build_loss, build_metrics
from layerwise.messages import Metric, Tensors


class Head(Protocol):
    """The loss that is trained on, and metrics that are only looked at."""

    def loss(self, outputs: Tensors, targets: Tensors) -> torch.Tensor:
        """The mean loss over the samples, a 0-d tensor."""
        ...

    def metrics(self, outputs: Tensors, targets: Tensors) -> tuple[Metric, ...]:
        """Additive metrics of these samples."""
        ...


def run_head(
    head: Head, outputs: Tensors, targets: Tensors, precision: Precision, *, graph: bool
) -> tuple[torch.Tensor, Tensors]:
    """The loss, and the outputs cut off from the last layer's graph.

    With ``graph`` the one can be differentiated for the other.
    """
    leaves: dict[int, torch.Tensor | None] = {}
    for one in outputs.items:
        leaf = None if one is None else one.detach()
        if leaf is not None and graph and (leaf.is_floating_point() or leaf.is_complex()):
            leaf.requires_grad_()
        leaves.setdefault(id(one), leaf)
    detached = Tensors(tuple(leaves[id(one)] for one in outputs.items), outputs.single)
    with torch.set_grad_enabled(graph), precision.context():
        return head.loss(detached, targets), detached


def loss_gradients(loss: torch.Tensor, items: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """The gradient of ``loss`` for each of ``items`` (``None`` for those that can't have one, or are not used)."""
    leaves = {id(one): one for one in items if one is not None and one.requires_grad}
    if not leaves or not loss.requires_grad:
        return (None,) * len(items)
    found = dict(zip(leaves, torch.autograd.grad([loss], list(leaves.values()), allow_unused=True), strict=True))
    # A tensor that is there twice has one gradient: it goes with its first place.
    return tuple(found.pop(id(one), None) for one in items)


class JobHead:
    """The loss and metrics that a job names."""

    def __init__(self, loss: Loss, metrics: Sequence[BuiltMetric] = ()) -> None:
        self._loss = loss
        self._metrics = tuple(metrics)

    def loss(self, outputs: Tensors, targets: Tensors) -> torch.Tensor:
        """The mean loss over the samples, a 0-d tensor."""
        return self._loss(_value(outputs), _value(targets))

    def metrics(self, outputs: Tensors, targets: Tensors) -> tuple[Metric, ...]:
        """Additive metrics of these samples."""
        found = []
        for metric in self._metrics:
            total, count = metric.measure(_value(outputs), _value(targets))
            found.append(Metric(name=metric.name, total=total, count=count))
        return tuple(found)


def job_head(spec: JobSpec, allowed_imports: Sequence[str] = ()) -> JobHead:
    """What ``spec`` wants computed after its last layer.

    Raises:
        ConfigError, NotAllowedError: as `layerwise.losses`.
    """
    return JobHead(build_loss(spec.loss, allowed_imports), build_metrics(spec.metrics or (), allowed_imports))


def _value(tensors: Tensors) -> Any:
    return tensors.items[0] if tensors.single else tensors.items
