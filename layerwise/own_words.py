"""How a run on a cluster of its own is gone on with, in a command that works where it is typed."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.client import JobEvent
from layerwise.progress import ProgressView


class OwnWords:
    """Hands a job's news on, with our command where the coordinator says how to resume by the job's id.

    After this cluster only the directory is left; where and while ``how_to_resume`` is empty, not even that.
    """

    def __init__(
        self, view: ProgressView, job: str, how_to_resume: str, on_document: Callable[[dict[str, Any]], None]
    ) -> None:
        self._view = view
        self._on_document = on_document
        self._theirs, self.how_to_resume = f"`layerwise resume {job}`", how_to_resume

    def on_event(self, event: JobEvent) -> None:
        """Hand it on."""
        self._view.on_event(replace(event, message=self._in_ours(event.message)))

    def on_document(self, document: dict[str, Any]) -> None:
        """Hand it on."""
        self._on_document(document)
        self._view.on_document(self.reword(document))

    def reword(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document with our words in its message."""
        return {**document, "message": self._in_ours(str(document.get("message") or ""))}

    def _in_ours(self, message: str) -> str:
        if self.how_to_resume:
            return message.replace(self._theirs, f"`{self.how_to_resume}`")
        # Remedies are the last part of a sentence.
        return re.sub(rf"[;:] [^;:]*{re.escape(self._theirs)}$", "", message)


def resume_command(directory: Path, allow_imports: Sequence[str], devices: Sequence[str], threads: int | None) -> str:
    """As it can be typed here; with the options without which the processes would not be what they were."""
    relative = os.path.relpath(directory)
    path = str(directory) if relative.startswith("..") else relative
    words = ["layerwise", "resume", f"./{path}" if path.startswith("-") else path]
    words += [word for module in allow_imports for word in ("--allow-import", module)]
    words += [word for device in devices for word in ("--device", device)]
    words += ["--threads", str(threads)] if threads is not None else []
    return shlex.join(words)
