"""When a run of its own starts a spare process: late, once, and only where it is wanted. Nothing is started here."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from layerwise.embedded import SPARE_AFTER_SECONDS, EmbeddedRun
from layerwise.job import parse_job
from layerwise.progress import ProgressLines


class Clock:
    """Stands for the time module."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class FakeCluster:
    """Counts what it is asked for."""

    spares = 0

    def keep_spare(self) -> None:
        self.spares += 1


def run_with(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *, spare: bool
) -> tuple[EmbeddedRun, Clock, FakeCluster]:
    clock, cluster = Clock(), FakeCluster()
    monkeypatch.setattr("layerwise.embedded.time", clock)
    spec = parse_job({"name": "tiny", "model": "mlp", "data": "digits"})
    run = EmbeddedRun(spec, directory, ProgressLines(io.StringIO(), quiet=True), spare=spare)
    monkeypatch.setattr(run, "_cluster", cluster)
    return run, clock, cluster


def test_the_spare_starts_some_time_after_the_first_update_and_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, clock, cluster = run_with(monkeypatch, tmp_path, spare=True)
    for document, seconds, expected in (
        ({}, 0.0, 0),
        ({"steps": 0}, 1000.0, 0),
        ({"steps": 1}, 1.0, 0),
        ({"steps": 2}, SPARE_AFTER_SECONDS / 2, 0),
        ({"steps": 3}, SPARE_AFTER_SECONDS / 2, 1),
        ({"steps": 4}, SPARE_AFTER_SECONDS, 1),
    ):
        clock.now += seconds
        run._on_document(document)
        assert cluster.spares == expected, document


def test_a_run_without_a_spare_starts_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, clock, cluster = run_with(monkeypatch, tmp_path, spare=False)
    for steps in range(5):
        clock.now += 2 * SPARE_AFTER_SECONDS
        run._on_document({"steps": steps})
    assert cluster.spares == 0
