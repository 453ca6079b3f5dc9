"""From the text of a job file to plain values, and from pydantic's complaints to sentences that a user can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from layerwise.errors import ConfigError

MAX_TEXT_BYTES = 256 << 10
MAX_VALUES = 20_000
MAX_DEPTH = 50
MAX_MERGED = 100
"""Maps that one map may merge (``<<``): merges of merges multiply."""
MAX_PROBLEMS = 20
"""Problems that one refusal names."""
LONGEST_NUMBER = 100
"""Characters; longer words are text without looking."""
EXPECTED = "x-expected"
"""Key of a JSON Schema that says in words what its pattern allows."""


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its 1.2 core schema: ``2e-2`` is a number, ``on`` and ``2024-01-01`` are strings.

    Repeated keys are refused.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (as in the base class)

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        """Like the base class's; a plain word that is too long for a number is text."""
        if kind is yaml.ScalarNode and implicit[0] and len(value) > LONGEST_NUMBER:
            return "tag:yaml.org,2002:str"
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return tag

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Like the base class's, for a bounded number of merged maps."""
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        count = sum(len(one.value) if isinstance(one, yaml.SequenceNode) else 1 for one in merged)
        if count > MAX_MERGED:
            raise yaml.constructor.ConstructorError(
                None, None, f"it merges {count} maps, at most {MAX_MERGED} are allowed", node.start_mark
            )
        super().flatten_mapping(node)
        if merged:
            # The last one of equal keys counts, so the ones before need not be carried into further merges.
            node.value = list({(key.tag, str(key.value)): (key, value) for key, value in node.value}.values())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Like the base class's, but a key may come only once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} comes twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("merge", r"^(?:<<)$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """The map that a YAML or JSON text holds, made of plain JSON values only.

    Raises:
        ConfigError: not readable, not a map, a repeated key, a value that JSON can't say, or larger than any job file.
    """
    if len(text.encode()) > MAX_TEXT_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_TEXT_BYTES} bytes, so this can't be a job file")
    try:
        value = _json(text) if text.lstrip().startswith("{") else yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}:{where} not readable as YAML: {problem}") from None
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{source}: got {describe(value)}, expected a map with the keys of a job (see layerwise schema)"
        )
    return plain(value, source)


def _json(text: str) -> Any:
    """What a text in braces says. JSON, which is what programs send, is read a hundred times as fast as other YAML."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(found)
        if len(values) < len(found):
            raise ValueError("a key comes twice")
        return values

    def no_json(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=no_json)
    except ValueError:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)


