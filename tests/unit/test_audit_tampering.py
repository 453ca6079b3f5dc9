"""Each check of the audit fails for the logs that break its promise, and for those alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from layerwise.audit import StoredEvents, audit
from layerwise.audit_report import CLAIMS
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    PassEvent,
    Record,
    RestoreEvent,
    UpdateEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.ids import Attempt
from tests.unit.audited_job import CUT, PLAN, World, edit, failed, find, honest, number, rate

Tamper = Callable[[list[StoredEvents]], list[StoredEvents]]
TAMPERED: dict[str, list[tuple[str, Tamper]]] = {name: [] for name in CLAIMS}


def breaks(name: str) -> Callable[[Tamper], Tamper]:
    """This change of an honest job's logs breaks promise ``name`` and no other."""

    def register(tamper: Tamper) -> Tamper:
        TAMPERED[name].append((tamper.__name__, tamper))
        return tamper

    return register


@breaks("log")
def record_is_missing_from_the_sequence(blocks: list[StoredEvents]) -> list[StoredEvents]:
    records = [Record(place + (place > 30), event) for place, event in blocks[0].records]
    return [replace(blocks[0], records=records), *blocks[1:]]


@breaks("log")
def record_is_of_a_layer_of_another_block(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 3)
    return edit(blocks, event, event, replace(event, layer=0))


