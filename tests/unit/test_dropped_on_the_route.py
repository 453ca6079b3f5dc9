"""A dropped microbatch on its way through the blocks: who tells whom, and what each block reports."""

from __future__ import annotations

from layerwise.messages import (
    AttemptsClosed,
    BlockClosed,
    BoundaryGradient,
    Closed,
    Failure,
    Forward,
    Grant,
    Outcome,
    Tensors,
)
from layerwise.roles import Effect, Send
from tests.unit.test_shard_role import Bench, attempt, kinds, sent


def dropped_forward(bench: Bench, peer: str, index: int, number: int, *, needed_from: int = 0) -> list[Effect]:
    message = Forward(
        job="job",
        attempt=attempt(index),
        number=number,
        life=bench.place.life,
        needed_from=needed_from,
        inputs=Tensors.none(),
        targets=Tensors.none(),
        dropped="file is torn",
    )
    return bench.hears(peer, message)


def dropped_boundary(bench: Bench, index: int, number: int) -> list[Effect]:
    message = BoundaryGradient(
        job="job",
        attempt=attempt(index),
        number=number,
        life=bench.place.life,
        gradients=Tensors.none(),
        dropped="its loss is not finite (nan)",
    )
    return bench.hears(f"shard-{bench.role.block + 1}", message)


def report(effects: list[Effect]) -> BlockClosed:
    [(_, closed)] = sent(effects, BlockClosed)
    assert isinstance(closed, BlockClosed)
    return closed


def versions(bench: Bench) -> list[int]:
    return [one.version for one in bench.compute.report()]


def test_a_drop_is_admitted_like_any_other_and_closes_as_dropped() -> None:
    bench = Bench(0)
    bench.start()
    [(_, grant)] = sent(bench.offer(0), Grant)
    assert isinstance(grant, Grant)
    told = dropped_forward(bench, "forward-0", 0, grant.number, needed_from=6)
    [(peer, onward)] = sent(told, Forward)
    assert isinstance(onward, Forward)
    assert (peer, onward.dropped, onward.inputs, onward.life) == ("shard-1", "file is torn", Tensors.none(), 6)
    assert bench.work() == []  # its own report goes no further than the admission beside it
    assert not bench.compute.lacking(0)
    closed: list[Effect] = []
    for block in (1, 2):
        closed += bench.closed_by(block, 0, grant.number, Outcome.DROPPED)
    [(_, answer)] = sent(closed, Closed)
    assert isinstance(answer, Closed)
    assert answer.outcome is Outcome.DROPPED
    [(_, batch)] = sent(closed + bench.role.on_tick(1.0), AttemptsClosed)
    assert isinstance(batch, AttemptsClosed)
    [one] = batch.closed
    assert (one.outcome, one.reason, one.missing_from) == (Outcome.DROPPED, "file is torn", None)


def test_a_drop_that_other_blocks_had_applied_is_named_with_the_lowest_layer_that_lacks_it() -> None:
    bench = Bench(0)
    bench.start()
    [(_, grant)] = sent(bench.offer(0), Grant)
    assert isinstance(grant, Grant)
    dropped_forward(bench, "forward-0", 0, grant.number, needed_from=6)
    bench.work()
    effects = bench.closed_by(1, 0, grant.number, Outcome.DROPPED)
    effects += bench.closed_by(2, 0, grant.number, Outcome.APPLIED)  # from an earlier life of the others
    [(_, batch)] = sent(effects + bench.role.on_tick(1.0), AttemptsClosed)
    assert isinstance(batch, AttemptsClosed)
    assert [(one.outcome, one.missing_from) for one in batch.closed] == [(Outcome.DROPPED, 0)]


def test_the_last_block_drops_a_loss_that_is_not_finite_and_tells_the_block_before() -> None:
    bench = Bench(2, drops=True)
    bench.compute.not_finite = (0, 5)
    bench.forward("shard-1", 0, 0)
    effects = bench.work()
    [(peer, boundary)] = sent(effects, BoundaryGradient)
    assert isinstance(boundary, BoundaryGradient)
    assert (peer, boundary.dropped, boundary.life) == ("shard-1", "its loss is not finite (nan)", 6)
    closed = report(effects)
    assert (closed.outcome, closed.loss, closed.missing_from, closed.partial) == (Outcome.DROPPED, None, 4, False)
    assert bench.compute.store_bytes == 0
    assert bench.role.num_open == 0


def test_without_on_bad_sample_drop_a_loss_that_is_not_finite_fails_the_job() -> None:
    bench = Bench(2)
    bench.compute.not_finite = (0, 5)
    bench.forward("shard-1", 0, 0)
    assert kinds(bench.work()) == [Failure.__name__]


def test_a_block_that_waits_for_a_gradient_drops_instead_and_hands_that_on() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.work()
    [(peer, boundary)] = sent(dropped_boundary(bench, 0, 0), BoundaryGradient)
    assert isinstance(boundary, BoundaryGradient)
    assert (peer, boundary.dropped) == ("shard-0", "its loss is not finite (nan)")
    closed = report(bench.work())
    assert (closed.outcome, closed.reason, closed.missing_from) == (Outcome.DROPPED, boundary.dropped, 2)
    assert bench.compute.store_bytes == 0
    assert all(ledger.staleness.num_open == 0 for ledger, _ in bench.compute.layers.values())


def test_a_tombstone_of_an_earlier_attempt_makes_the_whole_route_drop() -> None:
    bench = Bench(1)
    bench.compute.drop(attempt(0), "decided, and then a crash came")
    effects = bench.forward("shard-0", 0, 0)
    assert {(one.peer, type(one.message).__name__) for one in effects if isinstance(one, Send)} == {
        ("shard-0", "BoundaryGradient"),
        ("shard-2", "Forward"),
    }
    assert all(getattr(one.message, "dropped", "") for one in effects if isinstance(one, Send))
    closed = report(bench.work())
    assert (closed.outcome, closed.missing_from, closed.partial) == (Outcome.DROPPED, 2, False)


def test_layers_that_have_applied_a_dropped_microbatch_keep_it() -> None:
    bench = Bench(1)
    bench.forward("shard-0", 0, 0)
    bench.work()
    bench.boundary(0, 0)
    bench.work()
    dropped_forward(bench, "shard-0", 0, 1)
    assert report(bench.work()).outcome is Outcome.APPLIED
    assert all(parameter[0] == 1 or not parameter for _, parameter in bench.compute.layers.values())


def test_an_update_of_drops_alone_raises_the_version_without_a_step() -> None:
    bench = Bench(1)
    for index in (0, 1):
        dropped_forward(bench, "shard-0", index, index)
    bench.work()
    assert versions(bench) == [1, 1]
    assert all(not parameter for _, parameter in bench.compute.layers.values())
