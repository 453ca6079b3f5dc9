"""pyproject.toml, the constraints and the source tree say the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

FOLDERS = {
    "layerwise": "layerwise",
    "server": "layerwise.server",
    "worker": "layerwise.worker",
    "proto": "layerwise.proto",
}

# Import names that are not the distribution's name.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "sklearn": "scikit-learn",
    "prometheus_client": "prometheus-client",
}


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def normalized(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def sources(repository: Path) -> list[Path]:
    return [path for folder in FOLDERS for path in (repository / folder).rglob("*.py")]


def test_every_package_of_the_tree_is_listed_for_the_wheel(repository: Path, pyproject: dict[str, Any]) -> None:
    found = {
        ".".join([FOLDERS[folder], *path.parent.relative_to(repository / folder).parts])
        for folder in FOLDERS
        for path in (repository / folder).rglob("*.py")
    }
    assert found == set(pyproject["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init_file(repository: Path) -> None:
    without = {path.parent for path in sources(repository) if not (path.parent / "__init__.py").exists()}
    assert not without


def test_every_import_of_the_packages_is_a_declared_dependency(repository: Path, pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    declared = {normalized(line) for line in project["dependencies"] + project["optional-dependencies"]["examples"]}
    undeclared = {}
    for path in sources(repository):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"layerwise"}:
                if normalized(DISTRIBUTIONS.get(top, top)) not in declared:
                    undeclared[str(path.relative_to(repository))] = top
    assert not undeclared


def test_the_constraints_pin_every_declared_dependency_to_one_version(
    repository: Path, pyproject: dict[str, Any]
) -> None:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins), pins
    project = pyproject["project"]
    wanted = [line for extra in project["optional-dependencies"].values() for line in extra]
    missing = {normalized(line) for line in project["dependencies"] + wanted} - {normalized(pin) for pin in pins}
    assert missing == {"layerwise"}  # the extra `dev` names the extra `examples`


def test_server_and_worker_never_import_each_other(repository: Path) -> None:
    for folder, other in (("server", "layerwise.worker"), ("worker", "layerwise.server")):
        for path in (repository / folder).rglob("*.py"):
            assert other not in path.read_text(encoding="utf-8"), path


def test_the_command_line_and_the_coordinator_start_without_torch() -> None:
    program = (
        "import sys, layerwise, layerwise.cli.main, layerwise.server.coordinator\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_bare_name_of_a_top_level_folder_is_never_imported(repository: Path) -> None:
    pattern = re.compile(r"^\s*(?:from|import) (?:server|worker|proto)\b", re.MULTILINE)
    folders = [*FOLDERS, "tests", "benchmarks", "examples"]
    offenders = [
        path
        for folder in folders
        for path in (repository / folder).rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not offenders
