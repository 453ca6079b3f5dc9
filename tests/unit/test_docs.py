"""What README.md and docs/ say is so: tables follow the code, links lead somewhere, command lines can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from layerwise.audit_report import CLAIMS
from layerwise.cli import exit_codes
from layerwise.cli.main import COMMANDS
from layerwise.server.coordinator_role import CoordinatorRole
from layerwise.server.memory_store import MemoryJobStore
from layerwise.server.metrics import coordinator_metrics
from tests.unit.command_line import parse
from tests.unit.documented_keys import Key, keys_by_section, table_rows
from tests.unit.markdown import anchors, blocks, commands, layerwise_lines, links, table

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
OPERATIONS = REPOSITORY / "docs" / "operations.md"
DOCUMENTS = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *REPOSITORY.glob("docs/*.md")]
PLACEHOLDERS = {"JOB", "DIRECTORY", "NAME", "ADDRESS"}


def test_the_tables_of_the_job_file_have_every_key_with_its_type_and_default() -> None:
    expected = {section: keys for section, keys in keys_by_section().items() if keys}
    assert table_rows(REPOSITORY / "docs" / "job-file.md") == expected


def test_the_readme_s_table_has_the_keys_that_every_job_has() -> None:
    sections = keys_by_section()
    expected: dict[str, Key] = {name: key for name, key in sections["job"].items() if key.type != "section"}
    for section in ("train", "cluster", "async", "checkpoint"):
        expected |= {f"{section}.{name}": key for name, key in sections[section].items()}
    [rows] = [rows for rows in table_rows(README).values() if rows]
    assert rows == expected


def test_the_readme_shows_the_example_of_one_s_own_model_as_it_is() -> None:
    [shown] = blocks(README, "yaml")
    example = (REPOSITORY / "examples" / "own_model" / "spirals.yaml").read_text(encoding="utf-8")
    assert shown in example


def test_the_table_of_metrics_is_what_the_coordinator_serves() -> None:
    families = coordinator_metrics(CoordinatorRole(MemoryJobStore(), now=0.0), 0.0)
    served = {
        f"`{family.name}{'_total' if family.type == 'counter' else ''}`": (
            family.type,
            ", ".join(f"`{label}`" for label in vars(family)["_labelnames"]),
        )
        for family in families
    }
    assert {row[0]: (row[1], row[2]) for row in table(OPERATIONS, "about everything:")} == served


def test_the_readme_names_metrics_that_the_table_has() -> None:
    named = set(re.findall(r"layerwise_[a-z_]+", README.read_text(encoding="utf-8")))
    assert named
    assert named <= set(re.findall(r"layerwise_[a-z_]+", OPERATIONS.read_text(encoding="utf-8")))


def test_the_readme_names_every_exit_status() -> None:
    sentence = re.search(r"Exit status: (.*?)\n\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert sentence
    statuses = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert {int(part.split()[0]) for part in sentence[1].split(";")} == statuses


def test_the_checks_of_the_audit_are_all_explained() -> None:
    rows = table(REPOSITORY / "docs" / "architecture.md", "What is promised, and checked")
    assert [name for row in rows for name in re.findall(r"`([a-z-]+)`", row[0])] == list(CLAIMS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in links(document):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_is_there(document: Path) -> None:
    folders = ("benchmarks", "deploy", "docs", "examples", "layerwise", "proto", "server", "tests", "tools", "worker")
    paths = [*REPOSITORY.glob("*.*"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*.*"))]
    names = {path.name for path in paths}
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.-]+/)*[\w*-]+\.(?:py|proto|toml|txt))`", text):
        if "*" in name:
            assert list(REPOSITORY.glob(name)), name
        elif "/" in name:
            assert (REPOSITORY / name).is_file(), name
        else:
            assert name in names, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_can_be_typed(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for words in layerwise_lines(document):
        assert words[1] in COMMANDS, words
        if words[2:] and not PLACEHOLDERS & set(words):
            parse(words[1:])


def test_every_command_is_in_a_document() -> None:
    named = {name for document in DOCUMENTS for name in COMMANDS if f"`{name}" in document.read_text(encoding="utf-8")}
    named |= {words[1] for document in DOCUMENTS for words in layerwise_lines(document)}
    assert set(COMMANDS) - named == set()


def test_make_and_compose_know_what_the_readme_asks_of_them() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    for line in commands(README):
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line
        if line.startswith("docker compose"):
            assert set(re.findall(r"--profile (\w+)", line)) <= profiles, line
            inside = re.search(r"exec (\S+) layerwise (.*)", line)
            if inside:
                assert inside[1] in services
                parse(inside[2].split())
