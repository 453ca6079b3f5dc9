from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerwise.cli.main import run
from layerwise.errors import ConfigError, RejectedError
from layerwise.tracebacks import log, log_ends, log_traceback, logs_with_tracebacks


@pytest.fixture(autouse=True)
def _level_kept() -> Iterator[None]:
    before = log.level
    yield
    log.setLevel(before)


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_only_what_a_sentence_does_not_tell_is_logged_and_only_with_debug(caplog: pytest.LogCaptureFixture) -> None:
    log.setLevel(logging.INFO)
    log_traceback("task failed", raised(KeyError("a user's")))
    assert caplog.records == []
    assert run(["--debug", "schema"]) == 0
    log_traceback("task failed", raised(RejectedError("aborted meanwhile")))
    assert caplog.records == []
    log_traceback("task failed", raised(KeyError("a user's")))
    log_traceback("probe failed", raised(ConfigError("model.import: it failed"), KeyError("the cause")))
    assert [one.getMessage() for one in caplog.records] == ["task failed", "probe failed"]
    assert "KeyError: 'the cause'" in caplog.text


def test_the_logs_that_hold_a_traceback_are_found(tmp_path: Path) -> None:
    (tmp_path / "shard-0.log").write_text("Traceback (most recent call last):\n  File ...\n", encoding="utf-8")
    (tmp_path / "shard-1.log").write_text("all is well\n", encoding="utf-8")
    assert logs_with_tracebacks(tmp_path, {}) == (tmp_path / "shard-0.log",)
    assert logs_with_tracebacks(tmp_path / "nowhere", log_ends(tmp_path / "nowhere")) == ()


def test_a_traceback_of_an_earlier_run_is_not_this_ones(tmp_path: Path) -> None:
    old, new = tmp_path / "shard-0.log", tmp_path / "shard-1.log"
    old.write_text("Traceback (most recent call last):\n  File ...\n", encoding="utf-8")
    new.write_text("all is well\n", encoding="utf-8")
    before = log_ends(tmp_path)
    assert logs_with_tracebacks(tmp_path, before) == ()
    with new.open("a", encoding="utf-8") as file:
        file.write("Traceback (most recent call last):\n")
    assert logs_with_tracebacks(tmp_path, before) == (new,)
    # Of a run that was overwritten: the new one's log begins anew, however long the old one was.
    old.rename(tmp_path / "aside")
    old.write_text("Traceback (most recent call last):\n", encoding="utf-8")
    assert logs_with_tracebacks(tmp_path, before) == (old, new)
