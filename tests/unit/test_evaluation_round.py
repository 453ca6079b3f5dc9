from __future__ import annotations

import pytest

from layerwise.ids import Microbatch
from layerwise.messages import Evaluated, Metric
from layerwise.server.evaluation_round import EvaluationRound


def round_of(num_samples: int) -> EvaluationRound:
    return EvaluationRound(5, num_samples=num_samples, range_samples=4, now=1.0)


def answer(where: Microbatch, loss: float, *, version: int = 5) -> Evaluated:
    count = float(where.num_samples)
    return Evaluated(
        job="toy-1",
        version=version,
        start=where.start,
        stop=where.stop,
        life=1,
        loss=Metric(name="loss", total=loss * count, count=count),
        metrics=(Metric(name="accuracy", total=count / 2, count=count),),
    )


def test_the_result_is_the_mean_over_samples_whoever_answers_first() -> None:
    evaluation = round_of(10)
    ranges = evaluation.lease("a", 9)
    assert ranges == (Microbatch(0, 0, 4), Microbatch(0, 4, 8), Microbatch(0, 8, 10))
    for where, loss in reversed(list(zip(ranges, (1.0, 2.0, 6.0), strict=True))):
        assert not evaluation.complete
        assert evaluation.answer(answer(where, loss), 2.0)
    assert evaluation.complete
    assert evaluation.result() == {"loss": pytest.approx(2.4), "accuracy": 0.5}


def test_repeats_and_answers_for_other_cuts_or_ranges_do_not_count() -> None:
    evaluation = round_of(4)
    [where] = evaluation.lease("a", 1)
    assert not evaluation.answer(answer(where, 1.0, version=4), 2.0)
    assert not evaluation.answer(answer(Microbatch(0, 0, 3), 1.0), 2.0)
    assert evaluation.answer(answer(where, 1.0), 2.0)
    assert not evaluation.answer(answer(where, 9.0), 3.0)
    assert evaluation.result()["loss"] == 1.0


def test_a_lost_worker_s_ranges_go_to_others_and_a_late_answer_of_it_still_counts_once() -> None:
    evaluation = round_of(8)
    first, second = evaluation.lease("a", 2)
    evaluation.lose("a")
    assert evaluation.lease("b", 1) == (first,)
    assert evaluation.answer(answer(second, 1.0), 2.0)
    assert evaluation.lease("b", 5) == ()
    assert evaluation.answer(answer(first, 1.0), 2.0)
    assert evaluation.complete


def test_a_range_that_is_given_back_is_leased_again() -> None:
    evaluation = round_of(4)
    [where] = evaluation.lease("a", 1)
    assert not evaluation.give_back("b", where)
    assert evaluation.give_back("a", where)
    assert evaluation.lease("b", 1) == (where,)
