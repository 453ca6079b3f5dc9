"""The parts of a replay, each for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.applied import AppliedSet
from layerwise.errors import ConfigError, CorruptError
from layerwise.event_log import EventLog, LogHeader
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    Event,
    ForwardEvent,
    RestoreEvent,
    UpdateEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Tensors
from layerwise.plan import TrainingPlan
from layerwise.replay import Until, parse_until
from layerwise.replay.exchange import Exchange, Handed, travelled
from layerwise.replay.history import History, last_at, read_history
from layerwise.replay.life_index import index_life
from layerwise.replay.past_weights import PastWeights
from tests.unit.pipeline import Pipeline

PLAN = TrainingPlan(num_samples=16, batch=4, accumulation=2, num_updates=4)
ONE = Attempt(PLAN.microbatch(0))


def samples(microbatch: Microbatch) -> tuple[Tensors, Tensors]:
    return Tensors((torch.full((2,), float(microbatch.start)),)), Tensors((torch.zeros(2),))


# Exchange -----------------------------------------------------------------------------------------------------------


def handed(value: float) -> Handed:
    return Handed(inputs=Tensors((torch.tensor(value),)), targets=Tensors((None,)), needed_from=0)


def test_the_first_block_gets_samples_and_the_others_what_the_one_below_has_put_out() -> None:
    exchange = Exchange(samples, num_layers=4)
    first = exchange.take_forward(0, Attempt(PLAN.microbatch(3)))
    assert first is not None
    assert float(first.inputs.items[0][0]) == 6.0
    assert first.needed_from == 4
    assert exchange.take_forward(2, ONE) is None
    exchange.put_forward(2, ONE, handed(1.0))
    assert exchange.waiting(2) == 1
    assert exchange.take_forward(2, ONE) is not None
    assert exchange.take_forward(2, ONE) is None


def test_a_gradient_stays_until_it_is_dropped() -> None:
    exchange = Exchange(samples, num_layers=4)
    assert exchange.gradient(2, ONE) is None
    exchange.put_gradient(2, ONE, Tensors((None,)))
    assert exchange.gradient(2, ONE) is not None
    assert exchange.gradient(2, ONE) is not None
    exchange.drop_gradient(2, ONE)
    assert exchange.gradient(2, ONE) is None


def test_what_was_for_older_attempts_is_forgotten_when_a_later_one_begins() -> None:
    exchange = Exchange(samples, num_layers=4)
    later, other = Attempt(ONE.microbatch, 2), Attempt(PLAN.microbatch(1))
    for attempt in (ONE, later, other):
        exchange.put_forward(2, attempt, handed(1.0))
        exchange.put_gradient(2, attempt, Tensors((None,)))
    exchange.take_forward(2, later)
    assert exchange.take_forward(2, ONE) is None
    assert exchange.take_forward(2, other) is not None
    exchange.begin(2, later)
    assert exchange.gradient(2, ONE) is None
    assert exchange.gradient(2, other) is not None


def test_tensors_arrive_as_from_a_journey() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    sent = Tensors((whole[:, 1:3], None, whole.t()), single=False)
    arrived = travelled(sent)
    assert torch.equal(arrived.items[0], whole[:, 1:3])
    assert arrived.items[0].is_contiguous()
    assert arrived.items[1] is None
    assert arrived.items[2].stride() == whole.t().stride()
    whole.zero_()
    assert float(arrived.items[2].sum()) == float(torch.arange(24.0).sum())


# Past weights -------------------------------------------------------------------------------------------------------


def test_a_pass_reads_the_version_that_its_layer_has_left_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    pipeline = Pipeline([nn.Linear(3, 3), nn.Linear(3, 5)], [torch.randn(8, 3)], torch.arange(8) % 5, batch=4)
    (layer, _) = pipeline.blocks[0].layers
    past = PastWeights(pipeline.blocks[0].layers, pipeline.plan, {(0, 0): 2})
    before = layer.module.module.weight.detach().clone()
    past.before_intake(layer)
    pipeline.train(0, 2)
    now = layer.module.module.weight.detach().clone()
    assert layer.ledger.version == 2
    assert not torch.equal(before, now)
    for left in (1, 0):
        with past.reading({0: 0}):
            assert torch.equal(layer.module.module.weight, before)
            assert layer.compute.version() == 0
        assert torch.equal(layer.module.module.weight, now)
        assert layer.compute.version() == 2
        assert len(past) == left
    with pytest.raises(CorruptError, match="has not been at that one"), past.reading({0: 1}):
        pass


def test_only_versions_that_somebody_will_read_are_kept() -> None:
    pipeline = Pipeline([nn.Linear(3, 5)], [torch.randn(8, 3)], torch.arange(8) % 5, batch=4, accumulation=2)
    (layer,) = pipeline.blocks[0].layers
    past = PastWeights([layer], pipeline.plan, {(0, 1): 1})
    for index, kept in enumerate((0, 0, 0, 1)):
        pipeline.forward(index)
        past.before_intake(layer)
        pipeline.backward(index)
        assert len(past) == kept


# The index of a life ------------------------------------------------------------------------------------------------


def restore(layer: int, version: int = 0) -> RestoreEvent:
    index = PLAN.gradients_before(version)
    return RestoreEvent(
        layer=layer,
        version=version,
        revision=0,
        samples=0,
        digest="",
        applied=AppliedSet(index),
        buffers=AppliedSet(index),
    )


def forward(layer: int, index: int, read: int) -> ForwardEvent:
    return ForwardEvent(layer=layer, attempt=Attempt(PLAN.microbatch(index)), number=index, read=read, buffers=True)


def take(layer: int, index: int, read: int, update: int, mode: WeightMode = WeightMode.LATEST) -> AccumulateEvent:
    attempt = Attempt(PLAN.microbatch(index))
    return AccumulateEvent(
        layer=layer, attempt=attempt, number=index, base=0, read=read, mode=mode, update=update, owners=()
    )


def update(layer: int, version: int) -> UpdateEvent:
    return UpdateEvent(
        layer=layer,
        version=version,
        revision=version,
        gradients=2,
        samples=4,
        samples_before=0,
        staleness=0,
        open_tickets=0,
        learning_rate=0.1,
        digest="",
    )


def cut(layer: int, version: int) -> CutEvent:
    return CutEvent(layer=layer, version=version, digest="")


def walk(index: int, *versions: int, detached: bool = True) -> WalkEvent:
    attempt = Attempt(PLAN.microbatch(index))
    return WalkEvent(
        layer=0, attempt=attempt, number=index, detached=detached, reads=tuple((version,) for version in versions)
    )


def log(
    directory: Path,
    *events: Event,
    life: int = 1,
    block: tuple[int, int] = (0, 2),
    num_layers: int = 2,
    job: str = "job-1",
) -> Path:
    header = LogHeader(
        job=job,
        num_layers=num_layers,
        start=block[0],
        stop=block[1],
        life=life,
        hash_algorithm="",
        plan=PLAN,
        window=3,
        max_staleness=2,
        position_order=False,
        backward_weights="latest",
        layer_names=tuple(str(layer) for layer in range(*block)),
    )
    with EventLog(directory, header) as made:
        for event in events:
            made.append(event)
    return made.directory


def test_reads_of_versions_that_were_left_are_counted(tmp_path: Path) -> None:
    """An update is made with its last gradient, whatever of other layers is written down in between."""
    folder = log(
        tmp_path,
        restore(0),
        restore(1),
        *(forward(0, index, 0) for index in range(4)),
        take(0, 0, 0, 0),
        take(0, 1, 0, 0),
        BackwardEvent(layer=1, attempt=ONE, number=0, read=0, mode=WeightMode.LATEST),
        walk(2, 0, 0, detached=False),
        update(0, 1),
        take(0, 2, 0, 1),
        take(0, 3, 0, 1, WeightMode.STASHED),
        update(0, 2),
    )
    found = index_life(folder, {})
    assert found.past_reads == {(0, 0): 2}
    assert found.last == {0: 2, 1: 0}
    assert (found.num_records, found.num_updates) == (14, 2)


def test_gradients_of_detached_workers_have_read_what_their_walk_says(tmp_path: Path) -> None:
    folder = log(
        tmp_path,
        restore(0),
        restore(1),
        forward(0, 0, 0),
        forward(0, 1, 0),
        forward(0, 2, 0),
        walk(2, 0, 0),
        take(0, 0, 0, 0),
        take(0, 1, 0, 0),
        update(0, 1),
        walk(2, 1, 0),
        take(0, 2, 0, 1),
    )
    found = index_life(folder, {})
    assert found.past_reads == {}
    assert found.walks == {Attempt(PLAN.microbatch(2)): 2}


def test_a_cut_is_quiet_while_no_ticket_of_its_layer_is_open(tmp_path: Path) -> None:
    abort = AbortEvent(layer=1, attempt=Attempt(PLAN.microbatch(2)), number=2, base=0, version=1)
    folder = log(
        tmp_path,
        restore(0),
        restore(1),
        forward(0, 0, 0),
        forward(1, 0, 0),
        forward(1, 2, 0),
        forward(0, 1, 0),
        forward(1, 1, 0),
        take(1, 0, 0, 0),
        take(1, 1, 0, 0),
        update(1, 1),
        cut(1, 1),
        abort,
        cut(1, 1),
        take(0, 0, 0, 0),
        take(0, 1, 0, 0),
        update(0, 1),
        cut(0, 1),
    )
    assert index_life(folder, {}).quiet_cuts == {(0, 1), (1, 1)}


# Where a replay can begin --------------------------------------------------------------------------------------------


def history(directory: Path) -> History:
    return read_history(directory, {})


def test_a_job_can_begin_at_its_initial_weights_and_where_all_blocks_were_restored(tmp_path: Path) -> None:
    upper, three = (2, 3), 3
    log(tmp_path, restore(0), restore(1), life=1, num_layers=three)
    log(tmp_path, restore(2), life=2, block=upper, num_layers=three)
    log(tmp_path, restore(0, 1), restore(1, 1), life=3, num_layers=three)
    log(tmp_path, restore(2, 1), life=4, block=upper, num_layers=three)
    log(tmp_path, restore(2, 2), life=5, block=upper, num_layers=three)
    found = history(tmp_path)
    starts = found.starts([1, 2])
    assert [(one.version, [life.header.life for life in one.lives]) for one in starts] == [(0, [1, 2]), (1, [3, 4])]
    assert [life.header.life for life in found.after(starts[0])] == [3, 4, 5]
    assert [life.header.life for life in found.after(starts[1])] == [5]
    assert [one.version for one in found.starts([])] == [0]


def test_another_number_of_shards_may_go_on(tmp_path: Path) -> None:
    log(tmp_path, restore(0), restore(1), life=1)
    log(tmp_path, restore(0, 1), life=2, block=(0, 1))
    log(tmp_path, restore(1, 1), life=3, block=(1, 2))
    found = history(tmp_path)
    assert [one.version for one in found.starts([1])] == [0, 1]
    assert [life.header.life for life in found.after(found.starts([1])[0])] == [2, 3]


def test_a_life_that_did_not_come_to_its_first_record_is_nothing(tmp_path: Path) -> None:
    log(tmp_path, restore(0), restore(1), life=1)
    log(tmp_path, restore(0), life=2)
    assert [life.header.life for life in history(tmp_path).lives] == [1]


@pytest.mark.parametrize("other", [{"num_layers": 3}, {"job": "another-1"}])
def test_logs_of_two_jobs_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    log(tmp_path, restore(0), restore(1))
    log(tmp_path, restore(0), restore(1), life=2, **other)
    with pytest.raises(CorruptError, match="different jobs"):
        history(tmp_path)


def test_a_job_that_went_on_under_another_number_is_the_same_job(tmp_path: Path) -> None:
    log(tmp_path, restore(0), restore(1))
    log(tmp_path, restore(0), restore(1), life=2, job="job-7")
    assert history(tmp_path).job == "job-7"


def test_the_newest_life_at_a_version_is_found(tmp_path: Path) -> None:
    gradients = [take(0, 0, 0, 0), take(0, 1, 0, 0), update(0, 1)]
    log(tmp_path, restore(0), restore(1), *gradients, life=1)
    log(tmp_path, restore(0, 1), restore(1, 1), life=2)
    lives = history(tmp_path).lives
    assert [getattr(last_at(lives, 0, version), "header", None) for version in (0, 1, 2)] == [
        lives[0].header,
        lives[1].header,
        None,
    ]


# Where it stops ------------------------------------------------------------------------------------------------------


def test_places_to_stop_are_read_as_they_are_written() -> None:
    assert parse_until("120") == Until(update=120)
    assert parse_until("1:3") == parse_until("1:3-9") == Until(epoch=1, position=3)
    assert [str(parse_until(text)) for text in ("120", "1:3")] == ["update 120", "sample 1:3"]
    assert parse_until("0:3").index(PLAN) == 1
    for outside in ("0:16", "1:0"):
        with pytest.raises(ConfigError, match="16 samples an epoch"):
            parse_until(outside).index(PLAN)
