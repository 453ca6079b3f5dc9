"""What benchmarks say of their own figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.convergence import report
from benchmarks.run_memory import PLAIN_LOOP, FinishedRun, RunMemory
from benchmarks.runs import DIGITS, ROOT, STDLIB_LM
from benchmarks.throughput import LAYERWISE, LIMIT, WHOLE_RUN, standing
from layerwise.data import load_dataset
from layerwise.overrides import read_job
from layerwise.reference import train_reference
from layerwise.settings import resolve

SIDES = ("synchronous", "asynchronous")
RATIOS = {LAYERWISE: 0.908, WHOLE_RUN: 0.95, LIMIT: 1.057, "DDP": 0.93, "1f1b": 0.91, "gpipe": 0.889}


def test_every_peer_that_is_ahead_is_named_and_no_other() -> None:
    text = standing(RATIOS)
    assert "missed by 4.2 points" in text
    assert "Ahead of it are 2 of 3 peers: DDP (0.930); 1f1b (0.910)." in text


def test_it_is_said_when_no_peer_is_ahead() -> None:
    text = standing(RATIOS | {LAYERWISE: 0.96})
    assert "is reached" in text
    assert "No peer is ahead of it." in text


def run(loss: float) -> FinishedRun:
    return FinishedRun(loss=loss, commit="abc", date="2026-01-01 00:00 UTC")


@pytest.mark.parametrize(("best", "said"), [(0.02, True), (0.04, False), (0.08, True)])
def test_a_best_rate_at_the_edge_of_the_grid_is_said_to_be_there(best: float, said: bool) -> None:
    rates = (0.02, 0.04, 0.08)
    runs = {(rate, 1): run(1.0 if rate == best else 2.0) for rate in rates}
    text = report({"synchronous": runs, "asynchronous": runs}, dict.fromkeys(SIDES, best), rates, [1])
    assert text.count("edge of the grid") == (2 if said else 0)
    assert "3 were made with commit abc (2026-01-01 00:00 UTC)" in text


def test_a_run_of_other_code_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    path = tmp_path / "build" / "runs.json"
    memory = RunMemory(path, STDLIB_LM, {"synchronous": PLAIN_LOOP})
    assert memory.find("synchronous", 0.04, 1) is None
    memory.add("synchronous", 0.04, 1, 1.5)
    again = RunMemory(path, STDLIB_LM, {"synchronous": PLAIN_LOOP}).find("synchronous", 0.04, 1)
    assert again is not None
    assert again.loss == 1.5
    assert memory.find("synchronous", 0.04, 2) is None
    assert RunMemory(path, STDLIB_LM, {"synchronous": PLAIN_LOOP[1:]}).find("synchronous", 0.04, 1) is None
    assert RunMemory(path, DIGITS, {"synchronous": PLAIN_LOOP}).find("synchronous", 0.04, 1) is None


def test_what_the_plain_loop_calls_is_what_its_runs_are_kept_under(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some text to learn " * 200)
    changes = ["model.layers=1", "model.width=16", "model.context=16", f"data.path={text}", "data.batch=8"]
    called: set[str] = set()
    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_filename))
    try:
        spec = read_job(STDLIB_LM, [*changes, "data.validation=0.1", "train.steps=2"])
        data = load_dataset(spec.data)
        loop = train_reference(spec, resolve(spec, len(data.train), spec.cluster.shards))
        loop.evaluate(data.validation)
    finally:
        sys.setprofile(None)
    named = {
        path
        for name in PLAIN_LOOP
        for path in ((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
    }
    ours = {Path(name) for name in called if Path(name).is_relative_to(ROOT / "layerwise")}
    assert {path for path in ours if path not in named} == set()
    assert all(path.is_file() for path in named)