def plain(value: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """A deep copy made of JSON's types; `ConfigError` where there are others or too many (YAML aliases multiply)."""
    left = MAX_VALUES

    def copy(item: object, path: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise ConfigError(
                f"{source}: more than {MAX_VALUES} values or {MAX_DEPTH} levels, so this can't be a job file"
            )
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, Mapping):
            for key in item:
                if not isinstance(key, str):
                    raise ConfigError(
                        f"{source}: {path or 'top level'}: got {describe(key)} as a key, expected a string"
                    )
            return {key: copy(one, f"{path}.{key}" if path else key, depth + 1) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return [copy(one, f"{path}[{position}]", depth + 1) for position, one in enumerate(item)]
        raise ConfigError(
            f"{source}: {path}: got {describe(item)}, expected text, a number, true, false, null, a list or a map"
        )

    result: dict[str, Any] = copy(value, "", 0)
    return result


def describe(value: object) -> str:
    """A value as an error message shows it: short, and recognisable."""
    if value is None or isinstance(value, (bool, int, float, dict, list)):
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = repr(value)
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sentences(error: ValidationError, raw: Mapping[str, Any], root: type[BaseModel]) -> list[str]:
    """One sentence for each problem: the key's path, what was there, what may be there."""
    schema = root.model_json_schema(by_alias=True)
    found: dict[str, None] = {}
    details = error.errors(include_url=False)
    located = [(detail, *_locate(detail, raw)) for detail in details[:MAX_PROBLEMS]]
    for detail, keys, value in located:
        deeper = any(other[: len(keys)] == keys and len(other) > len(keys) for _, other, _ in located)
        if deeper and detail["type"] == "literal_error":
            continue  # a map where a word could stand too: what is wrong inside it says more
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".") or "top level"
        if detail["type"] == "extra_forbidden":
            allowed = _keys(_nodes(schema, raw, keys[:-1]))
            close = get_close_matches(str(keys[-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed here: {', '.join(allowed)}"
            found[f"{_short(path)}: unknown key; {hint}"] = None
        elif detail["type"] == "expected":
            found[f"{path}: got {describe(value)}, expected {detail['msg']}"] = None
        else:
            received = "nothing is given" if detail["type"] == "missing" else f"got {describe(value)}"
            kind = detail["type"].startswith("union_tag") and keys[-1] == "name"
            nodes = _nodes(schema, raw, keys[:-1] if kind else keys)
            found[f"{path}: {received}, expected {_expected(nodes) or detail['msg']}"] = None
    if len(details) > MAX_PROBLEMS:
        found[f"and {len(details) - MAX_PROBLEMS} problems more"] = None
    return list(found)


def _short(path: str) -> str:
    return path if len(path) <= 200 else path[:197] + "..."


Keys: TypeAlias = tuple[int | str, ...]


def _locate(detail: ErrorDetails, raw: Mapping[str, Any]) -> tuple[Keys, object]:
    """The path as the user wrote it (pydantic's also names members of unions) and what stands there."""
    value: Any = raw
    keys: Keys = ()
    for position, part in enumerate(detail["loc"]):
        missing = detail["type"] == "missing" and position == len(detail["loc"]) - 1
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
            keys += (part,)
        elif isinstance(value, Mapping) and (part in value or missing):
            value = value.get(part)
            keys += (part,)
    if detail["type"].startswith("union_tag") and isinstance(value, Mapping):
        value = value.get("name")
        keys += ("name",)
    return keys, value


def _nodes(schema: dict[str, Any], raw: Mapping[str, Any], keys: Keys) -> list[dict[str, Any]]:
    """The parts of the JSON Schema that describe what stands at ``keys``, alternatives side by side."""
    nodes = _choices(schema, [schema])
    value: Any = raw
    for key in keys:
        if isinstance(key, int):
            items = [node["prefixItems"][key] if "prefixItems" in node else node.get("items") for node in nodes]
            nodes = [item for item in items if isinstance(item, dict)]
            value = value[key] if isinstance(value, list) and key < len(value) else None
        else:
            chosen = value.get("name") if isinstance(value, Mapping) and key != "name" else None
            maps = [node["properties"] for node in nodes if key in node.get("properties", {})]
            names = [properties.get("name", {}).get("const") for properties in maps]
            if chosen in names:
                maps = [properties for properties, name in zip(maps, names, strict=True) if name == chosen]
            nodes = [properties[key] for properties in maps]
            value = value.get(key) if isinstance(value, Mapping) else None
        nodes = _choices(schema, nodes)
    chosen = value.get("name") if isinstance(value, Mapping) else None
    fitting = [node for node in nodes if node.get("properties", {}).get("name", {}).get("const") == chosen]
    return fitting if chosen is not None and fitting else nodes


def _choices(schema: dict[str, Any], nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``nodes`` stand for: references followed, alternatives side by side."""
    result: list[dict[str, Any]] = []
    for node in nodes:
        if "$ref" in node:
            result.extend(_choices(schema, [schema["$defs"][node["$ref"].rpartition("/")[2]]]))
        elif "anyOf" in node or "oneOf" in node:
            result.extend(_choices(schema, [*node.get("anyOf", []), *node.get("oneOf", [])]))
        else:
            result.append(node)
    return result


def _keys(nodes: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for node in nodes for key in node.get("properties", {})))


_TYPES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a map",
    "null": "null",
}
_BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minItems": "of at least {}",
    "maxItems": "of at most {}",
}


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _expected(nodes: list[dict[str, Any]]) -> str:
    """What may stand there, in words."""
    words: dict[str, None] = {}
    for node in nodes:
        if EXPECTED in node:
            words[node[EXPECTED]] = None
        elif "const" in node or "enum" in node:
            words.update(dict.fromkeys(describe(value) for value in node.get("enum", [node.get("const")])))
        elif "import" in node.get("properties", {}):
            words["import: package.module:function"] = None
        elif "name" in node.get("properties", {}):
            words[describe(node["properties"]["name"].get("const"))] = None
        elif "type" in node:
            bounds = [form.format(_number(node[key])) for key, form in _BOUNDS.items() if key in node]
            words[" ".join([_TYPES[node["type"]], " and ".join(bounds)]).strip()] = None
    return " or ".join(words)
