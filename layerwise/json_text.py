"""JSON that every reader takes: a number that is not finite, which JSON does not have, becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def json_text(
    value: object,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """``value`` in one line, or indented; ``default`` makes something of what JSON has no kind for."""
    options: dict[str, Any] = {"indent": indent, "ensure_ascii": ensure_ascii, "default": default, "allow_nan": False}
    try:
        return json.dumps(value, **options)
    except ValueError:  # rare enough to look at everything a second time
        return json.dumps(_finite(value), **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
