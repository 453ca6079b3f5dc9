"""A shard that was paused, replaced and then goes on: nothing of it counts, nothing of its successor is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerwise.cuts import (
    check_cut,
    commit_manifest,
    cut_folder,
    durable_cuts,
    layer_files,
    load_manifest,
    manifest_name,
    newest_sound_cut,
    write_layer_file,
)
from layerwise.errors import CorruptCutError, NotFoundError, WrongLifeError
from layerwise.fault_points import Operation, points
from layerwise.fences import Fence, fences_in, raise_fence, shut_out
from layerwise.messages import LayerFile

Lives = tuple[int, int]
"""The lives of layers 0 and 1, each a block of its own."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is what follows what, not what survives a power cut."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"layerwise.disk.os.{name}", lambda file: None)


def begin(directory: Path, layer: int, life: int, version: int) -> None:
    raise_fence(directory, Fence(life=life, start=layer, stop=layer + 1, version=version))


def save(directory: Path, version: int, layer: int, life: int) -> LayerFile:
    return write_layer_file(directory, version, layer, life, f"layer {layer} of life {life} at {version}".encode())


def commit(directory: Path, version: int, files: tuple[LayerFile, ...], keep: tuple[int, ...], life: int) -> None:
    value = {
        "version": version,
        "files": [
            {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
            for one in files
        ],
    }
    commit_manifest(directory, version, json.dumps(value), keep, life=life)


def cut(directory: Path, version: int, lives: Lives, keep: tuple[int, ...] = ()) -> None:
    files = tuple(save(directory, version, layer, life) for layer, life in enumerate(lives))
    commit(directory, version, files, keep, lives[0])


def lives_of(directory: Path, version: int) -> Lives:
    first, second = (file.life for file in layer_files(check_cut(directory, version)))
    return first, second


class Interruptions:
    """A watcher that runs each of ``acts`` once, just before the operation of that number."""

    def __init__(self, acts: dict[int, list[Callable[[], None]]]) -> None:
        self.acts = acts
        self.count = 0
        self._inside = False

    def before(self, operation: Operation) -> None:
        if self._inside:
            return
        self._inside = True
        for act in self.acts.get(self.count, ()):
            act()
        self.count += 1
        self._inside = False

    def after(self, operation: Operation) -> None:
        pass


@contextmanager
def watched(watcher: Interruptions) -> Iterator[Interruptions]:
    points.watcher = watcher
    try:
        yield watcher
    finally:
        points.watcher = None


def late_commit(directory: Path, files: tuple[LayerFile, ...]) -> None:
    """What the first shard of life 1 was told long ago, and does whenever it wakes up."""
    try:
        commit(directory, 30, files, (20,), 1)
    except (WrongLifeError, CorruptCutError):
        return


def new_life(directory: Path) -> list[Callable[[], None]]:
    """Life 3 of block 0, which begins at cut 20, makes cuts 25 and 30 and keeps the newest two."""
    files: list[LayerFile] = []
    return [
        lambda: begin(directory, 0, 3, 20),
        lambda: files.extend((save(directory, 25, 0, 3), save(directory, 25, 1, 2))),
        lambda: commit(directory, 25, tuple(files), (20,), 3),
        lambda: cut(directory, 30, (3, 2), (25,)),
        lambda: cut(directory, 35, (3, 2), (30,)),
    ]


def situation(directory: Path) -> tuple[LayerFile, ...]:
    """Cuts 10 and 20 of lives 1 and 2 are durable, the files of cut 30 are saved."""
    begin(directory, 0, 1, 0)
    begin(directory, 1, 2, 0)
    cut(directory, 10, (1, 2))
    cut(directory, 20, (1, 2), (10,))
    return save(directory, 30, 0, 1), save(directory, 30, 1, 2)


def num_steps(directory: Path) -> int:
    """Operations of a commit that nobody interrupts."""
    files = situation(directory)
    with watched(Interruptions({})) as watcher:
        late_commit(directory, files)
    assert lives_of(directory, 30) == (1, 2)
    assert durable_cuts(directory) == (20, 30)
    return watcher.count


def test_a_paused_commit_of_a_replaced_life_never_counts_wherever_it_goes_on(tmp_path: Path) -> None:
    """Every way to put the successor's five steps before two operations of the late commit, or behind it."""
    steps = num_steps(tmp_path / "alone")
    cases = list(itertools.product((1, 2, 3), itertools.combinations_with_replacement(range(steps + 1), 2)))
    assert len(cases) > 200
    for number, (split, (first, second)) in enumerate(cases):
        directory = tmp_path / str(number)
        files = situation(directory)
        acts = new_life(directory)
        planned: dict[int, list[Callable[[], None]]] = {first: acts[:split]}
        planned.setdefault(second, []).extend(acts[split:])
        with watched(Interruptions(planned)) as watcher:
            late_commit(directory, files)
        done = [act for place in sorted(planned) if place < watcher.count for act in planned[place]]
        for act in acts[len(done) :]:
            act()
        where = f"the first {split} steps before operation {first}, the rest before {second} of {watcher.count}"
        assert newest_sound_cut(directory) == (35, ()), where
        assert [version for version in durable_cuts(directory) if version >= 30] == [30, 35], where
        assert lives_of(directory, 30) == lives_of(directory, 35) == (3, 2), where


def test_a_late_manifest_does_not_count_even_before_its_successor_has_any(tmp_path: Path) -> None:
    files = situation(tmp_path)
    with watched(Interruptions({6: [lambda: begin(tmp_path, 0, 3, 20)]})):
        late_commit(tmp_path, files)
    assert (cut_folder(tmp_path, 30) / manifest_name(1)).exists()
    assert durable_cuts(tmp_path)[-1] == 20
    with pytest.raises(NotFoundError, match="no cut of version 30"):
        load_manifest(tmp_path, 30)


def test_a_replaced_life_is_refused_by_number(tmp_path: Path) -> None:
    files = situation(tmp_path)
    begin(tmp_path, 1, 7, 20)
    with pytest.raises(WrongLifeError, match=r"layer 1 of life 2 was replaced by life 7 from version 20 on"):
        commit(tmp_path, 30, files, (20,), 1)
    assert durable_cuts(tmp_path) == (10, 20)


def test_a_surviving_block_keeps_its_life_while_its_neighbour_begins_anew(tmp_path: Path) -> None:
    situation(tmp_path)
    begin(tmp_path, 1, 7, 20)
    cut(tmp_path, 30, (1, 7), (20,))
    assert lives_of(tmp_path, 30) == (1, 7)
    assert lives_of(tmp_path, 20) == (1, 2)


def test_going_back_to_an_older_cut_takes_the_newer_ones_out(tmp_path: Path) -> None:
    situation(tmp_path)
    for layer, life in enumerate((5, 6)):
        begin(tmp_path, layer, life, 10)
    assert durable_cuts(tmp_path) == (10,)
    cut(tmp_path, 20, (5, 6), (10,))
    assert lives_of(tmp_path, 20) == (5, 6)


def test_a_life_that_was_overtaken_before_it_began_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, 0, 5, 0)
    raise_fence(tmp_path, Fence(life=4, start=1, stop=3, version=0))
    with pytest.raises(WrongLifeError, match="life 4 of layers 0 to 2 can't begin: life 5 of layers 0 to 0"):
        raise_fence(tmp_path, Fence(life=4, start=0, stop=3, version=0))


