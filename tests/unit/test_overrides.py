from __future__ import annotations

import io
from pathlib import Path

import pytest

from layerwise.errors import ConfigError
from layerwise.overrides import apply_override, read_job

JOB = {"name": "tiny", "model": "mlp", "data": "digits"}


def test_a_dotted_key_reaches_into_sections_that_are_not_there_yet() -> None:
    values: dict[str, object] = {}
    apply_override(values, "train.optimizer.lr=0.5")
    assert values == {"train": {"optimizer": {"lr": 0.5}}}


def test_values_are_read_as_yaml() -> None:
    values: dict[str, object] = {}
    for override in ("a=3", "b=2.0e-2", "c=true", "d=null", "e=[1, 2]", "f={name: muon}", "g=text", "h="):
        apply_override(values, override)
    assert values == {
        "a": 3,
        "b": 0.02,
        "c": True,
        "d": None,
        "e": [1, 2],
        "f": {"name": "muon"},
        "g": "text",
        "h": None,
    }


def test_a_section_given_by_its_bare_name_takes_further_keys() -> None:
    spec = read_job({**JOB, "train": {"optimizer": "sgd"}}, ["train.optimizer.momentum=0.9"])
    assert spec.train.optimizer.name == "sgd"
    assert spec.train.optimizer.momentum == 0.9


def test_later_overrides_win() -> None:
    assert read_job(JOB, ["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize("override", ["train.steps", "=3", ".a=3", "a..b=1", "data.batch.x=1", "a=[1"])
def test_what_is_no_override_is_refused_with_its_own_text(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_override({"data": {"batch": 8}}, override)
    assert override in str(caught.value)


def test_the_job_is_checked_after_the_overrides() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        read_job(JOB, ["train.steps=0"])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no job file at /nowhere/job\.yaml"):
        read_job("/nowhere/job.yaml")


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("name: piped\nmodel: mlp\ndata: digits\n"))
    assert read_job("-").name == "piped"


def test_the_callers_map_is_not_changed(tmp_path: Path) -> None:
    job = {**JOB, "train": {"steps": 3}}
    read_job(job, ["train.steps=9"])
    assert job["train"] == {"steps": 3}


def test_steps_take_the_place_of_epochs_and_the_other_way_round() -> None:
    job = {"name": "x", "model": "mlp", "data": {"name": "digits"}, "train": {"epochs": 3}}
    stepped = read_job(job, ["train.steps=50"])
    assert (stepped.train.steps, stepped.train.epochs) == (50, None)
    again = read_job({**job, "train": {"steps": 50}}, ["train.epochs=2"])
    assert (again.train.steps, again.train.epochs) == (None, 2)
    assert read_job(job, ["train.steps=null"]).train.epochs == 3
