"""Numbers that are not finite never reach a reader of JSON, and their absence is explained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli.output import print_json
from layerwise.json_text import json_text
from layerwise.proto.calls import CALLS, EventDocument, JobsPage
from layerwise.run_directory import load_result, save_result
from layerwise.server.job_document import job_document
from layerwise.server.job_record import JobRecord, JobState

VALUES = {"loss": math.nan, "steps": [1, 2.5, (math.inf, -math.inf)], "path": "x", "validation": {"loss": math.nan}}
SHOWN = {"loss": None, "steps": [1, 2.5, [None, None]], "path": "x", "validation": {"loss": None}}


def strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_becomes_null_and_all_else_stays() -> None:
    assert strictly(json_text(VALUES)) == SHOWN
    assert json_text({"loss": 0.5}) == '{"loss": 0.5}'
    with pytest.raises(TypeError):
        json_text({"path": Path("x")})


def test_commands_and_kept_results_have_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_json({**VALUES, "path": Path("x")})
    assert strictly(capsys.readouterr().out) == SHOWN
    save_result(tmp_path, VALUES)
    assert load_result(tmp_path) == SHOWN


@pytest.mark.parametrize("name", ["GetJob", "ListJobs", "FollowEvents"])
def test_the_coordinators_answers_have_none(name: str) -> None:
    answers: dict[str, tuple[Any, Any]] = {
        "GetJob": (VALUES, SHOWN),
        "ListJobs": (JobsPage(documents=[VALUES]), JobsPage(documents=[SHOWN])),
        "FollowEvents": (EventDocument(offset=0, event=VALUES), EventDocument(offset=0, event=SHOWN)),
    }
    said, heard = answers[name]
    assert CALLS[name].decode_reply(CALLS[name].encode_reply(said)) == heard


def test_a_jobs_document_warns_of_an_evaluation_without_a_finite_loss() -> None:
    record = JobRecord(
        job="tiny-1",
        number=1,
        name="tiny",
        state=JobState.DONE,
        spec_json="{}",
        directory="/run",
        created=0.0,
        warnings=("sgd is stale",),
        evaluations=({"version": 6, "seconds": 0.1, "loss": math.nan, "accuracy": 0.1},),
    )
    assert job_document(record, None)["warnings"] == [
        "sgd is stale",
        "the evaluation of version 6 gave no finite loss",
    ]
