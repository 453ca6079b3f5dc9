"""A block's cuts in memory, and what is left of them when the block is restored from one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from layerwise.cut_shelf import CutShelf
from layerwise.errors import NotFoundError
from layerwise.layer import LayerCopy
from layerwise.ledger_state import LedgerState
from layerwise.messages import LayerFile
from tests.unit.pipeline import Noted

Done = Callable[[tuple[LayerFile, ...], str], None]
FILE = LayerFile(layer=0, life=1, name="layer-0", num_bytes=8, digest="d")


def copy(layer: int, version: int) -> LayerCopy:
    return LayerCopy(
        layer=layer,
        life=1,
        state=LedgerState(layer=layer, version=version),
        parameters={"weight": torch.zeros(2)},
        buffers={},
        moments={},
    )


class Disk:
    """Saves when it is told to."""

    def __init__(self) -> None:
        self.waiting: dict[int, Done] = {}

    def save(self, version: int, copies: tuple[LayerCopy, ...], done: Done) -> None:
        self.waiting[version] = done

    def finish(self, version: int, error: str = "") -> None:
        self.waiting.pop(version)(() if error else (FILE,), error)


def shelf(num_layers: int = 2) -> tuple[CutShelf, Noted, Disk]:
    noted, disk = Noted(), Disk()
    return CutShelf(num_layers, noted, disk.save), noted, disk


def put(made: CutShelf, version: int) -> None:
    for layer in (1, 0):
        made.put(copy(layer, version))


def held(made: CutShelf, *versions: int) -> list[int]:
    found = []
    for version in versions:
        try:
            made.get(version)
        except NotFoundError:
            continue
        found.append(version)
    return found


def test_a_cut_is_taken_with_its_last_layer_and_given_out_lowest_layer_first() -> None:
    made, noted, disk = shelf()
    made.put(copy(1, 4))
    assert noted.taken == []
    with pytest.raises(NotFoundError, match="no cut of version 4 is in memory here; there are none"):
        made.get(4)
    made.put(copy(0, 4))
    assert noted.taken == [4]
    assert [one.layer for one in made.get(4)] == [0, 1]
    disk.finish(4)
    assert noted.saved == [(4, (FILE,), "")]


def test_restored_copies_are_there_for_evaluation_without_any_event() -> None:
    made, noted, disk = shelf()
    made.restore([copy(0, 8), copy(1, 8)])
    assert [one.layer for one in made.get(8)] == [0, 1]
    assert (noted.taken, noted.saved, disk.waiting) == ([], [], {})
    assert made.num_bytes == 2 * 2 * 4


def test_restored_copies_stay_beside_newer_cuts_until_they_are_released() -> None:
    made, _, disk = shelf()
    made.restore([copy(0, 8), copy(1, 8)])
    put(made, 12)
    disk.finish(12)
    assert held(made, 8, 12) == [8, 12]
    made.release(8)
    assert held(made, 8, 12) == [12]


def test_restored_copies_go_with_their_own_release_although_they_are_the_newest() -> None:
    made, _, _ = shelf()
    made.restore([copy(0, 8), copy(1, 8)])
    made.release(7)
    assert held(made, 8) == [8]
    made.release(8)
    assert held(made, 8) == []
    assert made.num_bytes == 0


def test_a_cut_that_is_not_saved_stays_whatever_is_released() -> None:
    made, _, disk = shelf()
    made.hold(4)
    put(made, 4)
    made.release(4)
    assert held(made, 4) == [4]
    disk.finish(4, error="the disk is full")
    assert held(made, 4) == []


def test_a_held_cut_stays_beside_newer_ones_and_another_goes_once_it_is_saved() -> None:
    made, _, disk = shelf()
    made.hold(4)
    for version in (4, 8, 12):
        put(made, version)
        disk.finish(version)
    assert held(made, 4, 8, 12) == [4, 12]


def test_a_hold_that_comes_after_its_release_changes_nothing() -> None:
    made, _, disk = shelf()
    made.release(4)
    made.hold(4)
    put(made, 4)
    disk.finish(4)
    assert held(made, 4) == []


def test_without_a_disk_cuts_count_as_saved() -> None:
    noted = Noted()
    made = CutShelf(1, noted, None)
    made.put(copy(0, 4))
    assert (noted.taken, noted.saved) == ([4], [(4, (), "")])
