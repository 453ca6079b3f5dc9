"""What training a job will take and bring, from its profile: blocks, memory, cost, staleness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.partition import layer_costs
from layerwise.profile import Profile

if TYPE_CHECKING:
    from layerwise.settings import ResolvedSettings


KEPT_STATES = 3
"""Standby copies that a keeper has at most: two, and one that arrives."""
OWN_STATES = 4
"""States of a block's own at most: two clones, one of which becomes bytes, and the bytes of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """One shard's part. Seconds are for one microbatch; bytes are at the fullest moment of training.

    ``state_bytes``: parameters, buffers and moments. ``store_bytes``: what the activation store holds with a whole
    window in flight. ``standby_bytes``: the standby copies of the block before, which are kept here where all shards are on
    one host, and the block's own while they are made ready. ``expected_staleness`` is the mean in updates when gradients arrive in order.
    """

    block: int
    start: int
    stop: int
    first_layer: str
    last_layer: str
    parameters: int
    state_bytes: int
    store_bytes: int
    standby_bytes: int
    forward_seconds: float
    backward_seconds: float
    cost_share: float
    expected_staleness: float


def plan_blocks(
    profile: Profile, settings: ResolvedSettings, blocks: tuple[tuple[int, int], ...]
) -> tuple[BlockPlan, ...]:
    """Describe each of ``blocks``.

    With W microbatches in flight over K blocks of equal cost, block k's weights move while a microbatch travels to
    the last block and back: W - 1 gradients arrive in between at the first block and none at the last, so its mean
    staleness is (W - 1) (K - 1 - k) / (K - 1) gradients, divided by the gradients in an update.
    """
    recompute = settings.backward_weights == "recompute"
    each = layer_costs(profile.layers, recompute=recompute)
    costs = [sum(each[start:stop]) for start, stop in blocks]
    last = len(blocks) - 1
    window = settings.window
    states = [sum(layer.state_bytes for layer in profile.layers[start:stop]) for start, stop in blocks]
    found = []
    for block, (start, stop) in enumerate(blocks):
        layers = profile.layers[start:stop]
        activations = sum(layer.activation_bytes for layer in layers)
        inputs = profile.layers[start - 1].output_bytes if start else profile.input_bytes
        stale = 0.0
        if settings.mode == "asynchronous" and last:
            stale = (window - 1) * (last - block) / last / settings.accumulation
        found.append(
            BlockPlan(
                block=block,
                start=start,
                stop=stop,
                first_layer=layers[0].name,
                last_layer=layers[-1].name,
                parameters=sum(layer.parameters for layer in layers),
                state_bytes=states[block],
                store_bytes=window * inputs + activations if recompute else window * (inputs + activations),
                standby_bytes=KEPT_STATES * states[block - 1] + OWN_STATES * states[block]
                if settings.standby_every
                else 0,
                forward_seconds=sum(layer.forward_seconds for layer in layers),
                backward_seconds=sum(layer.backward_seconds for layer in layers),
                cost_share=costs[block] / sum(costs) if sum(costs) else 0.0,
                expected_staleness=stale,
            )
        )
    return tuple(found)
