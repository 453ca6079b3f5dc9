from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import layerwise
from layerwise.errors import ConfigError, JobFailedError
from layerwise.job_result import JobResult


def test_importing_the_package_loads_neither_torch_nor_grpc() -> None:
    code = "import sys, layerwise; sys.exit(bool({'torch', 'grpc', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in layerwise.__all__:
        assert getattr(layerwise, name) is not None
        assert name in dir(layerwise)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        layerwise.nothing_like_this  # noqa: B018


def test_a_result_holds_the_documents_facts() -> None:
    document = {
        "job": "tiny-1",
        "state": "done",
        "message": "done",
        "steps": 3,
        "samples": 96,
        "seconds": 1.5,
        "samples_per_second": 64.0,
        "train_loss": 0.5,
        "validation": {"loss": 0.6, "accuracy": 0.9},
        "ledger": {"samples_leased": 96, "samples_applied": 96, "samples_dropped": 0},
        "directory": "/tmp/runs/tiny",
    }
    result = JobResult.from_document(document)
    assert (result.job, result.state, result.steps, result.samples) == ("tiny-1", "done", 3, 96)
    assert result.validation == {"loss": 0.6, "accuracy": 0.9}
    assert result.directory == Path("/tmp/runs/tiny")
    assert result.window is None
    assert result.document is document


def test_a_failed_job_raises_unless_told_not_to() -> None:
    from layerwise.api import _checked

    document = {"job": "tiny-1", "state": "failed", "message": "loss is NaN", "directory": "/tmp/runs/tiny"}
    with pytest.raises(JobFailedError, match=r"tiny-1 failed: loss is NaN .*/tmp/runs/tiny"):
        _checked(document, check=True)
    assert _checked(document, check=False).state == "failed"


def test_an_address_is_checked_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="neither host:port"):
        layerwise.connect("nonsense")


def test_a_bad_job_is_refused_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="unknown key"):
        layerwise.train({"name": "x", "model": "mlp", "data": "digits", "oops": 1})
    assert list(tmp_path.iterdir()) == []
