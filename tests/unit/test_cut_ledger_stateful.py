"""The ledger of cuts against plain dictionaries."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerwise.messages import LayerFile
from layerwise.server.cut_ledger import CutLedger

VERSIONS = st.integers(1, 6)
NUM_BLOCKS = 3
BLOCKS = st.integers(-1, NUM_BLOCKS)


def files(block: int, version: int) -> tuple[LayerFile, ...]:
    return (LayerFile(layer=block, life=1, name=f"{version}-{block}", num_bytes=1, digest="d"),)


class CutLedgerMachine(RuleBasedStateMachine):
    """Copies, saves, commits and failures in any order, repeated ones and ones for unknown blocks among them."""

    @initialize(keep=st.integers(1, 3), durable=st.lists(VERSIONS, unique=True, max_size=2))
    def begin(self, keep: int, durable: list[int]) -> None:
        self.keep = keep
        self.ledger = CutLedger(NUM_BLOCKS, keep=keep, durable=tuple(durable))
        self.taken: dict[int, set[int]] = {}
        self.saved: dict[int, set[int]] = {}
        self.durable = sorted(durable)
        self.given_up: dict[int, str] = {}
        self.committing: int | None = None
        self.written = set(durable)

    def settled(self, version: int) -> bool:
        return version <= max(self.durable, default=-1) or version in self.given_up

    @rule(block=BLOCKS, version=VERSIONS)
    def take(self, block: int, version: int) -> None:
        known = self.taken.setdefault(version, set())
        news = 0 <= block < NUM_BLOCKS and block not in known
        if news:
            known.add(block)
        assert self.ledger.take(block, version) == (news and len(known) == NUM_BLOCKS)

    @rule(block=BLOCKS, version=VERSIONS)
    def save(self, block: int, version: int) -> None:
        if 0 <= block < NUM_BLOCKS and not self.settled(version):
            self.saved.setdefault(version, set()).add(block)
        self.ledger.save(block, version, files(block, version))

    @rule(version=VERSIONS)
    def give_up(self, version: int) -> None:
        news = not self.settled(version)
        if self.committing == version:
            self.committing = None
        assert self.ledger.give_up(version, f"reason {version}") is news
        if news:
            self.given_up[version] = f"reason {version}"
            self.saved.pop(version, None)
            self.taken.pop(version, None)

    @rule(until=st.none() | VERSIONS)
    def ask_for_a_commit(self, until: int | None) -> None:
        ready = [version for version, blocks in self.saved.items() if len(blocks) == NUM_BLOCKS]
        ready = sorted(version for version in ready if not self.settled(version))
        commit = self.ledger.next_commit(until)
        if self.committing is not None or not ready or (until is not None and ready[0] > until):
            assert commit is None
            return
        assert commit is not None
        version, parts, keep = commit
        assert version == ready[0]
        assert parts == tuple(part for block in range(NUM_BLOCKS) for part in files(block, version))
        assert set(keep) == {*sorted({*self.durable, version})[-self.keep :], *self.durable[-1:]}
        self.committing = version

    @rule(version=VERSIONS, own=st.booleans())
    def commit(self, version: int, own: bool) -> None:
        if own and self.committing is not None:
            version = self.committing
        news = self.committing == version
        if news:
            self.committing = None
        assert self.ledger.commit(version) is news
        if news:
            self.durable = sorted({*self.durable, version})[-self.keep :]
            self.written.add(version)
            self.saved.pop(version, None)
            self.taken.pop(version, None)

    @invariant()
    def it_says_what_the_model_says(self) -> None:
        assert self.ledger.durable == tuple(self.durable)
        for version in range(8):
            assert self.ledger.is_durable(version) == (version in self.durable)
            assert self.ledger.given_up(version) == self.given_up.get(version)
        assert set(self.durable) <= self.written
        pending = {version for version in (*self.taken, *self.saved) if not self.settled(version)}
        unsaved = {version for version in pending if len(self.saved.get(version, ())) < NUM_BLOCKS}
        assert self.ledger.saving == bool(unsaved or self.committing is not None)


TestCutLedger = CutLedgerMachine.TestCase
TestCutLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
