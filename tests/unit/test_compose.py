"""docker-compose.yml, the Dockerfile and the scrape config agree with each other, schemas and the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from layerwise.child import Program
from layerwise.cli.main import cli
from layerwise.node import NodeSettings
from tests.unit.command_line import parse


@pytest.fixture(scope="module")
def services(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


@pytest.fixture(scope="module")
def scrape_configs(repository: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((repository / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))[
        "scrape_configs"
    ]


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> list[str]:
    """The instructions, one a line."""
    text = (repository / "deploy/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def option(service: dict[str, Any], name: str) -> str | None:
    """The value of ``--name=value`` in a service's command."""
    values = [word.partition("=")[2] for word in service["command"] if word.startswith(f"--{name}=")]
    assert len(values) <= 1
    return values[0] if values else None


def port(address: str | None) -> int | None:
    return int(address.rpartition(":")[2]) if address else None


def of_layerwise(services: dict[str, Any]) -> dict[str, Any]:
    return {name: service for name, service in services.items() if service["command"][0] == "layerwise"}


def children(service: dict[str, Any]) -> tuple[Program, ...]:
    """What the supervisor of a service starts: nothing, unless it is a node."""
    words = service["command"][1:]
    if words[0] != "node":
        return ()
    given = parse(words)
    devices = given["devices"] or ("auto",)
    shards = given["shards"] if given["shards"] is not None else len(devices)
    names = ("coordinator", "name", "forward", "backward", "listen", "advertise", "metrics", "insecure")
    return NodeSettings(shards=shards, devices=devices, **{name: given[name] for name in names}).programs()


def command_lines(repository: Path) -> list[list[str]]:
    """Every ``layerwise ...`` that the compose file (comments included) and the Dockerfile run."""
    text = (repository / "docker-compose.yml").read_text(encoding="utf-8")
    services = yaml.safe_load(text)["services"]
    found = [service["command"] for service in services.values()]
    found += [service["healthcheck"]["test"][1:] for service in services.values()]
    found += [
        shlex.split(line) for line in re.findall(r"^#.*docker compose exec \S+ (layerwise .*)$", text, re.MULTILINE)
    ]
    dockerfile = (repository / "deploy/Dockerfile").read_text(encoding="utf-8")
    found += [json.loads(line) for line in re.findall(r"^(?:CMD|ENTRYPOINT) (\[.*\])$", dockerfile, re.MULTILINE)]
    return [words for words in found if words[0] == "layerwise"]


def test_the_compose_file_follows_the_compose_specification(repository: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "docker-compose.yml",
    ]
    subprocess.run(command, cwd=repository, check=True, timeout=60)
    assert "version" not in yaml.safe_load((repository / "docker-compose.yml").read_text(encoding="utf-8"))


