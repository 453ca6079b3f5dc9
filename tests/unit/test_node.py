"""The command lines of a node's processes."""

from __future__ import annotations

import json

import click
import pytest

from layerwise.cli.main import cli
from layerwise.cli.node import json_line, text_line
from layerwise.errors import ConfigError
from layerwise.node import NodeSettings, nth_address


def settings(**changes: object) -> NodeSettings:
    values: dict[str, object] = {"coordinator": "host:7070", "name": "here", "threads": 2}
    return NodeSettings(**{**values, **changes})  # type: ignore[arg-type]


def parsed(node: NodeSettings) -> dict[str, dict[str, object]]:
    """The parameters of each process as the real command line reads them."""
    found = {}
    group = click.Context(cli, info_name="layerwise")
    assert isinstance(cli, click.Group)
    for program in node.programs():
        role, *words = program.command
        command = cli.get_command(group, role)
        assert command is not None
        found[program.name] = command.make_context(role, words, parent=group).params
    return found


def test_every_process_has_a_name_an_address_a_device_and_a_metrics_page_of_its_own() -> None:
    node = settings(
        shards=2,
        forward=1,
        backward=2,
        devices=("cuda:0", "cuda:1", "cuda:2"),
        listen="0.0.0.0:7071",
        advertise="me:8071",
        metrics="0.0.0.0:9090",
        allow_imports=("mine", "yours"),
        insecure=True,
        log_format="json",
    )
    found = parsed(node)
    assert list(found) == ["shard-here-0", "shard-here-1", "forward-here-0", "backward-here-0", "backward-here-1"]
    assert all(one["name"] == name for name, one in found.items())
    assert [one["metrics"] for one in found.values()] == [f"0.0.0.0:{port}" for port in range(9091, 9096)]
    assert [one.get("device") for one in found.values()] == ["cuda:0", "cuda:1", None, "cuda:2", "cuda:0"]
    assert [one.get("listen") for one in found.values()][:3] == ["0.0.0.0:7071", "0.0.0.0:7072", None]
    assert [one.get("advertise") for one in found.values()][:3] == ["me:8071", "me:8072", None]
    for one in found.values():
        assert (one["coordinator"], one["insecure"], one["log_format"]) == ("host:7070", True, "json")
        assert one["allow_imports"] == ("mine", "yours")
        assert one["exit_with_parent"]


def test_threads_are_those_of_arithmetic_only() -> None:
    programs = {program.name: program for program in settings(forward=1).programs()}
    assert programs["shard-here-0"].environment["OMP_NUM_THREADS"] == "2"
    assert programs["forward-here-0"].environment["OMP_NUM_THREADS"] == "1"
    assert parsed(settings(forward=1))["shard-here-0"]["threads"] == 2


def test_a_node_with_nothing_to_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to do"):
        settings(shards=0).programs()


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        ({"listen": "0.0.0.0:7071"}, "say --advertise with the host and port"),
        ({"listen": "[::]:0"}, "say --advertise with the host and port"),
        ({"listen": "0.0.0.0:7071", "advertise": "0.0.0.0:7071"}, "nobody can call 0.0.0.0:7071"),
        ({"listen": "0.0.0.0:7071", "advertise": "me:0"}, "nobody can call me:0, which has no port"),
    ],
)
def test_shards_that_nobody_could_call_are_refused(addresses: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**addresses).programs()
    settings(**addresses, shards=0, forward=1).programs()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("0.0.0.0:7071", "0.0.0.0:7072"),
        ("[::]:7071", "[::]:7072"),
        ("unix:/run/layerwise/shard", "unix:/run/layerwise/shard-1"),
    ],
)
def test_addresses_are_counted_up(first: str, second: str) -> None:
    assert [nth_address(first, place) for place in (0, 1)] == [first, second]


def test_there_is_no_port_after_the_last() -> None:
    with pytest.raises(ConfigError, match="65535 leaves no ports"):
        nth_address("host:65535", 1)


def test_lines_of_processes_say_whose_they_are() -> None:
    assert text_line("shard-here-0", "ready") == "shard-here-0: ready\n"
    assert json.loads(json_line("shard-here-0", '{"level": "info"}')) == {"process": "shard-here-0", "level": "info"}
    assert json.loads(json_line("shard-here-0", "no object")) == {"process": "shard-here-0", "message": "no object"}
    assert json.loads(json_line("shard-here-0", "3")) == {"process": "shard-here-0", "message": "3"}
