"""The user's own code: found by ``package.module:function``, run only where somebody allowed its module."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import ConfigError, NotAllowedError, sentence


def check_allowed(target: str, allowed: Sequence[str], *, key: str = "import") -> None:
    """Raise `NotAllowedError` unless an entry of ``allowed`` covers the module of ``target``."""
    module_name = target.partition(":")[0]
    if not any(module_name == prefix or module_name.startswith(prefix + ".") for prefix in allowed):
        given = ", ".join(allowed) or "nothing"
        raise NotAllowedError(
            f"{key}: {target} is code from outside layerwise and was not run: allowed is {given}; "
            f"say --allow-import {module_name} on every command that loads it"
        )


def load_import(target: str, allowed: Sequence[str], *, key: str = "import") -> Callable[..., Any]:
    """The function that ``target`` (``package.module:function``) names.

    ``allowed`` are modules; each allows itself and what lies below it. A module that is not installed is looked for in
    the current folder too. ``key`` says where in the job file the target stands.

    Raises:
        NotAllowedError: no entry of ``allowed`` covers the module; nothing was imported.
        ConfigError: the module can't be imported, or has no such function.
    """
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise ConfigError(f"{key}: got {target!r}, expected package.module:function")
    check_allowed(target, allowed, key=key)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{key}: module {module_name} can't be imported: {sentence(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{key}: module {module_name} has no {path}; it is at {getattr(found, '__file__', '?')}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key}: {target} is a {type(found).__name__}, expected a function")
    function: Callable[..., Any] = found
    return function


def call_import(target: str, arguments: Mapping[str, Any], allowed: Sequence[str], *, key: str = "import") -> Any:
    """What the function named by ``target`` returns for ``arguments``.

    Raises:
        NotAllowedError: as `load_import`.
        ConfigError: as `load_import`; or the arguments do not fit; or the function raised.
    """
    function = load_import(target, allowed, key=key)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {target} does not take the keys beside import: {error}") from None
    except ValueError:
        pass  # some built-in functions have no signature to check
    try:
        return function(**arguments)
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(f"{key}: {target} failed: {sentence(error)}") from error
