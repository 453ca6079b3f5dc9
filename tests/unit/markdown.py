"""What tests read in Markdown files: fenced blocks, commands, links, headings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language, without their fences."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    """Every line behind a ``$`` in the ``console`` blocks, without its comment, in order."""
    lines = [line for block in blocks(document, "console") for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for line in lines]


def layerwise_lines(document: Path) -> list[list[str]]:
    """Every command line of layerwise's in a file: in its blocks, and between backticks where it has arguments."""
    text = document.read_text(encoding="utf-8")
    found = [line for line in commands(document) if line.startswith("layerwise ")]
    found += re.findall(r"`(layerwise [^`\n]+)`", text)
    return [[word for word in shlex.split(line) if word != "&"] for line in found]


def links(document: Path) -> list[str]:
    """The targets of all links that lead to another file or heading of the repository."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]


def anchors(document: Path) -> set[str]:
    """The anchors that a renderer makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(document: Path, heading: str) -> list[list[str]]:
    """The cells of the rows under a heading or a sentence, up to the end of the table."""
    text = document.read_text(encoding="utf-8").partition(heading)[2]
    found = re.search(r"^\|.*?(?=^(?!\|))", text, re.MULTILINE | re.DOTALL)
    assert found, f"no table under {heading!r} in {document.name}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[0].splitlines()[2:]]
