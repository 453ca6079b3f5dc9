"""Applied sets against Python's own sets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.applied import AppliedSet

indices = st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=60)


def build(added: list[tuple[int, bool]]) -> tuple[AppliedSet, set[int], set[int]]:
    ours, members, dropped = AppliedSet(), set[int](), set[int]()
    for index, drop in added:
        assert ours.add(index, dropped=drop) == (index not in members)
        if drop and index not in members:
            dropped.add(index)
        members.add(index)
    return ours, members, dropped


@given(indices)
def test_applied_set_holds_what_a_set_holds(added: list[tuple[int, bool]]) -> None:
    ours, members, dropped = build(added)
    assert {index for index in range(30) if index in ours} == members
    assert len(ours) == len(members)
    assert ours.dropped == dropped
    assert ours.missing(30) == sorted(set(range(30)) - members)
    assert ours.watermark not in ours
    assert all(index > ours.watermark for index in ours.above)


@given(indices)
def test_json_gives_the_same_set_back(added: list[tuple[int, bool]]) -> None:
    ours, _, _ = build(added)
    assert AppliedSet.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@given(indices)
def test_copy_does_not_follow_its_original(added: list[tuple[int, bool]]) -> None:
    ours, members, _ = build(added)
    copy = ours.copy()
    ours.add(40, dropped=True)
    assert 40 not in copy
    assert len(copy) == len(members)
    assert 40 not in copy.dropped


@given(st.lists(indices, min_size=1, max_size=4))
def test_intersection_holds_what_all_hold_and_drops_what_any_dropped(several: list[list[tuple[int, bool]]]) -> None:
    built = [build(added) for added in several]
    common = AppliedSet.intersection([ours for ours, _, _ in built])
    members = set.intersection(*(members for _, members, _ in built))
    assert {index for index in range(30) if index in common} == members
    assert common.dropped == set.union(*(dropped for _, _, dropped in built)) & members
    assert len(common) == len(members)


def test_intersection_of_nothing_is_empty() -> None:
    assert AppliedSet.intersection([]) == AppliedSet()


def test_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        AppliedSet().add(-1)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"watermark": "3", "above": [], "dropped": []},
        {"watermark": True, "above": [], "dropped": []},
        {"watermark": -1, "above": [], "dropped": []},
        {"watermark": 3, "above": [3], "dropped": []},
        {"watermark": 3, "above": [2], "dropped": []},
        {"watermark": 3, "above": [5, 5], "dropped": []},
        {"watermark": 3, "above": [[5]], "dropped": []},
        {"watermark": 3, "above": ["5"], "dropped": []},
        {"watermark": 3, "above": [5], "dropped": [4]},
        {"watermark": 3, "above": [5], "dropped": ["x"]},
        {"watermark": 3, "above": [5], "dropped": [-1]},
        {"watermark": 3, "above": {"5": 1}, "dropped": []},
    ],
)
def test_values_that_are_no_applied_set_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not an applied set|not in the set"):
        AppliedSet.from_json(value)


def test_a_member_is_never_missed_while_the_watermark_passes_it() -> None:
    ours = AppliedSet()

    class Watched(set[int]):
        def remove(self, index: int) -> None:
            super().remove(index)
            assert index in ours, "another thread that asks now is told that it was never taken in"

    ours.above = Watched({1, 2})
    ours.add(0)
    assert ours.watermark == 3
