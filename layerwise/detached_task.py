"""What a shard gives to a detached worker, and takes back from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerwise.device import HostTransfers
from layerwise.errors import RejectedError
from layerwise.kept_pass import KeptPass
from layerwise.layer import TrainedLayer
from layerwise.messages import DetachedTask, LayerState, NamedTensors, Tensors
from layerwise.tasks import BackwardTask


def detached_task(
    task: BackwardTask,
    job: str,
    life: int,
    kept: KeptPass,
    layers: Sequence[TrainedLayer],
    states: tuple[LayerState, ...],
    targets: Tensors | None,
    host: HostTransfers,
) -> DetachedTask:
    """``task`` with all that a worker needs for it beside the states that it holds already."""
    return DetachedTask(
        job=job,
        attempt=task.attempt,
        number=task.number,
        life=life,
        inputs=host.unload(kept.inputs),
        targets=None if targets is None else host.unload(targets),
        gradients=task.gradients,
        buffers=tuple(
            (layer.index, _named(host, layer.module.buffer_names, buffers))
            for layer, buffers in zip(layers, kept.buffers, strict=True)
            if layer.module.may_write_buffers  # the others the worker has itself
        ),
        lacking=tuple(sorted(kept.tickets)),
        input_gradient=kept.input_gradient,
        states=states,
    )


def check_pushed(layer: TrainedLayer, named: NamedTensors) -> None:
    """Refuse gradients that are not of ``layer``'s parameters.

    Raises:
        RejectedError: a name or a shape is not the layer's.
    """
    owned = layer.compute.owned
    if named.names != tuple(owned):
        raise RejectedError(
            f"gradient for layer {layer.index} refused: it names {named.names}, the layer's trainable parameters "
            f"are {tuple(owned)}"
        )
    for (name, parameter), gradient in zip(owned.items(), named.items, strict=True):
        if gradient is not None and gradient.shape != parameter.shape:
            raise RejectedError(
                f"gradient for layer {layer.index} refused: {name} has shape {tuple(gradient.shape)}, the "
                f"parameter {tuple(parameter.shape)}"
            )


def _named(host: HostTransfers, names: tuple[str, ...], items: tuple[torch.Tensor, ...]) -> NamedTensors:
    return NamedTensors(names, host.unload(Tensors(items, single=False)).items)
