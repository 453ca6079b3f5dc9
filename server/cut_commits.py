"""Cuts that all blocks have saved become durable: the first shard writes their manifests, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from layerwise.messages import CommitCut, CutCommitted, CutDurable, LayerFile
from layerwise.roles import Effect, Send
from layerwise.server.cut_ledger import CutLedger
from layerwise.server.cut_manifest import why_too_large
from layerwise.server.job_record import CutRecord
from layerwise.server.journal import Journal
from layerwise.server.sample_ledger import SampleLedger


class CutCommits:
    """Asks ``shard``, the first of the route, to commit what ``cuts`` says is saved, and keeps ``records`` of what is durable.

    ``manifest`` gives the text of a version's manifest with these files. Not thread-safe.
    """

    def __init__(
        self,
        *,
        job: str,
        shard: str,
        cuts: CutLedger,
        samples: SampleLedger,
        durable: Iterable[CutRecord],
        journal: Journal,
        manifest: Callable[[int, tuple[LayerFile, ...]], str],
    ) -> None:
        self._job, self._shard = job, shard
        self._cuts, self._samples = cuts, samples
        self._journal, self._manifest = journal, manifest
        self._num_bytes: dict[int, int] = {}
        self.records: dict[int, CutRecord] = {cut.version: cut for cut in durable}

    def ask(self) -> list[Effect]:
        """Have the next cut committed, if there is one and no answer is awaited.

        A manifest lists what was dropped: blocks may be saved before the first shard tells what has closed by then.
        """
        commit = self._cuts.next_commit(until=self._samples.plan.update_of(self._samples.num_closed))
        if commit is None:
            return []
        version, files, keep = commit
        manifest = self._manifest(version, files)
        if too_large := why_too_large(manifest, files):
            return self.give_up(version, too_large) + self.ask()
        self._num_bytes[version] = sum(one.num_bytes for one in files)
        message = CommitCut(job=self._job, version=version, files=files, manifest_json=manifest, keep=keep)
        return [Send(self._shard, message)]

    def note(self, message: CutCommitted, now: float) -> list[Effect]:
        """The manifest that was asked for is on disk, or can't be."""
        version = message.version
        if message.error:
            reason = f"{self._shard} could not write its manifest: {message.error}"
            return self.give_up(version, reason) + self.ask()
        self._cuts.commit(version)
        self.records[version] = CutRecord(
            version=version,
            time=now,
            num_bytes=self._num_bytes.pop(version, 0),
            ledger=self._samples.summary(),
        )
        self.records = {version: self.records[version] for version in self._cuts.durable if version in self.records}
        self._journal("info", f"the cut at version {version} is durable", version=version)
        return [Send(self._shard, CutDurable(job=self._job, version=version)), *self.ask()]

    def give_up(self, version: int, reason: str) -> list[Effect]:
        """The cut will not become durable; the one before stands."""
        if not self._cuts.give_up(version, reason):
            return []
        self._journal(
            "warning", f"the cut at version {version} is given up: {reason}; {self.newest()}", version=version
        )
        return [Send(self._shard, CutDurable(job=self._job, version=version))]

    def newest(self) -> str:
        """Which cut there is to go on from, in words."""
        newest = max(self._cuts.durable, default=None)
        return f"the cut at version {newest} stands" if newest is not None else "there is no durable cut yet"
