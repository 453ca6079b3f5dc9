"""The Python interface, and what a finished job leaves: train, submit, audit, evaluate, export, load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import layerwise
from layerwise.cli.main import run
from layerwise.cluster import LocalCluster
from layerwise.data import load_dataset
from layerwise.job import parse_job
from layerwise.models import build_model
from tests.integration.jobs import MODELS, check_done, finish, image_data, job


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command that ends well prints, run in this process: those that start none need no torch loaded anew."""
    status = run([*arguments, "--output", "json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out.splitlines()[-1])


def test_train_from_python_tells_what_the_command_line_tells(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "data"
    shutil.copytree(images, own)
    values = job(tmp_path / "run", image_data(own), MODELS["cnn"])
    result = layerwise.train(values, overrides=["train.steps=4"])
    check_done(result)
    assert result.steps == 4
    assert here(capsys, "audit", str(tmp_path / "run"))["passed"] is True
    shutil.rmtree(own)  # an export does not need the data
    assert here(capsys, "export", str(tmp_path / "run"))["version"] == 4
    keys = {"job", "state", "steps", "epochs", "samples", "seconds", "samples_per_second", "train_loss", "validation"}
    assert keys | {"staleness", "ledger", "window", "accumulation", "backward_weights"} <= result.document.keys()


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
    cluster: LocalCluster, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    values = job(tmp_path / "run", image_data(images), MODELS[model], **{"async": {"accumulation": 2}})
    result = finish(cluster, values)
    assert result.validation is not None
    evaluated = here(capsys, "evaluate", str(tmp_path / "run"), "--device", "cpu")
    assert evaluated["loss"] == pytest.approx(result.validation["loss"], rel=1e-5)
    assert evaluated["accuracy"] == result.validation["accuracy"]

    exported = here(capsys, "export", str(tmp_path / "run"), str(tmp_path / "exported"))
    config = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    spec = parse_job(config["spec"])
    data = load_dataset(spec.data)
    plain = nn.Sequential(*build_model(spec.model, 12345, data.info))
    plain.load_state_dict(load_file(exported["path"]))
    plain.eval()
    inputs, targets = data.validation.batch(range(len(data.validation)))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(plain(inputs[0]), targets[0])
    assert float(loss) == pytest.approx(result.validation["loss"], rel=1e-5)
