"""The comings and goings of one run's processes, and what follows from each of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from layerwise.messages import Dismissal, DismissalReason, Hosting, Ready, Role, Unassign
from layerwise.roles import Effect, Send
from layerwise.server.assembly import Assembly
from layerwise.server.crew import Crew
from layerwise.server.ending import Ending
from layerwise.server.membership import Process
from layerwise.server.recovery import FailuresInARow
from layerwise.server.run_account import RunAccount
from layerwise.server.settlement import Settlement
from layerwise.server.training_start import TrainingStart


class Attendance:
    """Fills the run's places and empties them. Not thread-safe."""

    def __init__(
        self,
        account: RunAccount,
        crew: Crew,
        ending: Ending,
        assembly: Assembly,
        start: TrainingStart,
        settlement: Settlement,
    ) -> None:
        self._account = account
        self._crew = crew
        self._ending = ending
        self._assembly = assembly
        self._start = start
        self._settlement = settlement
        self._lost_early: defaultdict[int, FailuresInARow] = defaultdict(FailuresInARow)

    # Coming ----------------------------------------------------------------------------------------------------------

    def join(self, process: Process, role: Role, block: int) -> list[Effect]:
        """A free process takes the place of a lost one."""
        account, crew, name = self._account, self._crew, process.name
        if role is Role.SHARD:
            crew.shards.fill(block, process)
            account.note("info", f"shard {name} takes the place of block {block}", shard=name)
            return self._assembly.proceed()
        crew.workers.fill(name, role, block)
        self._place()
        account.note("info", f"{role} worker {name} takes a free place", worker=name)
        return self._inform(name, block)

    def admit(self, process: Process) -> list[Effect]:
        """A free worker takes part beyond the places that the job needs."""
        account, name = self._account, process.name
        block = self._crew.workers.join(name, process.role)
        self._place()
        where = f" for block {block}" if block >= 0 else ""
        ordered = account.prepared is not None and account.prepared.settings.plain
        useless = "; microbatches of this job go in position order, which it does not make faster" if ordered else ""
        account.note("info", f"{process.role} worker {name} joins{where}{useless}", worker=name)
        return self._inform(name, block)

    def take_back(self, process: Process, hosting: Hosting) -> list[Effect] | None:
        """A process that still works for the job presents itself again; None: its place is not there any more."""
        if process.role is Role.SHARD:
            return self._take_back_shard(process, hosting)
        account, crew, name = self._account, self._crew, process.name
        oldest = crew.shards.oldest_life
        has_room = crew.workers.has_room(process.role, hosting.block, joins=process.joins)
        if not has_room or not oldest or hosting.generation < oldest:
            # What it knows may be of an earlier run of the job, on other shards: it is to be told everything anew.
            return None
        (crew.workers.join if process.joins else crew.workers.fill)(name, process.role, hosting.block)
        crew.routing.knows(name)
        self._place()
        account.note("info", f"{process.role} worker {name} is back", worker=name)
        self._assembly.expect_no_more(name)
        generation = crew.routing.generation
        if not generation:
            return self._assembly.proceed_together()
        if hosting.generation != generation:
            return self._inform(name, hosting.block)
        crew.routing.take_ready(name, Ready(job=account.job, block=hosting.block, generation=generation), stop=0)
        return self._start.if_ready()

    def _take_back_shard(self, process: Process, hosting: Hosting) -> list[Effect] | None:
        shards, name = self._crew.shards, process.name
        place = shards[hosting.block] if 0 <= hosting.block < len(shards) else None
        if place is None or place.empty_since is None or place.life != hosting.life or not place.life:
            return None
        shards.fill(place.block, process, holds=True)
        self._crew.routing.knows(name)
        self._account.note("info", f"shard {name} is back, with block {place.block}", shard=name)
        return self._assembly.proceed_together()

    def go_without(self, name: str) -> list[Effect]:
        """A worker that was expected is here, and does not work for the job any more."""
        self._assembly.expect_no_more(name)
        return self._assembly.proceed_together()

    # Going -----------------------------------------------------------------------------------------------------------

    def lose(self, name: str, why: str) -> list[Effect]:
        """A process of the run is gone."""
        if self._account.over:
            return []
        self._crew.routing.forget(name)
        self._crew.standby.lose(name)
        return self._lose_shard(name, why) if name in self._crew.shards else self._lose_worker(name, why)

    def part(self, name: str, why: str) -> list[Effect]:
        """Send a worker away that joined; it may join another job, or this one again."""
        effects = self.lose(name, why)
        self._crew.dismiss([name])
        return [*effects, Send(name, Unassign(job=self._account.job))]

    def turn_away(self, name: str, why: str) -> list[Effect]:
        """A worker that joined can't do its work. No job ends by that: those that it needs will find what is wrong with itself."""
        effects = self.lose(name, why)
        self._crew.dismiss([name])
        message = f"{name} can't take part in job {self._account.job}: {why}"
        return [*effects, Send(name, Dismissal(reason=DismissalReason.NOT_ALLOWED, message=message))]

    def _lose_worker(self, name: str, why: str) -> list[Effect]:
        account, crew = self._account, self._crew
        joined = name in crew.workers.joined
        place = crew.remove_worker(name)
        self._place()
        if joined:
            account.note("info", f"{place.role} worker {name}, which had joined, left ({why})", worker=name)
        else:
            account.note("warning", f"{place.role} worker {name} was lost ({why})", worker=name)
        if account.training is None:
            return []
        effects = account.training.lose_worker(name, account.now) if place.role is Role.FORWARD else []
        return effects + self._settlement.settle()

    def _lose_shard(self, name: str, why: str) -> list[Effect]:
        account, training = self._account, self._account.training
        place = self._crew.shards.vacate(name, why, account.now)
        account.note("warning", f"shard {name} (block {place.block}) was lost ({why})", shard=name)
        self._assembly.forget_probe(name)
        if training is None:
            return self._give_up_early(place.block, name, why)
        reached = [layer.version for layer in training.layers_of(place.block)]
        account.recovery.lose(place.block, name, max(reached, default=training.restored), account.now)
        training.suspended = True
        return []

    def _give_up_early(self, block: int, name: str, why: str) -> list[Effect]:
        """Whatever it is that ends shards of ``block`` before training begins, it need not end with the next one."""
        losses = self._lost_early[block]
        losses.again(self._account.now)
        if not losses.goes_on:
            return []
        times = f"block {block} lost its shard {losses.times} times before training began"
        return self._ending.fail(f"{times}, the last time {name} ({why})")

    # Both ------------------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        self._account.record = replace(self._account.record, placement=self._crew.placement)

    def _inform(self, name: str, block: int) -> list[Effect]:
        """Tell a worker of the route, if there is one."""
        routing = self._crew.routing
        return [routing.inform(name, block, self._account.record)] if routing.generation else []
