from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.cut_writer import CutWriter
from layerwise.cuts import (
    commit_manifest,
    cut_folder,
    delete_cuts,
    delete_layer_files,
    durable_cuts,
    is_durable,
    layer_files,
    load_manifest,
    manifest_name,
    newest_cut,
    newest_sound_cut,
)
from layerwise.errors import ConfigError, CorruptError, NotFoundError, UnreadableError
from layerwise.export import export
from layerwise.fault_points import FaultPlan, parse_faults, points
from layerwise.layer import LayerCopy
from layerwise.layer_file import load_layer, save_layer
from layerwise.messages import LayerFile
from layerwise.verify import cut_state
from tests.unit.pipeline import OPTIMIZERS, Pipeline, assert_same


def model() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten()).to(memory_format=torch.preserve_format),
        nn.Linear(40, 6).double(),
        nn.Linear(6, 5).double(),
    ]


class Widen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def trained(version: int = 3) -> Pipeline:
    torch.manual_seed(1)
    first, second, third = model()
    modules = [first, nn.Sequential(Widen(), second), third]
    inputs, targets = [torch.randn(16, 1, 12)], torch.randint(0, 5, (16,))
    pipeline = Pipeline(modules, inputs, targets, optimizer=OPTIMIZERS["adamw"], num_updates=version)
    pipeline.blocks[0].cut_at(version)
    pipeline.train()
    return pipeline


def manifest(version: int, files: tuple[LayerFile, ...]) -> str:
    return json.dumps(
        {
            "job": "job",
            "version": version,
            "files": [
                {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
                for one in files
            ],
        }
    )


def save(directory: Path, copies: list[LayerCopy], keep: tuple[int, ...] = ()) -> tuple[LayerFile, ...]:
    files = tuple(save_layer(directory, "job", one) for one in copies)
    version = copies[0].state.version
    commit_manifest(directory, version, manifest(version, files), keep, life=1)
    return files


def test_a_cut_read_back_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    pipeline = trained()
    files = save(tmp_path, pipeline.copies(3))
    assert_same(cut_state(tmp_path, 3), pipeline.state())
    assert layer_files(load_manifest(tmp_path, 3)) == files
    loaded = [load_layer(tmp_path, 3, one) for one in files]
    assert [one.state for one in loaded] == [one.state for one in pipeline.copies(3)]
    assert [list(one.moments) for one in loaded] == [list(one.moments) for one in pipeline.copies(3)]


def test_files_have_the_frozen_names(tmp_path: Path) -> None:
    save(tmp_path, trained().copies(3))
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "cuts/00000003/layer-000.life-1.safetensors",
        "cuts/00000003/layer-001.life-1.safetensors",
        "cuts/00000003/layer-002.life-1.safetensors",
        "cuts/00000003/manifest.life-1.json",
    ]


def test_a_cut_counts_only_with_its_manifest(tmp_path: Path) -> None:
    for one in trained().copies(3):
        save_layer(tmp_path, "job", one)
    assert newest_cut(tmp_path) is None
    with pytest.raises(NotFoundError, match="no cut of version 3"):
        load_manifest(tmp_path, 3)


def test_a_manifest_whose_files_are_not_there_is_not_written(tmp_path: Path) -> None:
    files = tuple(save_layer(tmp_path, "job", one) for one in trained().copies(3))
    (cut_folder(tmp_path, 3) / files[1].name).unlink()
    with pytest.raises(CorruptError, match=r"layer-001\.life-1\.safetensors is missing"):
        commit_manifest(tmp_path, 3, manifest(3, files), life=1)
    assert durable_cuts(tmp_path) == ()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("which", ["layer-001.life-1.safetensors", "manifest.life-1.json"])
def test_damage_is_found_and_the_file_is_named(tmp_path: Path, damage: str, which: str) -> None:
    files = save(tmp_path, trained().copies(3))
    path = cut_folder(tmp_path, 3) / which
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    else:
        path.unlink()
    expected = NotFoundError if which == "manifest.life-1.json" and damage == "missing" else CorruptError
    with pytest.raises(expected) as error:
        _ = load_manifest(tmp_path, 3), load_layer(tmp_path, 3, files[1])
    assert which in str(error.value) or "no cut of version 3" in str(error.value)


