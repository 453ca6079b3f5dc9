"""The commands and the Python interface from start to end: train, kill, resume, audit, evaluate, export, load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import layerwise
from layerwise.cluster import LocalCluster
from layerwise.data import load_dataset
from layerwise.job import parse_job
from layerwise.job_result import JobResult
from layerwise.models import build_model
from tests.integration.conftest import REPOSITORY
from tests.integration.jobs import MODELS, OWN_CODE, Gate, check_done, finish, image_data, job


def command(folder: Path, *arguments: str) -> tuple[int, Any, str]:
    """Run a command with JSON output; its exit status, the last line's object, and what it said."""
    with started(folder, *arguments) as process:
        output, said = process.communicate(timeout=90)
    lines = output.splitlines()
    return process.returncode, json.loads(lines[-1]) if lines else None, said


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in ``folder``; ended with the block, and with all that it had started."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "layerwise", *arguments, "--output", "json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children: list[psutil.Process] = []
    try:
        yield process
        assert process.returncode is not None
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.communicate()
        psutil.wait_procs(children, timeout=20)


def child_of(process: subprocess.Popen[str], name: str) -> psutil.Process:
    """The role called ``name`` that a command has started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        if "--name" in words and words[words.index("--name") + 1] == name:
            return child
    raise AssertionError(f"no {name} among the children of {process.pid}")


def test_a_killed_shard_ends_train_with_1_and_resume_goes_on(tmp_path: Path, gate: Gate) -> None:
    """The gate makes sure that the job is in the middle; its first cut is the event that the test waits for."""
    values = job(
        tmp_path / "run",
        gate.data(samples=96, free=66),
        {"name": "mlp", "hidden": [12, 12], "batchnorm": True, "outputs": 4},
        train={"steps": 8},
        checkpoint={"path": str(tmp_path / "run"), "every": 1},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with started(tmp_path, "train", "job.yaml", "--allow-import", OWN_CODE) as process:
        assert process.stderr is not None
        before = ""
        while "cut at version 3 is durable" not in before:
            line = process.stderr.readline()
            assert line, before
            before += line
        children = psutil.Process(process.pid).children(recursive=True)
        child_of(process, "shard-1").kill()
        gate.open()
        output, said = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=20)
    assert process.returncode == 1, said
    assert alive == []
    assert "shard shard-1 (block 1) was lost" in said
    assert "layerwise resume run" in said
    assert "Traceback" not in said
    failed = json.loads(output.splitlines()[-1])
    assert failed["state"] == "failed"

    status, document, said = command(tmp_path, "resume", "run", "--allow-import", OWN_CODE, "--quiet")
    assert status == 0, said
    check_done(JobResult.from_document(document))
    status, report, said = command(tmp_path, "audit", "run")
    assert status == 0, said
    assert report["passed"] is True


def test_train_from_python_tells_what_the_command_line_tells(tmp_path: Path, images: Path) -> None:
    values = job(tmp_path / "run", image_data(images), MODELS["cnn"])
    result = layerwise.train(values, overrides=["train.steps=4"])
    check_done(result)
    assert result.steps == 4
    status, report, said = command(tmp_path, "audit", "run")
    assert status == 0, said
    assert report["passed"] is True
    keys = {"job", "state", "steps", "epochs", "samples", "seconds", "samples_per_second", "train_loss", "validation"}
    assert keys | {"staleness", "ledger", "window", "accumulation", "backward_weights"} <= result.document.keys()
    with pytest.raises(layerwise.LayerwiseError, match="no file at"):
        layerwise.train({**values, "data": image_data(tmp_path / "nothing")})


def test_connect_submits_and_waits(cluster: LocalCluster, tmp_path: Path, images: Path) -> None:
    with layerwise.connect(cluster.coordinator_address) as connection:
        running = connection.submit(job(tmp_path, image_data(images), MODELS["mlp"]))
        result = running.wait(60)
        check_done(result)
        assert connection.job(running.id).status() == result
        assert result.job in [one.job for one in connection.jobs()]
        messages = [event.message for event in running.logs()]
        assert messages[-1] == "done: 5 updates of every layer"


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_an_exported_model_has_the_jobs_own_validation_loss_in_plain_pytorch(
    cluster: LocalCluster, tmp_path: Path, images: Path, model: str
) -> None:
    values = job(tmp_path / "run", image_data(images), MODELS[model], **{"async": {"accumulation": 2}})
    result = finish(cluster, values)
    assert result.validation is not None
    status, evaluated, said = command(tmp_path, "evaluate", "run", "--device", "cpu")
    assert status == 0, said
    assert evaluated["loss"] == pytest.approx(result.validation["loss"], rel=1e-5)
    assert evaluated["accuracy"] == result.validation["accuracy"]

    status, exported, said = command(tmp_path, "export", "run", "exported")
    assert status == 0, said
    config = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    spec = parse_job(config["spec"])
    data = load_dataset(spec.data)
    plain = nn.Sequential(*build_model(spec.model, 12345, data.info))
    plain.load_state_dict(load_file(tmp_path / exported["path"]))
    plain.eval()
    inputs, targets = data.validation.batch(range(len(data.validation)))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(plain(inputs[0]), targets[0])
    assert float(loss) == pytest.approx(result.validation["loss"], rel=1e-5)
