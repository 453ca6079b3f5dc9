"""The backward walk: one loop for attached and detached workers.

outputs' gradient ─► layer 7 ─► layer 6 ─► layer 5 ─► gradient of the block's input
                       │          │          │
                       ▼          ▼          ▼
                     sink       sink       sink      each before the next layer begins
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerwise.gradient_sum import Gradients
from layerwise.ids import Microbatch
from layerwise.layer_compute import Destination, LayerCompute, LayerPass
from layerwise.messages import Tensors
from layerwise.tasks import Steps

Sink = Callable[[LayerPass, Gradients, tuple[int, ...]], None]
"""``sink(layer_pass, gradients, reads)``: gradients in the order of the layer's own parameters, and what was read."""


def walk_backward(
    passes: list[LayerPass], gradients: Sequence[torch.Tensor | None], sink: Sink
) -> Steps[tuple[torch.Tensor | None, ...]]:
    """Differentiate ``passes`` from last to first; gives the gradients of the first one's inputs.

    ``gradients`` belong to the last one's outputs.

    Each layer reaches ``sink`` as soon as its gradient exists, also when that is empty, as it is for a layer without a
    ticket. A parameter that several layers of the block hold belongs to the lowest: what the others find is carried down to it. ``passes`` is
    emptied on the way, so that each layer's graph is freed when it is done. Yields after each layer.
    """
    carried: dict[Destination, torch.Tensor] = {}
    flowing = tuple(gradients)
    while passes:
        forward = passes.pop()
        found = forward.compute.gradients(forward, flowing)
        flowing = found.inputs
        if forward.compute.foreign or carried:
            own = _gather(forward, found.parameters, carried)
        else:
            own = found.parameters
        sink(forward, own, found.reads)
        forward.outputs = None
        yield None
    return flowing


def forward_again(
    layers: Sequence[LayerCompute],
    inputs: Tensors,
    buffers: Sequence[tuple[torch.Tensor, ...] | None],
    microbatch: Microbatch,
    *,
    tickets: frozenset[int],
    gradient: bool,
    passes: list[LayerPass],
) -> Steps[Tensors]:
    """The forward pass through ``layers`` once more, for graphs that were not kept; gives the last one's outputs.

    ``buffers`` are each layer's as first read. ``gradient``: that of ``inputs`` will be wanted. ``passes`` gets what
    `walk_backward` needs. Yields after each layer.
    """
    flows: list[bool] | None = None
    values = inputs
    for layer, as_read in zip(layers, buffers, strict=True):
        leaves = layer.prepare(values, gradient=gradient, flows=flows)
        one = layer.again(leaves, as_read, microbatch, tickets)
        assert one.outputs is not None
        passes.append(one)
        values = one.outputs
        flows = [item is not None and item.requires_grad for item in values.items]
        gradient = gradient or bool(one.parameters)
        yield None
    return values


def _gather(
    forward: LayerPass, found: Gradients, carried: dict[Destination, torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """The layer's own gradients with what higher layers found for them; the others' are put into ``carried``."""
    own: list[torch.Tensor | None] = [None] * (len(forward.compute.owned) if forward.ticket else 0)
    for destination, gradient in zip(forward.destinations, found, strict=True):
        layer, position = destination
        if layer == forward.index:
            own[position] = gradient
        elif gradient is not None:
            before = carried.get(destination)
            carried[destination] = gradient if before is None else before + gradient
    if forward.ticket:
        for position, gradient in enumerate(own):
            before = carried.pop((forward.index, position), None)
            if before is not None:
                own[position] = before if gradient is None else before + gradient
    return tuple(own)
