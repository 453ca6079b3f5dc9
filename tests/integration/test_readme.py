"""The README's commands and programs, run as they stand there, with less training.

Every command in it is in one of the lists below. Those that start services on several machines are not run: the
command lines of `docker-compose.yml` are of the same form, and `test_compose_start` runs them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.cli.main import run
from layerwise.cuts import newest_cut
from layerwise.data.load import load_dataset
from layerwise.run_directory import spec_in
from tests.integration.command import Command
from tests.unit.markdown import blocks, commands, table
from tests.unit.test_docs import OPERATIONS, README, REPOSITORY

LOOKS = (
    "layerwise evaluate runs/digits",
    "layerwise export runs/digits model",
    "layerwise audit runs/digits",
    "layerwise replay runs/digits",
    "layerwise plan examples/digits.yaml",
)
"""Commands that look at what a run has left, run inside this process."""
TRAINS = {
    "make train": ["train.epochs=1"],
    "layerwise train spirals.yaml --allow-import spirals": ["train.steps=6"],
    "layerwise verify examples/digits.yaml --steps 5": [],
    "layerwise train examples/digits.yaml --set train.epochs=2 --output json": ["train.steps=4"],
}
"""Commands that start a cluster of their own, with what is changed so that they end soon."""
CLUSTER = (
    "layerwise up &",
    "layerwise nodes",
    "layerwise submit examples/digits.yaml",
    "layerwise status digits-1",
    "layerwise logs -f digits-1",
    "layerwise cancel digits-1 --wait",
    "layerwise resume digits-1",
    "layerwise drain rack-2",
    "layerwise jobs --output json",
)
"""One after the other, on the cluster of the first."""
RESULT_KEYS = {
    "job",
    "state",
    "steps",
    "epochs",
    "samples",
    "seconds",
    "samples_per_second",
    "train_loss",
    "validation",
    "staleness",
    "ledger",
    "window",
    "accumulation",
    "backward_weights",
}
"""What a finished run tells programs, at least."""
NOT_RUN = re.compile(
    r"make test|cd examples/own_model|docker compose .*|layerwise (coordinator|node|shard|forward|backward|chaos) .*"
    r"|layerwise submit .*--coordinator head:7070.*"
)
"""`tests.unit.test_docs` parses these; what they would do is tested elsewhere."""


def test_every_command_of_the_readme_is_run_or_parsed() -> None:
    listed = {*LOOKS, *TRAINS, *CLUSTER}
    found = commands(README)
    assert listed <= set(found)
    assert [line for line in found if line not in listed and not NOT_RUN.fullmatch(line)] == []


def words(line: str, changes: list[str] = []) -> list[str]:  # noqa: B006  (read only)
    """A command line's arguments, with ``--set`` for each of ``changes``."""
    if line == "make train":
        makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        recipe = re.search(r"^train:.*\n\t\$\(BIN\)/(layerwise train) \$\(SPEC\)", makefile, re.MULTILINE)
        spec = re.search(r"^SPEC \?= (\S+)$", makefile, re.MULTILINE)
        assert recipe
        assert spec
        line = f"{recipe[1]} {spec[1]}"
    split = [word for word in shlex.split(line) if word != "&"]
    return [*split[1:], *(word for change in changes for word in ("--set", change))]


def without_numbers(line: str) -> str:
    """What is the same whenever the command runs."""
    return re.sub(r"\d[\d.]*", "N", line)


