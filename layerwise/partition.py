"""Layers into blocks: the split whose most expensive block is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from layerwise.errors import ConfigError
from layerwise.profile import LayerProfile, Profile


def partition(profile: Profile, num_blocks: int, *, recompute: bool = False) -> tuple[tuple[int, int], ...]:
    """Cut the layers into contiguous blocks ``(start, stop)`` whose largest cost is as small as it can be.

    A layer costs its forward and backward seconds, and one more forward pass when ``recompute`` says that backward
    passes begin with one. Layers that hold the same parameter stay together.

    Raises:
        ConfigError: there are fewer layers than blocks, or too few places where a split is allowed.
    """
    layers = profile.layers
    if num_blocks > len(layers):
        raise ConfigError(
            f"cluster.shards is {num_blocks}, but the model has only {len(layers)} layers; a shard needs at least one"
        )
    places = _split_places(layers)
    if num_blocks - 1 > len(places) - 2:
        sharing = sorted(
            {index for layer in layers if layer.shares_with for index in (layer.index, *layer.shares_with)}
        )
        raise ConfigError(
            f"cluster.shards is {num_blocks}, but layers {', '.join(map(str, sharing))} share parameters and must stay "
            f"in one block, which leaves at most {len(places) - 1} blocks; use fewer shards or do not share parameters"
        )
    costs = layer_costs(layers, recompute=recompute)
    before = [0.0, *accumulate(costs)]
    return _cheapest(places, before, num_blocks)


def layer_cost(layer: LayerProfile, *, recompute: bool = False) -> float:
    """Seconds that one microbatch costs in ``layer``."""
    return layer.forward_seconds * (2 if recompute else 1) + layer.backward_seconds


def layer_costs(layers: Sequence[LayerProfile], *, recompute: bool = False) -> list[float]:
    """The cost of each layer in seconds, where layers that do the same work cost the same.

    A measurement can only be too long (something else had the processor), so the shortest of each kind stands. Two
    layers are of one kind when their class, parameters, kept bytes, inputs and outputs are alike.
    """
    shortest: dict[tuple[object, ...], float] = {}
    kinds = []
    inputs: tuple[tuple[int, ...], ...] = ()
    for layer in layers:
        kind = (
            layer.name.partition("-")[2],
            layer.parameters,
            layer.trainable,
            layer.parameter_bytes,
            layer.activation_bytes,
            inputs,
            layer.output_shapes,
        )
        inputs = layer.output_shapes
        kinds.append(kind)
        cost = layer_cost(layer, recompute=recompute)
        shortest[kind] = min(cost, shortest.get(kind, cost))
    return [shortest[kind] for kind in kinds]


def _split_places(layers: Sequence[LayerProfile]) -> list[int]:
    """Where a block may begin or end: not between two layers that share a parameter."""
    together = [False] * (len(layers) + 1)
    for layer in layers:
        for other in layer.shares_with:
            for place in range(min(layer.index, other) + 1, max(layer.index, other) + 1):
                together[place] = True
    return [place for place in range(len(layers) + 1) if not together[place]]


def _cheapest(places: list[int], before: list[float], num_blocks: int) -> tuple[tuple[int, int], ...]:
    """Exact dynamic programme: ``best[j]`` is the smallest largest cost up to ``places[j]``, and the split."""
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, (0,)), *[None] * (len(places) - 1)]
    for _ in range(num_blocks):
        following: list[tuple[float, tuple[int, ...]] | None] = [None] * len(places)
        for stop in range(1, len(places)):
            for start in range(stop):
                prefix = best[start]
                if prefix is None:
                    continue
                largest = max(prefix[0], before[places[stop]] - before[places[start]])
                known = following[stop]
                if known is None or largest < known[0]:
                    following[stop] = (largest, (*prefix[1], places[stop]))
        best = following
    answer = best[-1]
    assert answer is not None, "the number of places was checked"
    return tuple(zip(answer[1][:-1], answer[1][1:], strict=True))
