"""The keys of a job file as its schema has them, in the words of the tables in README.md and docs/job-file.md."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.job import job_schema, parse_job
from layerwise.specification import EXPECTED

KINDS = ("model", "data", "loss", "metrics", "train.optimizer", "train.schedule")
"""Keys whose value is a map with a ``name``, one section of keys for each name."""

TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "null": "`null`",
}
BOUNDS = {"minimum": "≥ {:g}", "exclusiveMinimum": "> {:g}", "maximum": "≤ {:g}", "exclusiveMaximum": "< {:g}"}
LARGEST_SHOWN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a row of a table says before the meaning."""

    type: str
    default: str


def keys_by_section() -> dict[str, dict[str, Key]]:
    """``train`` -> ``seed`` -> its type and default.

    The section of a kind is called ``model: mlp``, the whole file ``job``.
    """
    schema = job_schema()
    found: dict[str, dict[str, Key]] = {"job": _keys(schema, schema)}
    for name, node in schema["properties"].items():
        section = _section(schema, node)
        if section is not None:
            found[name] = _keys(schema, section)
            for inner, value in section["properties"].items():
                deeper = _section(schema, value)
                if deeper is not None:
                    found[f"{name}.{inner}"] = _keys(schema, deeper)
    for path in KINDS:
        node = schema
        for part in path.split("."):
            properties = node["properties"] if "properties" in node else (_section(schema, node) or {})["properties"]
            node = properties[part]
        for choice in _choices(schema, node["anyOf"][0]["items"] if path == "metrics" else node):
            if "properties" in choice:
                name = choice["properties"].get("name", {}).get("const", "import")
                keys = _keys(schema, choice)
                keys.pop("name", None)
                found[f"{path.rpartition('.')[2]}: {name}"] = keys
    smallest = parse_job({"name": "smallest", "model": "mlp", "data": "digits"})
    for section, key, kind in (
        ("job", "loss", getattr(smallest.loss, "name", "")),
        ("train", "optimizer", smallest.train.optimizer.name),
        ("train", "schedule", smallest.train.schedule.name),
    ):
        # The schema has no defaults for these: they are sections, made where none is given.
        found[section][key] = Key(type=found[section][key].type, default=f"`{kind}`")
    return found


def table_rows(document: Path) -> dict[str, dict[str, Key]]:
    """The rows of every table of keys in a Markdown file, by the heading that they stand under.

    A row is ``| `key` | type | default | meaning |``; a heading with a section's name has it in backticks.
    """
    found: dict[str, dict[str, Key]] = {}
    section = ""
    for line in document.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ .*?`([^`]+)`", line):
            section = heading[1]
        elif line.startswith("#"):
            section = ""
        elif row := re.match(r"\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", line):
            keys = found.setdefault(section, {})
            assert row[1] not in keys, f"{row[1]} comes twice under {section}"
            keys[row[1]] = Key(type=row[2], default=row[3])
    return found


def _keys(schema: dict[str, Any], section: dict[str, Any]) -> dict[str, Key]:
    required = section.get("required", ())
    return {
        name: Key(type=_type(schema, node), default="required" if name in required else _default(node))
        for name, node in section["properties"].items()
    }


def _default(node: dict[str, Any]) -> str:
    return f"`{json.dumps(node['default'])}`".replace('"', "") if "default" in node else "-"


def _section(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any] | None:
    """The only section of keys that ``node`` may be, if it is one without kinds."""
    sections = [one for one in _choices(schema, node) if "properties" in one]
    if len(sections) != 1 or "name" in sections[0]["properties"] or "import" in sections[0]["properties"]:
        return None
    return sections[0]


def _choices(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _choices(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    return [one for choice in inner for one in _choices(schema, choice)] if inner else [node]


def _type(schema: dict[str, Any], node: dict[str, Any]) -> str:
    words: dict[str, None] = {}
    for one in _choices(schema, node):
        if EXPECTED in one:
            words[one[EXPECTED]] = None
        elif "const" in one or "enum" in one:
            values = one.get("enum", [one.get("const")])
            words.update(dict.fromkeys(f"`{value}`" for value in values))
        elif "properties" in one:
            names = one["properties"]
            kind = names["name"]["const"] if "name" in names else "import:" if "import" in names else None
            words[f"`{kind}`" if kind else "section"] = None
        elif one.get("type") == "array":
            words[_list(schema, one)] = None
        else:
            bounds = ", ".join(
                form.format(one[key]) for key, form in BOUNDS.items() if key in one and one[key] < LARGEST_SHOWN
            )
            words[" ".join([TYPES[one["type"]], bounds]).strip()] = None
    return " or ".join(words)


def _list(schema: dict[str, Any], node: dict[str, Any]) -> str:
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])}: {_type(schema, node['prefixItems'][0])}"
    return f"list of {_type(schema, node['items'])}"
