from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from layerwise.messages import BlockPlace, CutSaved, CutTaken, StopAt
from layerwise.plan import TrainingPlan
from layerwise.roles import Send
from layerwise.server.admission import MAX_PENDING_CUTS
from layerwise.server.block_context import BlockContext
from layerwise.server.block_cuts import BlockCuts
from layerwise.server.cut_schedule import CutSchedule
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import BlockCompute

FINAL = 50
ROUTE = (
    BlockPlace(start=0, stop=1, shard="shard-0", address="here:0", life=5),
    BlockPlace(start=1, stop=2, shard="shard-1", address="here:1", life=6),
)


class Layers:
    """What the layers are told; both are at ``version``."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.due: list[int] = []
        self.held: set[int] = set()

    def cut_at(self, version: int) -> None:
        if version not in self.due:
            self.due.append(version)

    def hold_cut(self, version: int) -> None:
        self.held.add(version)

    def report(self) -> tuple[SimpleNamespace, ...]:
        return (SimpleNamespace(version=self.version - 1), SimpleNamespace(version=self.version))


def cuts_of(layers: Layers, *, version: int = 0, from_cut: bool = True) -> BlockCuts:
    """Those of the first block, one at every version."""
    context = BlockContext(
        job="job",
        block=0,
        route=ROUTE,
        plan=TrainingPlan(num_samples=2, batch=2, accumulation=1, num_updates=FINAL),
        window=1,
        compute=cast(BlockCompute, layers),
        queue=TaskQueue(window=1, num_layers=1, attached=True),
        layer_names=("layer-0", "layer-1"),
        coordinator="coordinator",
        generation=0,
    )
    return BlockCuts(context, CutSchedule(final=FINAL, intervals=(1,)), version=version, from_cut=from_cut)


def taken(version: int) -> Send:
    return Send("coordinator", CutTaken(job="job", block=0, version=version))


def test_layers_know_of_every_cut_that_may_be_pending_and_one_more_and_keep_the_copies() -> None:
    layers = Layers(version=0)
    cuts = cuts_of(layers)
    assert cuts.begin() == []
    ahead = MAX_PENDING_CUTS + 1
    assert layers.due == list(range(1, ahead + 1))
    assert cuts.on_taken(1) == [taken(1)]
    assert layers.due == list(range(1, ahead + 2))
    assert layers.held == set(layers.due)


def test_a_restored_cut_is_told_of_and_one_that_a_standby_copy_has_is_made_anew() -> None:
    restored, standby = Layers(version=7), Layers(version=7)
    assert cuts_of(restored, version=7).begin() == [taken(7)]
    assert cuts_of(standby, version=7, from_cut=False).begin() == []
    assert (restored.due[0], standby.due[-1]) == (8, 7)


def test_of_many_cuts_the_newest_are_told_again_in_order() -> None:
    cuts = cuts_of(Layers(version=0))
    for version in range(1, 31):
        cuts.on_taken(version)
        cuts.on_saved(version, (), "")
    kept = 2 * (MAX_PENDING_CUTS + 1)
    assert cuts.tell_again(0) == [
        one
        for version in range(31 - kept, 31)
        for one in (taken(version), Send("coordinator", CutSaved(job="job", block=0, version=version)))
    ]


def test_a_stop_ahead_of_the_layers_ends_the_cuts_there_and_is_handed_on() -> None:
    layers = Layers(version=9)
    cuts = cuts_of(layers, version=9)
    assert cuts.on_stop_at(StopAt(job="job", version=10, life=5)) == [
        Send("shard-1", StopAt(job="job", version=10, life=6))
    ]
    assert (layers.due, cuts.is_final(10), cuts.is_final(FINAL)) == ([10], True, False)
    cuts.on_taken(10)
    assert layers.due == [10]


def test_a_stop_behind_a_layer_is_refused_and_changes_nothing() -> None:
    layers = Layers(version=9)
    cuts = cuts_of(layers, version=9)
    with pytest.raises(ValueError, match="can't stop at version 8, the block is at version 9"):
        cuts.on_stop_at(StopAt(job="job", version=8, life=5))
    assert (layers.due, cuts.is_final(FINAL)) == ([], True)
