from __future__ import annotations

import sys
from pathlib import Path

import pytest

from layerwise.errors import ConfigError, NotAllowedError
from layerwise.imports import call_import, load_import


@pytest.fixture(autouse=True)
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the user's modules, which is the current folder and not on Python's path."""
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "__init__.py").write_text("")
    (tmp_path / "user_package" / "models.py").write_text(
        "number = 3\n"
        "def build(width, depth=1):\n    return [width] * depth\n"
        "def broken():\n    raise OSError('no disk')\n"
    )
    (tmp_path / "user_package_two.py").write_text("raise RuntimeError('imported without permission')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.mark.parametrize("allowed", ["user_package", "user_package.models"])
def test_an_allowed_function_gets_its_arguments(allowed: str) -> None:
    assert call_import("user_package.models:build", {"width": 2, "depth": 2}, [allowed]) == [2, 2]


@pytest.mark.parametrize("allowed", [[], ["user"], ["user_package_two"], ["user_package.models.deeper"]])
def test_a_module_outside_what_is_allowed_is_not_imported(allowed: list[str]) -> None:
    with pytest.raises(NotAllowedError, match=r"--allow-import user_package\.models"):
        load_import("user_package.models:build", allowed)
    assert "user_package" not in sys.modules


def test_permission_for_a_name_is_not_permission_for_what_begins_like_it() -> None:
    with pytest.raises(NotAllowedError):
        load_import("user_package_two:anything", ["user_package"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("user_package.missing:f", "module user_package.missing can't be imported: ModuleNotFoundError"),
        ("user_package_two:f", "can't be imported: RuntimeError: imported without permission"),
        ("user_package.models:f", "module user_package.models has no f; it is at .*models.py"),
        ("user_package.models:number", "is a int, expected a function"),
        ("user_package.models", "expected package.module:function"),
    ],
)
def test_what_can_not_be_loaded_is_said_in_a_sentence(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_import(target, ["user_package", "user_package_two"], key="model.import")


def test_arguments_that_do_not_fit_name_the_argument() -> None:
    with pytest.raises(ConfigError, match=r"does not take the keys beside import: .*'depht'"):
        call_import("user_package.models:build", {"width": 1, "depht": 2}, ["user_package"])


def test_an_error_inside_the_function_is_passed_on_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"user_package.models:broken failed: OSError: no disk"):
        call_import("user_package.models:broken", {}, ["user_package"])
