"""What processes hold open: files, and unix sockets that somebody listens on. Read from the system, so that what leaks can't hide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

UNIX_SOCKETS = Path("/proc/net/unix")
_LISTENS = 0x10000


def listening_sockets(folder: Path | str) -> tuple[str, ...]:
    """The paths of unix sockets below ``folder`` that a process of this machine listens on, also if their files are gone."""
    found = []
    for line in UNIX_SOCKETS.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENS and fields[7].startswith(f"{folder}/"):
            found.append(fields[7])
    return tuple(sorted(found))


@dataclass
class OpenFiles:
    """How many files the processes of each role have open, over time; a role's number is that of its process with most."""

    counts: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def sample(self, pids: Mapping[str, int], now: float) -> None:
        """Count them now. A process that ends meanwhile is left out."""
        most: dict[str, int] = {}
        for name, pid in pids.items():
            try:
                number = psutil.Process(pid).num_fds()
            except psutil.Error:
                continue
            role = name.partition("-")[0]
            most[role] = max(number, most.get(role, 0))
        for role, number in most.items():
            self.counts.setdefault(role, []).append((now, number))

    def change(self, role: str, seconds: float) -> tuple[int, int]:
        """The most that the role had open in the first and in the last ``seconds``."""
        found = self.counts[role]
        begin, end = found[0][0] + seconds, found[-1][0] - seconds
        return max(number for at, number in found if at <= begin), max(number for at, number in found if at >= end)
