"""What goes wrong in one run, as its processes tell, and how it goes on: failures, divergence, broken links."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layerwise.messages import Failure, LinkDown
from layerwise.roles import Effect
from layerwise.server.assembly import Assembly
from layerwise.server.attendance import Attendance
from layerwise.server.crew import Crew
from layerwise.server.divergence_policy import DivergencePolicy
from layerwise.server.ending import Ending
from layerwise.server.recovery import FailuresInARow
from layerwise.server.run_account import RunAccount

LINK_SECONDS = 1.0
"""How long after a broken link between two shards it is waited for one of them to be found lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenLink:
    """A link between two shards that broke in ``generation`` of the route, at ``time`` (unix seconds)."""

    generation: int
    between: str
    time: float


class Setbacks:
    """Answers what processes say of what they can't do. Not thread-safe."""

    def __init__(
        self,
        account: RunAccount,
        crew: Crew,
        ending: Ending,
        assembly: Assembly,
        attendance: Attendance,
        divergence: DivergencePolicy,
    ) -> None:
        self._account = account
        self._crew = crew
        self._ending = ending
        self._assembly = assembly
        self._attendance = attendance
        self._divergence = divergence
        self._broken: BrokenLink | None = None
        self._run_out, self._run_out_at = FailuresInARow(), -1

    def on_failure(self, peer: str, message: Failure) -> list[Effect]:
        """A role can't go on. If that is because a cut is damaged, the cut before it is used; if training is, that may go back."""
        account, crew = self._account, self._crew
        sentence = message.message.rstrip(".")
        if message.memory:
            return self._on_memory(peer, message.message)
        if message.diverged and self._divergence.rolls_back and not account.stopping:
            return self._on_diverged(peer, message)
        if message.standby:
            if peer not in crew.shards or not crew.standby.refuse(crew.shards.of(peer).block, message.standby):
                return []  # known, and another one or a cut has been told of
            account.note("warning", f"{sentence}; going on from what else there is")
            return self._assembly.route_anew()
        if not message.cut:
            return self._ending.fail(crew.workers.introduce(peer) + sentence)
        if message.cut != crew.routing.cut or peer not in crew.shards:
            return []  # the others that found it damaged have been told of another one already
        older = account.keep_cuts(lambda version: version < message.cut)
        if not older:
            return self._ending.fail(f"{sentence}, and there is no cut before it", damaged=True)
        account.note(
            "warning", f"{sentence}; going on from the cut at version {older[-1].version}", version=message.cut
        )
        return self._assembly.route_anew()

    def on_link_down(self, peer: str, message: LinkDown) -> None:
        """A shard has lost its link to another one."""
        if message.generation == self._crew.routing.generation and self._link is None and not self._account.recovering:
            between = f"{peer} and {message.peer}"
            self._broken = BrokenLink(generation=message.generation, between=between, time=self._account.now)

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard."""
        if self._broken is not None:
            self._broken = replace(self._broken, time=min(self._broken.time + seconds, now))

    @property
    def link_is_to_mend(self) -> bool:
        """A link has been down for so long that the shards at both its ends must be alive."""
        link = self._link
        return link is not None and self._account.now - link.time > LINK_SECONDS

    def mend_link(self) -> list[Effect]:
        """Both shards live, so nothing is lost but what was under way: connect them anew."""
        account, link = self._account, self._link
        assert link is not None
        assert account.training is not None
        account.note("warning", f"the link between {link.between} broke; what was under way is begun again")
        account.training.suspended = True
        return self._assembly.route_anew()

    @property
    def _link(self) -> BrokenLink | None:
        """What is known to be broken of the route that is: with each new one all shards connect anew."""
        known = self._broken is not None and self._broken.generation == self._crew.routing.generation
        return self._broken if known else None

    def _on_memory(self, peer: str, sentence: str) -> list[Effect]:
        """A process ran out of memory and ends: it is lost as by any other death, until it is clear that this goes on for ever."""
        if peer not in self._crew.names:
            return []
        version = self._account.version
        if version != self._run_out_at:
            self._run_out, self._run_out_at = FailuresInARow(), version
        self._run_out.again(self._account.now)
        if self._run_out.goes_on:
            return self._ending.fail(
                f"memory ran out {self._run_out.times} times before the next update, the last time in {peer}: {sentence}; "
                f"use a smaller data.batch or async.window, more shards, or machines with more memory"
            )
        self._crew.dismiss([peer])
        return self._attendance.lose(peer, sentence)

    def _on_diverged(self, peer: str, message: Failure) -> list[Effect]:
        """A block of this or an earlier life met a loss that is not finite."""
        account, shards = self._account, self._crew.shards
        if peer not in shards or shards.of(peer).life != message.diverged:
            return []
        why = message.message.partition("; ")[0]
        return self._assembly.on_divergence(self._divergence.judge(account.record, account.reached, why))