@breaks("log")
def layer_has_no_log(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [replace(block, header=replace(block.header, num_layers=5)) for block in blocks]


@breaks("log")
def walk_does_not_read_the_whole_block(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, WalkEvent, 1)
    return edit(blocks, event, replace(event, reads=event.reads[:1]))


@breaks("tickets")
def pass_of_a_layer_that_lacks_the_microbatch(blocks: list[StoredEvents]) -> list[StoredEvents]:
    forward = find(blocks, ForwardEvent, 1)
    before = PassEvent(layer=forward.layer, attempt=forward.attempt, number=forward.number, read=forward.read)
    return edit(blocks, forward, before, forward)


@breaks("log")
def block_is_of_another_job(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [replace(blocks[0], header=replace(blocks[0].header, job="other")), *blocks[1:]]


@breaks("versions")
def revision_is_skipped(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 3, lambda event: event.version == PLAN.num_updates)
    return edit(blocks, event, replace(event, revision=event.revision + 1))


@breaks("versions")
def forward_says_it_met_another_version(blocks: list[StoredEvents]) -> list[StoredEvents]:
    # An attempt that no other layer met opens and is aborted at a version that the layer does not have yet.
    forward = find(blocks, ForwardEvent, 0, lambda event: event.read == 1)
    lie = replace(forward, read=2, attempt=replace(forward.attempt, attempt=77), number=7777)
    end = AbortEvent(layer=forward.layer, attempt=lie.attempt, number=7777, base=2, version=2)
    again = replace(forward, buffers=False)
    truth = replace(lie, buffers=True)
    return edit(blocks, forward, truth, end, again)


@breaks("versions")
def pass_says_it_met_another_version(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, PassEvent, 2)
    return edit(blocks, event, replace(event, read=event.read - 1))


@breaks("versions")
def backward_pass_reads_a_version_to_come(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, BackwardEvent, 2)
    return edit(blocks, event, replace(event, read=event.read + 1))


@breaks("versions")
def walk_reads_a_version_to_come(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, WalkEvent, 1)
    return edit(blocks, event, replace(event, reads=(event.reads[0], (event.reads[1][0] + 1,))))


@breaks("lives")
def life_begins_where_nothing_was_saved(blocks: list[StoredEvents]) -> list[StoredEvents]:
    cut = find(blocks, CutEvent, 0)
    return edit(blocks, cut)


@breaks("lives")
def life_begins_with_another_hash(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, RestoreEvent, 2)
    return edit(blocks, event, replace(event, digest="another"))


@breaks("lives")
def cut_has_another_hash_than_its_version(blocks: list[StoredEvents]) -> list[StoredEvents]:
    cut = find(blocks, CutEvent, 0)
    restore = find(blocks, RestoreEvent, 2, lambda event: event.layer == cut.layer)
    return edit(edit(blocks, cut, replace(cut, digest="x")), restore, replace(restore, digest="x"))


@breaks("lives")
def life_begins_twice(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, RestoreEvent, 3)
    return edit(blocks, event, event, event)


@breaks("lives")
def first_life_begins_at_a_version(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return blocks[2:]


def three_lives(second: int, third: int) -> list[StoredEvents]:
    """A job whose first life is cut at 2 and at `CUT`; the others begin at those of its cuts, whatever counts."""
    world = World(4, saves=frozenset({2, CUT}))
    world.live(0, updates=CUT + 2)
    world.cuts = world.saved[second]
    world.live(1, updates=second + 1)
    world.cuts = world.saved[third]
    world.live(2, updates=PLAN.num_updates + 1, drop=frozenset({20}))
    return world.blocks


@breaks("lives")
def life_begins_at_a_cut_that_another_one_has_fenced_off(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return three_lives(second=2, third=CUT)


def split_anew(blocks: list[StoredEvents], *ranges: tuple[int, int]) -> list[StoredEvents]:
    """The same job on other blocks of layers in its second life, in which nothing was computed again."""
    events = [event for block in blocks[2:] for _, event in block.records if not isinstance(event, WalkEvent)]

    def block(start: int, stop: int) -> StoredEvents:
        names = tuple(f"layer-{layer}" for layer in range(start, stop))
        header = replace(blocks[2].header, start=start, stop=stop, layer_names=names)
        return replace(
            blocks[2], header=header, records=number(event for event in events if start <= event.layer < stop)
        )

    return [*blocks[:2], *(block(start, stop) for start, stop in ranges)]


@breaks("lives")
def blocks_are_split_anew_and_a_layer_gets_its_neighbours_state(blocks: list[StoredEvents]) -> list[StoredEvents]:
    restored = {layer: find(blocks, RestoreEvent, 2 + layer // 2, _is_of(layer)) for layer in (1, 2)}
    wrong = edit(blocks, restored[2], replace(restored[2], digest=restored[1].digest))
    return split_anew(wrong, (0, 3), (3, 4))


def _is_of(layer: int) -> Callable[[RestoreEvent], bool]:
    return lambda event: event.layer == layer


@breaks("log")
def blocks_are_split_anew_and_two_of_them_have_one_layer(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return split_anew(blocks, (0, 3), (2, 4))


@breaks("exactly-once")
def tombstone_comes_for_a_microbatch_that_is_applied(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, AccumulateEvent, 3)
    tombstone = DropEvent(
        layer=event.layer, attempt=event.attempt, number=None, base=None, update=event.update, reason=""
    )
    return edit(blocks, event, event, tombstone)


@breaks("exactly-once")
def tombstone_is_of_no_microbatch_of_the_plan(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, AccumulateEvent, 0)
    strange = Attempt(replace(event.attempt.microbatch, start=1, stop=3))
    tombstone = DropEvent(layer=event.layer, attempt=strange, number=None, base=None, update=event.update, reason="")
    return edit(blocks, event, event, tombstone)


@breaks("updates")
def update_says_other_samples(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 2)
    return edit(blocks, event, replace(event, samples=event.samples + 1))


@breaks("updates")
def update_says_one_gradient_more(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 1)
    return edit(blocks, event, replace(event, gradients=event.gradients + 1))


@breaks("tickets")
def gradient_comes_under_another_number_than_its_forward(blocks: list[StoredEvents]) -> list[StoredEvents]:
    # An attempt and a number that no other layer ever met, so that only this ticket is wrong.
    event = find(blocks, AccumulateEvent, 2)
    return edit(blocks, event, replace(event, attempt=replace(event.attempt, attempt=55), number=5555))


@breaks("tickets")
def backward_pass_read_the_future(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, AccumulateEvent, 1)
    return edit(blocks, event, replace(event, read=event.update + 1))


@breaks("tickets")
def stashed_backward_pass_read_other_weights_than_the_forward(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, AccumulateEvent, 1, lambda event: event.read > event.base)
    return edit(blocks, event, replace(event, mode=WeightMode.STASHED))


@breaks("tickets")
def ticket_stays_open_at_the_end(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 3, lambda event: event.version == PLAN.num_updates)
    accumulate = find(blocks, AccumulateEvent, 3)
    late = ForwardEvent(
        layer=event.layer,
        attempt=Attempt(PLAN.microbatch(accumulate_index(accumulate)), 66),
        number=6666,
        read=event.version,
        buffers=False,
    )
    return edit(blocks, event, event, late)


def accumulate_index(event: AccumulateEvent) -> int:
    return PLAN.index(event.attempt.microbatch)


@breaks("numbers")
def number_is_given_twice(blocks: list[StoredEvents]) -> list[StoredEvents]:
    first = find(blocks, ForwardEvent, 2)
    abort = AbortEvent(
        layer=first.layer,
        attempt=replace(first.attempt, attempt=44),
        number=first.number,
        base=first.read,
        version=first.read,
    )
    return edit(blocks, first, replace(first, attempt=abort.attempt), abort, replace(first, buffers=False))


@breaks("buffers")
def buffers_are_never_written(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, ForwardEvent, 1, lambda event: event.buffers)
    return edit(blocks, event, replace(event, buffers=False))


@breaks("buffers")
def retry_writes_buffers_again(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, ForwardEvent, 0, lambda event: not event.buffers)
    return edit(blocks, event, replace(event, buffers=True))


@breaks("staleness-identity")
def update_says_it_left_more_tickets_open(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 3)
    return edit(blocks, event, replace(event, open_tickets=event.open_tickets + 1))


@breaks("staleness-bound")
def less_staleness_was_promised(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [replace(block, header=replace(block.header, max_staleness=0)) for block in blocks]


@breaks("staleness-bound")
def update_says_its_gradients_were_fresher(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 0, lambda event: event.staleness == 1)
    true_rate = rate(event.layer, event.samples_before, 0)
    return edit(blocks, event, replace(event, staleness=0, learning_rate=true_rate))


@breaks("learning-rates")
def one_layer_used_another_rate(blocks: list[StoredEvents]) -> list[StoredEvents]:
    events = [event for _, event in blocks[2].records if isinstance(event, UpdateEvent) and event.layer == 0]
    known = {(event.samples_before, event.staleness) for event in events}
    event = find(blocks, UpdateEvent, 3, lambda event: (event.samples_before, event.staleness) in known)
    assert event.learning_rate is not None
    return edit(blocks, event, replace(event, learning_rate=event.learning_rate * 1.5))


@breaks("learning-rates")
def rate_is_not_a_number(blocks: list[StoredEvents]) -> list[StoredEvents]:
    event = find(blocks, UpdateEvent, 3)
    return edit(blocks, event, replace(event, learning_rate=float("nan")))


@breaks("position-order")
def position_order_was_promised_of_a_job_without_it(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [replace(block, header=replace(block.header, position_order=True)) for block in blocks]


@breaks("agreement")
def one_layer_stops_an_update_early(blocks: list[StoredEvents]) -> list[StoredEvents]:
    """Layer 3 (life 1) was cut off in mid-update: its gradients are lost, its tickets taken back."""
    layer = 3
    ends = PLAN.num_updates - 1
    events: list[Event] = []
    open_forwards: dict[Attempt, ForwardEvent] = {}
    version = 0
    for _, event in blocks[3].records:
        if event.layer == layer and version == ends:
            continue
        if isinstance(event, UpdateEvent) and event.layer == layer:
            version = event.version
        if isinstance(event, ForwardEvent) and event.layer == layer:
            open_forwards[event.attempt] = event
        if isinstance(event, AccumulateEvent | AbortEvent | DropEvent) and event.layer == layer:
            open_forwards.pop(event.attempt, None)
        if isinstance(event, WalkEvent):
            event = replace(event, reads=tuple((min(one, ends),) for (one,) in event.reads))
        events.append(event)
    for forward in open_forwards.values():
        events.append(
            AbortEvent(layer=layer, attempt=forward.attempt, number=forward.number, base=forward.read, version=ends)
        )
    return [*blocks[:3], replace(blocks[3], records=number(events))]


def scaled(block: StoredEvents, factor: float) -> StoredEvents:
    """The block's life with ``factor`` times its learning rates, as its header then says."""

    def scale(event: Event) -> Event:
        if isinstance(event, UpdateEvent) and event.learning_rate is not None:
            return replace(event, learning_rate=factor * event.learning_rate)
        return event

    records = [Record(sequence, scale(event)) for sequence, event in block.records]
    return replace(block, header=replace(block.header, rate_factor=factor), records=records)


@breaks("rollbacks")
def one_block_keeps_its_learning_rate(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [*blocks[:3], scaled(blocks[3], 0.5)]


@breaks("rollbacks")
def learning_rates_rise_again(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [scaled(blocks[0], 0.5), scaled(blocks[1], 0.5), *blocks[2:]]


@breaks("rollbacks")
def learning_rates_are_doubled(blocks: list[StoredEvents]) -> list[StoredEvents]:
    return [scaled(block, 2.0) for block in blocks]


@breaks("rollbacks")
def gradients_are_stale_where_none_was_to_be(blocks: list[StoredEvents]) -> list[StoredEvents]:
    until = PLAN.num_updates
    return [*blocks[:2], *(replace(one, header=replace(one.header, synchronous_until=until)) for one in blocks[2:])]


@pytest.mark.parametrize(
    ("name", "tamper"),
    [
        pytest.param(name, tamper, id=f"{name}-{label}")
        for name, several in TAMPERED.items()
        for label, tamper in several
    ],
)
def test_tampered_log_fails_exactly_the_check_it_breaks(name: str, tamper: Tamper) -> None:
    world = honest()
    report = audit(tamper(world.blocks), ledger=world.ledger)
    assert failed(report) == [name], report.lines()


def test_every_check_has_a_log_that_breaks_it() -> None:
    assert [name for name in CLAIMS if not TAMPERED[name]] == ["ledger"]  # see test_audit.py


def test_blocks_that_are_split_anew_break_nothing() -> None:
    world = honest()
    assert failed(audit(split_anew(world.blocks, (0, 3), (3, 4)), ledger=world.ledger)) == []


@pytest.mark.parametrize(("second", "third"), [(2, 2), (CUT, CUT)])
def test_lives_that_begin_where_none_has_begun_below_break_nothing(second: int, third: int) -> None:
    assert failed(audit(three_lives(second, third), ledger=honest().ledger)) == []
