"""Small jobs, and what must hold for each that has ended."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from layerwise.api import Connection, Job
from layerwise.cluster import LocalCluster
from layerwise.cuts import load_manifest, newest_cut
from layerwise.device import resolve_device
from layerwise.errors import DeadlineError
from layerwise.job import parse_job
from layerwise.job_audit import audit_job
from layerwise.job_result import JobResult
from layerwise.settings import ResolvedSettings
from layerwise.verify import verify

OWN_CODE = "tests.integration.own_code"
JOB_SECONDS = 60.0
ASK_SECONDS = 0.05

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05},
    "momentum": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
    "nesterov": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adamw": {"name": "adamw", "lr": 1e-2},
    "muon": {"name": "muon"},
}

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "hidden": [16, 16, 12, 12], "dropout": 0.1, "batchnorm": True},
    "cnn": {"name": "cnn", "channels": [4, 6, 8], "dropout": 0.1, "batchnorm": True},
    "transformer-lm": {
        "name": "transformer-lm",
        "layers": 3,
        "width": 16,
        "heads": 2,
        "context": 16,
        "dropout": 0.1,
        "expansion": 2,
    },
    "resnet": {"name": "resnet", "depth": 18, "stem": "cifar", "width": 4},
}
"""Every built-in family with dropout or batch normalisation, and at least four layers."""


def write_images(folder: Path) -> Path:
    """A safetensors file with images that their class makes brighter; validation data beside it."""
    for name, samples, seed in (("train", 44, 1), ("validation", 20, 2)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(samples) % 4
        inputs = torch.randn(samples, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
        save_file({"inputs": inputs, "targets": labels}, folder / f"{name}.safetensors")
    return folder


def image_data(folder: Path, batch: int = 16) -> dict[str, Any]:
    """The ``data`` section for what `write_images` wrote."""
    return {
        "name": "arrays",
        "path": str(folder / "train.safetensors"),
        "validation_path": str(folder / "validation.safetensors"),
        "batch": batch,
    }


def text_data(batch: int = 16) -> dict[str, Any]:
    """Bytes of Python's own sources: 60 samples of 16 bytes, some of them for validation."""
    return {"name": "text", "path": "python-stdlib", "bytes": 60 * 16 + 1, "batch": batch, "validation": 0.2}


def job(directory: Path, data: Mapping[str, Any], model: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """A job of five updates on two shards; ``sections`` replace what it would say otherwise."""
    return {
        "name": directory.name,
        "model": dict(model),
        "data": dict(data),
        "train": {"steps": 5, "seed": 3, "optimizer": OPTIMIZERS["momentum"]},
        "cluster": {"shards": 2},
        "checkpoint": {"path": str(directory)},
        **sections,
    }


class Gate:
    """Keeps jobs from their end: each worker of a job with `data` gets so many samples and waits for the next ones until `open`."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        # Open for both, so that neither side waits for the other: readers wait for data, or for our end.
        self._file = os.open(path, os.O_RDWR)

    def data(self, *others: Gate, samples: int, free: int, batch: int = 16) -> dict[str, Any]:
        """A ``data`` section of ``samples``, of which each process gets ``free`` before this gate, and as many more before each other."""
        target = f"{OWN_CODE}:gated"
        return {"import": target, "batch": batch, "samples": samples, "validation_samples": 12} | {
            "gates": [str(gate.path) for gate in (self, *others)],
            "free": free,
        }

    def open(self) -> None:
        """Let everybody through, for ever."""
        if self._file >= 0:
            self.path.unlink()
            os.close(self._file)
            self._file = -1


def finish(cluster: LocalCluster, values: Mapping[str, Any]) -> JobResult:
    """Run a job to its end, which must be a good one."""
    with Connection(cluster.coordinator_address) as connection:
        result = wait(connection.submit(values))
    check_done(result)
    return result


def wait(running: Job) -> JobResult:
    """Wait for the end, good or bad; a job that takes too long fails the test with what it has logged."""
    try:
        return running.wait(JOB_SECONDS, check=False)
    except DeadlineError:
        lines = [f"{event.level}: {event.message}" for event in running.logs()]
        now = running.status()
        running.cancel()
        pytest.fail("\n".join([f"{running.id} has not ended; {now.state}, {now.message}, step {now.steps}", *lines]))


def check_done(result: JobResult) -> None:
    """The job came to its last cut, nothing was lost, and all its promises hold."""
    assert result.state == "done", result.message
    assert result.steps == result.document["total_steps"] == newest_cut(result.directory)
    check_ledger(result)
    assert result.ledger["samples_applied"] == result.document["total_samples"]
    assert result.ledger["samples_dropped"] == 0
    assert result.train_loss is not None
    check_audit(result)


def check_ledger(result: JobResult) -> None:
    """Leased = applied + dropped."""
    ledger = result.ledger
    assert ledger["samples_leased"] == ledger["samples_applied"] + ledger["samples_dropped"], ledger


def check_audit(result: JobResult) -> None:
    """The event logs, the manifests and the job's own ledger agree on everything."""
    report = audit_job(result.directory, result.document)
    assert report.passed, "\n".join(report.lines())
    if result.state in ("done", "cancelled") and result.steps:
        assert next(check for check in report.checks if check.name == "ledger").applicable


def check_equal_to_plain_loop(result: JobResult) -> None:
    """Parameters, buffers and optimizer state of the newest cut are those of a plain PyTorch loop, bit for bit."""
    spec = parse_job(result.document["spec"])
    settings = ResolvedSettings.from_json(json.dumps(load_manifest(result.directory, result.steps)["settings"]))
    device = resolve_device("auto")
    found = verify(spec, settings, result.directory, result.steps, device=device, allowed_imports=(OWN_CODE,))
    assert found.equal, found.difference
    assert found.num_tensors > 0


def ask_until(holds: Callable[[], bool]) -> None:
    """Ask until it ``holds``, some times a second: who asks without a pause takes a processor from those that he waits for."""
    pause = threading.Event()
    while not holds():
        pause.wait(ASK_SECONDS)


def wait_for_cut(running: Job, version: int) -> None:
    """Return when the cut at ``version`` is durable."""
    for event in running.logs(follow=True):
        if event.fields.get("version") == version and "durable" in event.message:
            return
    pytest.fail(f"{running.id} ended before version {version}: {running.status().message}")