def program(source: str, folder: Path) -> str:
    """What a program prints when it is run in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the examples, and a run of the first command in it."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "examples", place / "examples")
    with Command(*words("make train", TRAINS["make train"]), folder=place) as command:
        assert command.finish() == 0, command.errors
        facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in command.output.splitlines())
    [shown] = [block for block in blocks(README, "console") if block.startswith("$ make train")]
    events, end = shown.splitlines()[2 : -len(facts)], shown.splitlines()[-len(facts) :]
    assert [line.split("  ")[0] for line in end] == list(facts)
    said = {without_numbers(line) for line in command.lines}
    assert [line for line in events if not line.startswith("step ") and without_numbers(line) not in said] == []
    return place


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``folder`` as the working directory of this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "runtime"))
    return folder


def test_what_a_run_has_left_can_be_looked_at(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in LOOKS:
        assert run(words(line)) == 0, capsys.readouterr().err
    assert (inside / "model" / "model.safetensors").is_file()
    promises = re.search(r"recompute (\d+) promises", README.read_text(encoding="utf-8"))
    assert promises
    said = capsys.readouterr().out
    assert f"{promises[1]} of {promises[1]} checks passed" in said
    assert "every hash is the recorded one" in said


def test_plain_pytorch_loads_the_export_and_finds_the_same_accuracy(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "runs/digits", "model"]) == 0
    assert run(["evaluate", "runs/digits", "--output", "json"]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]
    [source] = [block for block in blocks(README, "python") if "load_file" in block]
    assert "layerwise" not in source
    names: dict[str, Any] = {}
    exec(compile(source, str(README), "exec"), names)  # noqa: S102  (the README's own program)
    samples = load_dataset(spec_in(inside / "runs" / "digits").data).validation
    inputs, targets = samples.batch(range(len(samples)))
    with torch.no_grad():
        right = names["model"](inputs[0]).argmax(1) == targets[0]
    assert right.float().mean().item() == pytest.approx(expected)


def test_a_finished_run_is_left_alone(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = newest_cut(inside / "runs" / "digits")
    assert run(["export", "runs/digits", "/proc/model"]) == 2
    assert "/proc/model can't be written into" in capsys.readouterr().err
    # The job file again is another run, which fails here.
    before = set(inside.glob("runs/*"))
    with pytest.raises(layerwise.LayerwiseError, match="no file at"):
        layerwise.train("examples/digits.yaml", overrides=["data={name: arrays, path: nothing, batch: 4}"])
    (another,) = set(inside.glob("runs/*")) - before
    assert another.name.startswith("digits-")
    assert newest_cut(inside / "runs" / "digits") == newest
    assert run(["resume", "runs/digits", "--quiet"]) == 5
    assert "done" in capsys.readouterr().err


def test_the_example_of_a_model_of_ones_own_trains(folder: Path) -> None:
    [line] = [line for line in TRAINS if "spirals" in line]
    with Command(*words(line, TRAINS[line]), folder=folder / "examples" / "own_model") as command:
        assert command.finish() == 0, command.errors
        assert "Traceback" not in command.errors


def test_a_job_is_verified(folder: Path) -> None:
    [line] = [line for line in TRAINS if " verify " in line]
    before = set(folder.glob("runs/*"))
    with Command(*words(line, TRAINS[line]), folder=folder) as command:
        assert command.finish() == 0, command.errors
        assert command.output.startswith("equal bit for bit after 5 updates")
    assert set(folder.glob("runs/*")) == before


def test_a_run_is_a_document_for_programs_that_has_every_fact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [line] = [line for line in TRAINS if "--output json" in line]
    with Command(*words(line, TRAINS[line]), folder=folder) as command:
        assert command.finish() == 0, command.errors
        assert len(command.output.splitlines()) == 1
        document = command.document
    assert set(document) >= RESULT_KEYS
    assert (document["state"], document["steps"]) == ("done", 4)
    assert document["ledger"]["samples_leased"] == document["ledger"]["samples_applied"] == 4 * 64
    assert set(document["validation"]) >= {"loss", "accuracy"}
    assert set(document["staleness"]) >= {"mean", "p50", "p99", "max", "layers"}
    assert all(layer["name"] for layer in document["staleness"]["layers"])
    assert Path(document["directory"]).parent == folder / "runs"
    assert "step 4/4" in command.errors
    assert "Traceback" not in command.errors
    assert run(["evaluate", document["directory"]]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert float(shown["loss"]) == pytest.approx(document["validation"]["loss"], rel=1e-3)


@pytest.fixture
def cluster(inside: Path) -> Iterator[Command]:
    """What ``up`` starts, and a detached backward worker more."""
    with Command(*words(CLUSTER[0]), "--backward", "1", folder=inside) as up:
        up.wait_for("processes run")
        yield up
        up.interrupt()
        assert up.finish() == 0, up.errors


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command of the cluster's prints."""
    status = run(list(arguments))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


@pytest.mark.timeout(240)
def test_a_cluster_that_stays(cluster: Command, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, nodes, submit, status, logs, cancel, resume, drain, jobs = CLUSTER
    assert (
        len(output(capsys, *words(nodes)).splitlines()) == 1 + 1 + 2 + 1 + 1
    )  # the header, the coordinator, and what the fixture starts
    # So many epochs that it can't end by itself before it is cancelled.
    assert output(capsys, *words(submit, ["train.epochs=100000"])).strip() == "digits-1"
    assert "digits-1" in output(capsys, *words(status))
    with Command(*words(logs), folder=inside) as follower:
        cancelled = output(capsys, *words(cancel))
        assert follower.finish() == 0, follower.errors
        assert "cancelled" in follower.output.splitlines()[-1]
    assert cancelled.strip() == "digits-1 cancelled"
    assert output(capsys, *words(resume)).strip() == "digits-1"
    processes = json.loads(output(capsys, "nodes", "--output", "json"))
    check_metrics(processes)
    output(capsys, *words(cancel))
    idle = next(one["name"] for one in processes if one["role"] == "backward")
    output(capsys, *words(drain.replace("rack-2", idle)))
    output(capsys, *words(drain.replace("rack-2", idle)), "--undo")
    assert [one["state"] for one in json.loads(output(capsys, *words(jobs)))] == ["cancelled"]
    [source] = [block for block in blocks(README, "python") if "layerwise.connect" in block]
    address = cluster.output.splitlines()[0]
    printed = program(source.replace("127.0.0.1:7070", address), inside).splitlines()
    assert printed[0].startswith("done ")
    assert float(printed[-1]) > 0


def check_metrics(nodes: list[dict[str, Any]]) -> None:
    """Each process serves what the table of metrics says of it, and nothing of ours besides."""
    rows = [(row[0].strip("`"), row[1]) for row in table(OPERATIONS, "about itself:")]
    rows += [(row[0].strip("`"), "coordinator") for row in table(OPERATIONS, "about everything:")]
    assert {node["role"] for node in nodes} == {"coordinator", "shard", "forward", "backward"}
    for node in nodes:
        with urllib.request.urlopen(f"http://{node['metrics_address']}/metrics", timeout=10) as answer:
            page = answer.read().decode()
        served = {
            name if kind != "counter" or name.endswith("_total") else f"{name}_total"
            for name, kind in re.findall(r"^# TYPE (layerwise_\w+) (\w+)$", page, re.MULTILINE)
        }
        assert served == {name for name, process in rows if process in ("all", node["role"])}, node["name"]