def test_a_fence_may_be_raised_twice_and_is_read_back(tmp_path: Path) -> None:
    for _ in range(2):
        begin(tmp_path, 3, 5, 12)
    (tmp_path / "cuts" / "fences" / "notes.txt").write_text("no fence")
    assert fences_in(tmp_path) == (Fence(life=5, start=3, stop=4, version=12),)
    assert fences_in(tmp_path / "nowhere") == ()


def test_who_is_shut_out(tmp_path: Path) -> None:
    fences = (Fence(life=5, start=2, stop=4, version=100),)
    assert shut_out(fences, [(2, 4)], 101).startswith("layer 2 of life 4 was replaced")
    for layer, life, version in ((2, 4, 100), (2, 5, 101), (2, 6, 101), (1, 4, 101), (4, 4, 101)):
        assert shut_out(fences, [(layer, life)], version) == ""


def test_a_damaged_cut_is_passed_over_and_named(tmp_path: Path) -> None:
    situation(tmp_path)
    path = cut_folder(tmp_path, 20) / "layer-001.life-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    version, (error,) = newest_sound_cut(tmp_path)
    assert (version, error.version, error.path) == (10, 20, str(path))
    assert newest_sound_cut(tmp_path, below=20) == (10, ())
    assert newest_sound_cut(tmp_path, below=10) == (None, ())
    path.unlink()
    with pytest.raises(CorruptCutError, match="is missing, but the manifest beside it names it"):
        check_cut(tmp_path, 20)
    manifest = cut_folder(tmp_path, 10) / manifest_name(1)
    manifest.write_bytes(manifest.read_bytes()[:-9])
    version, errors = newest_sound_cut(tmp_path)
    assert (version, [one.path for one in errors]) == (None, [str(path), str(manifest)])
