"""Looking at a block's layers without training them: a cut in evaluation mode, and which output is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerwise.device import HostTransfers
from layerwise.head import Head, run_head
from layerwise.ids import Microbatch
from layerwise.kept_pass import KeptPass
from layerwise.layer import LayerCopy, TrainedLayer
from layerwise.layer_compute import Precision
from layerwise.messages import Metric, Tensors
from layerwise.tasks import EvaluateResult, EvaluateTask, Steps


def evaluate_copies(
    task: EvaluateTask,
    copies: Sequence[LayerCopy],
    layers: Sequence[TrainedLayer],
    head: Head | None,
    transfers: HostTransfers,
    precision: Precision,
) -> Steps[EvaluateResult]:
    """Run ``layers`` in evaluation mode with the tensors of ``copies``; the layers' own do not change."""
    owners = {
        (copy.layer, position): tensor
        for copy, layer in zip(copies, layers, strict=True)
        for position, tensor in enumerate(copy.parameters[name] for name in layer.compute.owned)
    }
    samples = Microbatch(0, task.start, task.stop)
    values = transfers.load(task.inputs)
    for copy, layer in zip(copies, layers, strict=True):
        foreign = {id(parameter): owners[where] for parameter, where in layer.compute.foreign}
        parameters = [
            foreign[id(parameter)] if id(parameter) in foreign else copy.parameters.get(name, parameter)
            for name, parameter in layer.module.parameters.items()
        ]
        with transfers.computing():
            values = layer.compute.evaluate(values, samples, parameters, tuple(copy.buffers.values()))
        yield None
    with transfers.computing(), torch.no_grad():
        if head is None:
            return EvaluateResult(outputs=transfers.unload(values))
        targets = transfers.load(task.targets)
        loss, _ = run_head(head, values, targets, precision, graph=False)
        count = float(task.stop - task.start)
        return EvaluateResult(
            outputs=None,
            loss=Metric(name="loss", total=float(loss.detach()) * count, count=count),
            metrics=head.metrics(values, targets),
        )


def first_not_finite(kept: KeptPass, layers: Sequence[TrainedLayer]) -> int | None:
    """See `Block.first_not_finite`."""
    made = {one.index: one.outputs for one in kept.passes if one.outputs is not None}
    values = kept.inputs
    if not _finite(values):
        return -1
    for layer, buffers in zip(layers, kept.buffers, strict=True):
        found = made.get(layer.index)
        if found is None:
            with layer.compute.guard(exchanges=layer.module.may_write_buffers):
                found = layer.compute.run(values, kept.attempt.microbatch, graph=False, buffers=buffers)
        if not _finite(found):
            return layer.index
        values = found
    return None


def _finite(tensors: Tensors) -> bool:
    return all(
        bool(torch.isfinite(one).all())
        for one in tensors.items
        if one is not None and (one.is_floating_point() or one.is_complex())
    )