def test_every_command_line_is_one_that_the_command_line_accepts(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    lines = command_lines(repository)
    assert {"coordinator", "node", "forward", "backward", "healthcheck", "submit"} <= {words[1] for words in lines}
    for words in lines:
        if words[1:] == ["--help"]:
            with pytest.raises(click.exceptions.Exit):
                cli.make_context("layerwise", ["--help"])
        else:
            parse(words[1:])


def test_the_parse_of_command_lines_refuses_what_does_not_exist() -> None:
    for words in (["no-such-command"], ["node", "--no-such-option"]):
        with pytest.raises(click.UsageError):
            parse(words)


def test_every_address_points_at_the_service_that_listens_there(services: dict[str, Any]) -> None:
    coordinator = f"coordinator:{port(option(services['coordinator'], 'listen'))}"
    for name, service in of_layerwise(services).items():
        listen = option(service, "listen")
        if name != "coordinator":
            assert option(service, "coordinator") == coordinator, name
        if advertise := option(service, "advertise"):
            assert advertise == f"{name}:{port(listen)}"
        for program in children(service):
            assert name in program.name
            parse(list(program.command))
        health = service["healthcheck"]["test"]
        if listen:
            assert health == ["CMD", "layerwise", "healthcheck", f"127.0.0.1:{port(listen)}"], name
        else:
            assert f"127.0.0.1:{port(option(service, 'metrics'))}/metrics" in health[-1], name
    listening = port(option(services["coordinator"], "listen"))
    assert services["coordinator"]["environment"]["LAYERWISE_COORDINATOR"] == f"127.0.0.1:{listening}"
    assert services["coordinator"]["ports"] == [f"127.0.0.1:{listening}:{listening}"]


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    for service in services.values():
        assert all(entry.startswith("127.0.0.1:") for entry in service.get("ports", []))


def test_every_metrics_port_is_scraped_once_and_nothing_else_is(
    services: dict[str, Any], scrape_configs: list[dict[str, Any]]
) -> None:
    scraped = [
        target for scrape in scrape_configs for entry in scrape.get("static_configs", []) for target in entry["targets"]
    ]
    scraped += [
        f"{name}:{entry['port']}"
        for scrape in scrape_configs
        for entry in scrape.get("dns_sd_configs", [])
        for name in entry["names"]
    ]
    served = [f"{name}:{port(option(service, 'metrics'))}" for name, service in of_layerwise(services).items()]
    served += [
        f"{name}:{port(program.arguments[program.arguments.index('--metrics') + 1])}"
        for name, service in of_layerwise(services).items()
        for program in children(service)
    ]
    assert sorted(scraped) == sorted(served)


def test_each_gpu_belongs_to_one_shard(services: dict[str, Any]) -> None:
    """A container counts the GPUs that it is given from 0; each of them has one shard."""
    given: list[str] = []
    for service in services.values():
        if service.get("profiles") == ["gpu"]:
            (reserved,) = service["deploy"]["resources"]["reservations"]["devices"]
            devices = [program.arguments[program.arguments.index("--device") + 1] for program in children(service)]
            assert devices == [f"cuda:{number}" for number in range(len(reserved["device_ids"]))]
            given += reserved["device_ids"]
    assert given == [str(number) for number in range(len(given))]
    assert given


def test_every_profile_that_trains_has_shards_and_every_service_a_health_check(services: dict[str, Any]) -> None:
    for profile in ("cpu", "gpu"):
        nodes = [service for service in of_layerwise(services).values() if service.get("profiles") == [profile]]
        assert sum(program.name.startswith("shard-") for node in nodes for program in children(node)) >= 2
    assert services["prometheus"]["profiles"] == ["monitoring"]
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        for other in service.get("depends_on", {}):
            assert "profiles" not in services[other], f"{name} would not start without a profile of {other}"


def test_volumes_are_mounted_where_the_image_lets_its_user_write(
    services: dict[str, Any], dockerfile: list[str]
) -> None:
    (made,) = [line for line in dockerfile if "chown -R" in line]
    assert "USER layerwise" in dockerfile
    for name, service in of_layerwise(services).items():
        for volume in service.get("volumes", []):
            assert f" {volume.partition(':')[2]} " in made, (name, volume)


def test_all_that_reads_or_writes_checkpoints_shares_one_volume(services: dict[str, Any]) -> None:
    for name, service in of_layerwise(services).items():
        if name != "backward":  # a detached backward worker gets its parameters over the network and keeps nothing
            assert "checkpoints:/srv/layerwise/runs" in service["volumes"], name


def test_the_image_copies_what_exists_and_all_that_the_wheel_needs(repository: Path, dockerfile: list[str]) -> None:
    copied = {
        word for line in dockerfile if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    copied = {word for word in copied if not word.startswith("--")}
    assert not {word for word in copied if not (repository / word).exists()}
    ignored = (repository / ".dockerignore").read_text(encoding="utf-8").split()
    assert {f"!{word}" for word in copied} <= set(ignored)
    setuptools = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(setuptools["package-dir"].values()) <= copied
    folders = {setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]}
    (made,) = [line for line in dockerfile if line.startswith("RUN mkdir")]
    assert folders - {"layerwise"} <= set(made.split()), "the image's dependency layer needs a folder for every package"


def test_prometheus_leaves_our_own_labels_alone(repository: Path, scrape_configs: list[dict[str, Any]]) -> None:
    """Where it did not, the ``job`` of a shard's metrics became ``exported_job``."""
    about_all, about_itself = (
        (repository / "docs/operations.md").read_text(encoding="utf-8").partition("Each process, about itself:")[::2]
    )
    rows = [
        ("coordinator", labels)
        for labels in re.findall(r"^\| `layerwise_\w+` \|[^|]*\|([^|]*)\|", about_all, re.MULTILINE)
    ]
    rows += re.findall(r"^\| `layerwise_\w+` \| (\w+) \|([^|]*)\|", about_itself, re.MULTILINE)
    clash = {role for role, labels in rows if "`job`" in labels or "`role`" in labels}
    assert clash == {"coordinator", "shard"}
    honoured = {scrape["job_name"] for scrape in scrape_configs if scrape.get("honor_labels")}
    assert clash <= honoured


def test_the_scrape_config_is_one_that_prometheus_takes(repository: Path, scrape_configs: list[dict[str, Any]]) -> None:
    names = [scrape["job_name"] for scrape in scrape_configs]
    assert len(names) == len(set(names))
    promtool = shutil.which("promtool")
    # Continuous integration has it; elsewhere the checks above must do.
    assert promtool or not os.environ.get("CI"), "promtool is missing: install Debian's package prometheus"
    if promtool:
        command = [promtool, "check", "config", "deploy/prometheus/prometheus.yml"]
        subprocess.run(command, cwd=repository, check=True, timeout=60)