@pytest.mark.parametrize("which", ["layer-001.life-1.safetensors", "manifest.life-1.json"])
def test_a_cut_that_can_not_be_read_for_now_is_not_taken_for_damaged(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passing error of a network file system gave a sound cut up for good."""
    save(tmp_path, trained(2).copies(2))
    save(tmp_path, trained(3).copies(3), keep=(2, 3))
    usual = Path.open

    def stale(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == which and path.parent.name == "00000003":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return usual(path, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", stale)
        with pytest.raises(UnreadableError, match=rf"{which} can't be read \(Stale file handle\); try again"):
            newest_sound_cut(tmp_path)
        assert durable_cuts(tmp_path) == (2, 3)
    assert newest_sound_cut(tmp_path) == (3, ())


def test_a_file_in_another_ones_place_is_refused(tmp_path: Path) -> None:
    files = save(tmp_path, trained().copies(3))
    swapped = LayerFile(layer=0, life=1, name=files[1].name, num_bytes=files[1].num_bytes, digest=files[1].digest)
    with pytest.raises(CorruptError, match="holds layer 1 of life 1 at version 3, not layer 0"):
        load_layer(tmp_path, 3, swapped)


def test_old_cuts_and_unfinished_ones_are_deleted_and_newer_ones_stay(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        save(tmp_path, trained(version).copies(version), keep=(1, 2, 3))
    unfinished = trained(4).copies(4)
    save_layer(tmp_path, "job", unfinished[0])
    (cut_folder(tmp_path, 1) / "layer-000.life-9.safetensors").write_bytes(b"left by a crash")
    delete_cuts(tmp_path, 2)
    assert durable_cuts(tmp_path) == (2, 3)
    assert not cut_folder(tmp_path, 1).exists()
    assert cut_folder(tmp_path, 4).is_dir()


def test_the_writer_saves_in_order_and_reports_what_the_disk_refuses(tmp_path: Path) -> None:
    copies = tuple(trained().copies(3))
    done: list[tuple[tuple[LayerFile, ...], str]] = []
    writer = CutWriter(tmp_path, "job")
    writer.save(3, copies, lambda files, error: done.append((files, error)))
    writer.close()
    (tmp_path / "file").write_text("no folder")
    writer = CutWriter(tmp_path / "file", "job")
    writer.save(3, copies, lambda files, error: done.append((files, error)))
    writer.close()
    assert [len(files) for files, _ in done] == [3, 0]
    assert done[0][1] == ""
    assert "cut 3 could not be saved" in done[1][1]


def test_an_exported_cut_loads_into_plain_pytorch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pipeline = trained()
    save(tmp_path, pipeline.copies(3))
    path = export(tmp_path, 3, tmp_path / "out", pipeline.modules)
    fresh = nn.Sequential(*trained().modules)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(load_file(path))
    for name, tensor in nn.Sequential(*pipeline.modules).state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["version"] == 3
    with pytest.raises(ConfigError, match="does not fit the job's model"):
        export(tmp_path, 3, tmp_path / "other", [nn.Linear(2, 2)])


def test_shared_parameters_are_exported_under_every_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    modules = [first, second, nn.Linear(4, 5)]
    pipeline = Pipeline(modules, [torch.randn(8, 4)], torch.randint(0, 5, (8,)), num_updates=1)
    pipeline.blocks[0].cut_at(1)
    pipeline.train()
    save(tmp_path, pipeline.copies(1))
    found = load_file(export(tmp_path, 1, tmp_path, pipeline.modules))
    assert torch.equal(found["0.weight"], found["1.weight"])
    nn.Sequential(*modules).load_state_dict(found)


def test_an_old_cut_that_cannot_be_deleted_does_not_make_the_new_one_fail(tmp_path: Path) -> None:
    for version in (1, 2):
        save(tmp_path, trained(version).copies(version), keep=(1, 2))
    (cut_folder(tmp_path, 1) / "held-open").mkdir()
    (cut_folder(tmp_path, 2) / "manifest.life-1.json").write_text("damaged")
    save(tmp_path, trained(3).copies(3), keep=(2,))
    assert newest_cut(tmp_path) == 3
    assert 1 not in durable_cuts(tmp_path)


def test_the_writer_reports_whatever_goes_wrong_and_goes_on(tmp_path: Path) -> None:
    copies = tuple(trained().copies(3))
    failures = [RuntimeError("no such dtype"), None]
    done: list[tuple[int, str]] = []

    def before() -> None:
        failure = failures.pop(0)
        if failure is not None:
            raise failure

    writer = CutWriter(tmp_path, "job", before_save=before)
    for _ in range(2):
        writer.save(3, copies, lambda files, error: done.append((len(files), error)))
    writer.close()
    assert [count for count, _ in done] == [0, 3]
    assert "no such dtype" in done[0][1]


def test_buffers_that_share_memory_are_saved_each(tmp_path: Path) -> None:
    copy = trained().copies(3)[0]
    shared = torch.arange(4.0)
    copy = replace(copy, buffers={"flat": shared, "square": shared.view(2, 2)})
    file = save_layer(tmp_path, "job", copy)
    loaded = load_layer(tmp_path, 3, file)
    assert torch.equal(loaded.buffers["flat"], shared)
    assert torch.equal(loaded.buffers["square"], shared.view(2, 2))


def test_cuts_that_fail_do_not_fill_the_disk_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block's disk is full in the middle of a cut; another one's saves go on for cuts that are never finished."""
    copies = [trained(version).copies(version) for version in range(1, 8)]
    monkeypatch.setattr(points, "watcher", FaultPlan(parse_faults("cut.write:3-6:partial")))
    done: list[tuple[int, str]] = []
    writer = CutWriter(tmp_path, "job")
    for version, some in enumerate(copies, start=1):
        writer.save(version, tuple(some), lambda files, error: done.append((len(files), error)))
    writer.close()
    assert [count for count, _ in done] == [0, 0, 0, 0, 3, 3, 3]
    assert done[0][1] == f"cut 1 could not be saved in {tmp_path}: No space left on device"
    assert sorted(path.name for path in (tmp_path / "cuts").iterdir()) == ["00000005", "00000006", "00000007"]
    writer = CutWriter(tmp_path, "job")
    commit_manifest(tmp_path, 5, manifest(5, tuple(save_layer(tmp_path, "job", one) for one in copies[4])), life=1)
    for version in range(1, 8):
        if version != 5:
            writer.save(version, tuple(copies[version - 1]), lambda files, error: None)
    writer.close()
    left = sorted(int(path.name) for path in (tmp_path / "cuts").iterdir() if path.name.isdigit())
    assert left == [3, 4, 5, 6, 7], "the newest four may still be finished, and 5 is durable"
    assert durable_cuts(tmp_path) == (5,)


def test_several_who_delete_the_same_old_cuts_do_not_meet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every shard forgets what was not finished while the first one deletes what is old: none may die or complain of it."""
    versions = range(1, 201)
    files = (LayerFile(layer=0, life=1, name="layer-000.life-1.safetensors", num_bytes=1, digest=""),)
    for version in versions:
        folder = cut_folder(tmp_path, version)
        folder.mkdir(parents=True)
        (folder / files[0].name).write_bytes(b"x")
        (folder / manifest_name(1)).write_text("{}")

    def forget() -> None:
        for version in versions:
            if not is_durable(tmp_path, version):
                delete_layer_files(tmp_path, version, files)

    with ThreadPoolExecutor(3) as threads:
        for ended in [threads.submit(delete_cuts, tmp_path, 201), threads.submit(forget), threads.submit(forget)]:
            ended.result()
    assert durable_cuts(tmp_path) == ()
    assert caplog.records == []
