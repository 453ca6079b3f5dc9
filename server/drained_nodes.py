"""The nodes that get no new work, as the processes and the job store know them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layerwise.errors import NotFoundError
from layerwise.server.departures import Departure, departures
from layerwise.server.membership import Membership, Process, node_of
from layerwise.server.memory_store import JobStore
from layerwise.server.node_document import node_document
from layerwise.server.run import Run


class DrainedNodes:
    """What is drained among ``members``; ``store`` remembers it. Not thread-safe."""

    def __init__(self, members: Membership, store: JobStore) -> None:
        self._members = members
        self._store = store
        members.drained.update(store.drained())

    def leaving(self, node: str) -> list[Process]:
        """The processes that have to leave their jobs if ``node`` is drained; ``NotFoundError`` when there is no such node."""
        leaving = self._members.of_node(node)
        if not leaving:
            known = ", ".join(sorted({node_of(one.hello) for one in self._members})) or "none"
            raise NotFoundError(f"no process is of node {node!r}; the nodes are: {known}")
        return leaving

    def drain(self, node: str, leaving: Sequence[Process], runs: Iterable[Run]) -> list[Departure]:
        """Give the processes of ``node`` no new work; gives what has to move so that those that are ``leaving`` can.

        Raises:
            NotAllowedError: too few other processes are free; nothing was changed.
        """
        found = departures(node, leaving, runs, self._members)
        self._members.drain(node)
        self._store.put_drained(frozenset(self._members.drained))
        return found

    def undrain(self, node: str) -> frozenset[str]:
        """Give the processes of ``node`` work again; gives all that need not leave now.

        Raises:
            NotFoundError: it was not drained.
        """
        if node not in self._members.drained:
            known = ", ".join(sorted(self._members.drained)) or "none"
            raise NotFoundError(f"{node!r} is not drained; drained are: {known}")
        self._members.undrain(node)
        self._store.put_drained(frozenset(self._members.drained))
        return frozenset(one.name for one in self._members if not one.draining)

    def document(self, node: str, now: float) -> dict[str, Any]:
        """What is left on a node: what ``drain`` shows."""
        processes = [node_document(one, now) for one in self._members.of_node(node)]
        return {
            "node": node,
            "drained": node in self._members.drained,
            "jobs": sorted({one["job"] for one in processes if one["job"] is not None}),
            "processes": processes,
        }
