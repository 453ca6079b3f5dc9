"""The command that a run's end names works where it is typed."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import click
import pytest

from layerwise.cli.main import cli
from layerwise.own_words import OwnWords, resume_command
from layerwise.progress import ProgressLines

THEIRS = "cancelled at version 5; go on with `layerwise resume tiny-1`"


def reworded(message: str, how_to_resume: str) -> str:
    words = OwnWords(ProgressLines(io.StringIO()), "tiny-1", how_to_resume, lambda document: None)
    return str(words.reword({"message": message})["message"])


def test_the_command_has_what_the_processes_need_and_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    command = resume_command(tmp_path / "my runs" / "a", ["own_model"], ["cuda:1", "cpu"], 3)
    program, name, *words = shlex.split(command)
    assert (program, name) == ("layerwise", "resume")
    group = click.Context(cli, info_name="layerwise")
    assert isinstance(cli, click.Group)
    resume = cli.get_command(group, name)
    assert resume is not None
    found = resume.make_context(name, words, parent=group).params
    assert found["job"] == "my runs/a"
    assert (found["allow_imports"], found["devices"], found["threads"]) == (("own_model",), ("cuda:1", "cpu"), 3)


def test_the_command_is_short_where_nothing_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resume_command(tmp_path / "runs" / "tiny", (), (), None) == "layerwise resume runs/tiny"
    assert resume_command(tmp_path / "-x", (), (), None) == "layerwise resume ./-x"
    assert resume_command(Path("/runs/tiny"), (), (), None) == "layerwise resume /runs/tiny"


def test_the_coordinators_command_becomes_ours() -> None:
    ours = "layerwise resume runs/tiny --allow-import own_model"
    assert reworded(THEIRS, ours) == f"cancelled at version 5; go on with `{ours}`"
    assert reworded("done", ours) == "done"


@pytest.mark.parametrize(
    ("theirs", "left"),
    [
        (THEIRS, "cancelled at version 5"),
        (
            "a: b; no cut was durable yet: begin again with `layerwise resume tiny-1`",
            "a: b; no cut was durable yet",
        ),
        ("no file at x; look for it", "no file at x; look for it"),
    ],
)
def test_of_a_run_that_is_gone_afterwards_no_command_is_named(theirs: str, left: str) -> None:
    assert reworded(theirs, "") == left
