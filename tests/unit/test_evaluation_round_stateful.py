"""The leases of an evaluation against a dictionary of who holds which range."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerwise.ids import Microbatch
from layerwise.messages import Evaluated, Metric
from layerwise.server.evaluation_round import EvaluationRound

VERSION = 5
workers = st.sampled_from(["a", "b", "c"])


def answer(where: Microbatch, version: int = VERSION) -> Evaluated:
    count = float(where.num_samples)
    loss = Metric(name="loss", total=float(where.start) * count, count=count)
    return Evaluated(job="toy-1", version=version, start=where.start, stop=where.stop, life=1, loss=loss)


class EvaluationMachine(RuleBasedStateMachine):
    """Workers lease ranges, answer them (twice, perhaps, or after they were thought lost), give them back and are lost."""

    @initialize(num_samples=st.integers(1, 20), size=st.integers(1, 6))
    def begin(self, num_samples: int, size: int) -> None:
        self.round = EvaluationRound(VERSION, num_samples=num_samples, range_samples=size, now=0.0)
        starts = range(0, num_samples, size)
        self.ranges = [Microbatch(0, start, min(start + size, num_samples)) for start in starts]
        self.holder: dict[Microbatch, str] = {}
        self.leased: set[Microbatch] = set()
        self.answered: set[Microbatch] = set()

    @rule(worker=workers, capacity=st.integers(0, 4))
    def lease(self, worker: str, capacity: int) -> None:
        held = sum(holder == worker for holder in self.holder.values())
        free = [one for one in self.ranges if one not in self.holder and one not in self.answered]
        given = self.round.lease(worker, capacity)
        assert len(given) == max(min(capacity - held, len(free)), 0)
        assert set(given) <= set(free)
        self.holder.update(dict.fromkeys(given, worker))
        self.leased.update(given)

    @precondition(lambda self: bool(self.leased))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        where = data.draw(st.sampled_from(sorted(self.leased)))
        assert not self.round.answer(answer(where, VERSION - 1), 1.0)
        assert self.round.answer(answer(where), 1.0) == (where not in self.answered)
        self.answered.add(where)
        self.holder.pop(where, None)

    @precondition(lambda self: bool(self.holder))
    @rule(data=st.data(), worker=workers)
    def give_back(self, data: st.DataObject, worker: str) -> None:
        where = data.draw(st.sampled_from(sorted(self.holder)))
        own = self.holder[where] == worker
        assert self.round.give_back(worker, where) is own
        if own:
            del self.holder[where]

    @rule(worker=workers)
    def lose(self, worker: str) -> None:
        self.round.lose(worker)
        self.holder = {where: holder for where, holder in self.holder.items() if holder != worker}

    @invariant()
    def it_is_complete_when_all_are_answered(self) -> None:
        assert self.round.complete == (len(self.answered) == len(self.ranges))

    def teardown(self) -> None:
        """What is left goes to one more worker, and every range counts once."""
        if not hasattr(self, "round"):
            return
        for worker in ("a", "b", "c"):
            self.round.lose(worker)
        for where in self.round.lease("d", len(self.ranges)):
            assert where not in self.answered
            assert self.round.answer(answer(where), 2.0)
        assert self.round.complete
        total = sum(where.start * where.num_samples for where in self.ranges)
        assert self.round.result() == {"loss": total / self.ranges[-1].stop}


TestEvaluationRound = EvaluationMachine.TestCase
TestEvaluationRound.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
