from __future__ import annotations

from layerwise.messages import LayerFile
from layerwise.server.cut_ledger import CutLedger


def file(layer: int) -> LayerFile:
    return LayerFile(layer=layer, life=1, name=f"layer-{layer}", num_bytes=10, digest="d")


def save_all(cuts: CutLedger, version: int) -> None:
    cuts.save(1, version, (file(2), file(1)))
    cuts.save(0, version, (file(0),))


def test_a_cut_is_taken_once_every_block_has_it() -> None:
    cuts = CutLedger(2, keep=2)
    assert not cuts.take(0, 4)
    assert not cuts.take(0, 4)
    assert cuts.take(1, 4)
    assert not cuts.take(1, 4)


def test_a_cut_is_committed_with_every_block_s_files_lowest_layer_first() -> None:
    cuts = CutLedger(2, keep=2)
    cuts.save(1, 4, (file(2), file(1)))
    assert cuts.next_commit() is None
    cuts.save(0, 4, (file(0),))
    assert cuts.next_commit() == (4, (file(0), file(1), file(2)), (4,))
    assert cuts.saving
    assert cuts.commit(4)
    assert (cuts.durable, cuts.saving) == ((4,), False)


def test_commits_come_one_after_the_other_oldest_first() -> None:
    cuts = CutLedger(2, keep=2)
    save_all(cuts, 8)
    save_all(cuts, 4)
    first = cuts.next_commit()
    assert first is not None
    assert first[0] == 4
    assert cuts.next_commit() is None
    cuts.commit(4)
    second = cuts.next_commit()
    assert second is not None
    assert second[0] == 8


def test_a_version_that_waits_keeps_back_no_older_one() -> None:
    cuts = CutLedger(1, keep=2)
    cuts.save(0, 4, (file(0),))
    cuts.save(0, 8, (file(0),))
    assert cuts.next_commit(until=3) is None
    assert cuts.next_commit(until=7) == (4, (file(0),), (4,))
    cuts.commit(4)
    assert cuts.next_commit(until=7) is None
    assert cuts.next_commit(until=8) == (8, (file(0),), (4, 8))


def test_only_so_many_durable_cuts_are_kept() -> None:
    cuts = CutLedger(1, keep=2, durable=(2, 4))
    cuts.save(0, 6, (file(0),))
    commit = cuts.next_commit()
    assert commit is not None
    assert commit[2] == (4, 6)
    cuts.commit(6)
    assert cuts.durable == (4, 6)
    assert not cuts.is_durable(2)


def test_a_cut_to_go_back_to_is_kept_and_the_one_that_takes_its_place() -> None:
    cuts = CutLedger(1, keep=1)
    kept = []
    for version in range(2, 22, 2):
        cuts.save(0, version, (file(0),))
        cuts.pin(version - 8)  # what is 8 versions old is known to be good
        commit = cuts.next_commit()
        assert commit is not None
        cuts.commit(version)
        kept.append(cuts.durable)
    assert kept[:5] == [(2,), (2, 4), (2, 6), (2, 8), (2, 8, 10)]
    assert all(versions[0] >= versions[-1] - 16 for versions in kept)
    assert all(len(versions) <= 3 for versions in kept)


def test_a_cut_that_was_pinned_too_late_is_not_thought_durable() -> None:
    cuts = CutLedger(1, keep=1, durable=(2, 4))
    cuts.save(0, 6, (file(0),))
    commit = cuts.next_commit()
    assert commit is not None
    assert commit[2] == (4, 6)
    cuts.pinned = frozenset({2})
    cuts.commit(6)
    assert cuts.durable == (6,)


def test_a_cut_that_is_about_to_be_deleted_is_none_to_go_back_to() -> None:
    cuts = CutLedger(1, keep=2, durable=(2, 4))
    assert (cuts.newest_until(9), cuts.newest_until(3), cuts.newest_until(1)) == (4, 2, None)
    cuts.save(0, 6, (file(0),))
    cuts.next_commit()
    assert (cuts.newest_until(9), cuts.newest_until(3)) == (4, None)


def test_a_cut_that_is_given_up_stays_so_and_holds_nobody_up() -> None:
    cuts = CutLedger(2, keep=2)
    cuts.save(0, 4, (file(0),))
    assert cuts.give_up(4, "the disk is full")
    assert not cuts.give_up(4, "again")
    save_all(cuts, 4)
    assert cuts.next_commit() is None
    assert cuts.given_up(4) == "the disk is full"
    save_all(cuts, 8)
    commit = cuts.next_commit()
    assert commit is not None
    assert commit[0] == 8


def test_a_failed_commit_lets_the_next_cut_go_on_and_repeats_change_nothing() -> None:
    cuts = CutLedger(2, keep=2)
    save_all(cuts, 4)
    save_all(cuts, 8)
    cuts.next_commit()
    cuts.give_up(4, "no manifest")
    commit = cuts.next_commit()
    assert commit is not None
    assert commit[0] == 8
    assert cuts.commit(8)
    assert not cuts.commit(8)
    assert not cuts.commit(4)


def test_a_cut_that_some_block_has_passed_by_is_not_waited_for() -> None:
    cuts = CutLedger(2, keep=2, durable=(4,), first_whole=12)
    assert not cuts.take(0, 8)
    cuts.save(0, 8, (file(0),))
    assert not cuts.saving
    assert cuts.next_commit() is None
    save_all(cuts, 12)
    assert cuts.next_commit() == (12, (file(0), file(1), file(2)), (4, 12))
