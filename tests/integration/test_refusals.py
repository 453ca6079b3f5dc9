"""What can't be done is said in one sentence, with the right exit status, and nothing is left running."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import run
from typing import Any

import psutil
import pytest
import yaml

from layerwise.api import Connection
from layerwise.cluster import LocalCluster
from tests.integration.conftest import REPOSITORY
from tests.integration.jobs import (
    MODELS,
    OWN_CODE,
    ask_until,
    check_audit,
    check_equal_to_plain_loop,
    finish,
    image_data,
    job,
    wait,
)

RAMP = {"import": f"{OWN_CODE}:ramp", "samples": 48, "validation_samples": 12, "batch": 16}


def own(function: str, **arguments: Any) -> dict[str, Any]:
    """A model of `tests.integration.own_code`."""
    return {"import": f"{OWN_CODE}:{function}", **arguments}


def check_sentence(message: str) -> None:
    """One sentence for people: no traceback, no second line."""
    assert message.strip()
    assert "Traceback" not in message
    assert "\n" not in message.strip(), message


def wait_until_left(connection: Connection, name: str) -> None:
    """Return when no process works for the job any more: each lets go of it as soon as its pass is over."""
    ask_until(lambda: all(node["job"] != name for node in connection.nodes()))


def failure(cluster: LocalCluster, values: dict[str, Any]) -> str:
    """Why the job failed."""
    with Connection(cluster.coordinator_address) as connection:
        running = connection.submit(values)
        result = wait(running)
        assert result.state == "failed", result.message
        check_sentence(result.message)
        assert next(event for event in running.logs() if event.level == "error").message == result.message
        if result.steps:
            check_audit(result)
        wait_until_left(connection, result.job)
    return result.message


def test_a_loss_that_is_no_number_names_the_first_layer(cluster: LocalCluster, tmp_path: Path) -> None:
    values = job(
        tmp_path,
        RAMP,
        own("becomes_nan", calls=9),
        cluster={"shards": 4},
        **{"async": {"window": 3, "accumulation": 2}},
    )
    message = failure(cluster, values)
    assert "layer 2 (2-becomes-nan) is the first whose output is not finite" in message


def test_a_gradient_that_is_no_number_in_the_last_update_fails_the_job(cluster: LocalCluster, tmp_path: Path) -> None:
    """Every loss is finite: without a look at the gradients the job ended well, with weights that are no numbers."""
    values = job(
        tmp_path,
        RAMP,
        own("becomes_steep", calls=12),
        train={"steps": 6, "optimizer": {"name": "sgd", "lr": 0.05}},
        cluster={"shards": 2},
        **{"async": {"window": 2, "accumulation": 2}},
    )
    message = failure(cluster, values)
    assert "the gradient of layer 2 (2-becomes-steep) for the update to version 6 is not finite" in message


def test_layers_that_do_not_fit_together_are_named_with_their_shapes(cluster: LocalCluster, tmp_path: Path) -> None:
    message = failure(cluster, job(tmp_path, RAMP, own("misfits")))
    assert "3-linear" in message
    assert "12]" in message


def test_parameters_shared_between_blocks_are_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    message = failure(cluster, job(tmp_path, RAMP, own("shared", width=64, between=3), cluster={"shards": 4}))
    assert "layers 0, 4 share parameters and must stay in one block" in message
    assert "at most 2 blocks" in message


def test_parameters_shared_within_a_block_are_trained(cluster: LocalCluster, tmp_path: Path) -> None:
    values = job(
        tmp_path,
        RAMP,
        own("shared", width=64, between=0),
        cluster={"shards": 1},
        **{"async": {"window": 1, "accumulation": 2}},
    )
    check_equal_to_plain_loop(finish(cluster, values))


def test_a_missing_data_set_is_named(cluster: LocalCluster, tmp_path: Path) -> None:
    message = failure(cluster, job(tmp_path / "run", image_data(tmp_path / "nothing"), MODELS["mlp"]))
    assert f"data.path: no file at {tmp_path}/nothing/train.safetensors" in message


def test_more_shards_than_layers_are_refused(cluster: LocalCluster, tmp_path: Path, images: Path) -> None:
    values = job(tmp_path, image_data(images), {"name": "mlp", "hidden": [8]}, cluster={"shards": 4})
    message = failure(cluster, values)
    assert "cluster.shards" in message
    assert "2" in message


def test_a_shard_that_does_not_get_ready_in_time_is_named(fragile: LocalCluster, tmp_path: Path, images: Path) -> None:
    """It stands still; then a process that never comes: the cluster has two shards and the job needs three."""
    values = job(tmp_path / "run", image_data(images), MODELS["mlp"], timeouts={"start": 8.0})
    first = finish(fragile, job(tmp_path / "first", image_data(images), MODELS["mlp"]))  # loads what is loaded late
    with Connection(fragile.coordinator_address) as connection:
        wait_until_left(connection, first.job)
        fragile.pause("shard-1")
        try:
            result = wait(connection.submit(values))
            assert result.state == "failed"
            assert "shard-1 did not get ready within 8 s" in result.message
            check_sentence(result.message)
            lacking = {**values, "cluster": {"shards": 3}, "timeouts": {"start": 1.0}}
            result = wait(connection.submit(lacking))
            assert result.state == "failed"
            assert "needs 3 shards" in result.message
            assert "within 1 s" in result.message
            check_sentence(result.message)
        finally:
            fragile.unpause("shard-1")


# Commands -------------------------------------------------------------------------------------------------------------


def layerwise(*arguments: str, folder: Path, program: Sequence[str] = ("-m", "layerwise")) -> tuple[int, str, str]:
    """Run a command in ``folder``; its exit status, output and what it said. All that it started has ended."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LAYERWISE_REFUSALS": str(folder)}
    done = run(
        [sys.executable, "-P", *program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    for process in psutil.process_iter():
        try:
            assert process.environ().get("LAYERWISE_REFUSALS") != str(folder), process.cmdline()
        except psutil.Error:
            continue  # ended meanwhile, or somebody else's
    return done.returncode, done.stdout, done.stderr


def write_job(folder: Path, values: dict[str, Any]) -> str:
    (folder / "job.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return "job.yaml"


def test_train_on_a_device_that_is_not_there_ends_with_one_sentence(tmp_path: Path, images: Path) -> None:
    spec = write_job(tmp_path, job(tmp_path / "run", image_data(images), MODELS["mlp"]))
    status, _, said = layerwise("train", spec, "--quiet", "--device", "cuda:99", folder=tmp_path)
    assert status == 2
    assert "cuda:99" in said
    check_sentence(said)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, _, said = layerwise("coordinator", "--listen", address, "--state", "state", folder=tmp_path)
    assert status == 2
    check_sentence(said)
    assert f"{address}: it is taken" in said


ANOTHER_VERSION = """
import sys
import layerwise.version as version
version.WIRE_VERSION = 99
from layerwise.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments", [["jobs"], ["shard", "--listen", "unix:{folder}/s"], ["forward"]], ids=["client", "shard", "worker"]
)
def test_a_peer_of_another_wire_version_is_refused(
    cluster: LocalCluster, socket_folder: Path, arguments: list[str]
) -> None:
    words = [word.format(folder=socket_folder) for word in arguments]
    status, _, said = layerwise(
        *words, "--coordinator", cluster.coordinator_address, folder=socket_folder, program=("-c", ANOTHER_VERSION)
    )
    assert status not in (0, 130), said
    assert "wire version 99" in said
    assert "Traceback" not in said
    with Connection(cluster.coordinator_address) as connection:
        assert len(connection.nodes()) == 9
