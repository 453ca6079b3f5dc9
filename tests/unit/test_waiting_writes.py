from __future__ import annotations

import sqlite3
from functools import partial

from layerwise.server.waiting_writes import WaitingWrites, Write


def writing(text: str, into: list[str]) -> Write:
    def write(text: str, connection: sqlite3.Connection) -> None:
        into.append(text)

    return partial(write, text)


def written(waiting: WaitingWrites, into: list[str]) -> list[str]:
    """What the next transaction writes."""
    connection = sqlite3.connect(":memory:")
    for write in waiting.take().writes:
        write(connection)
    connection.close()
    return into


def test_of_a_record_only_the_newest_waits_and_lines_of_logs_stay_in_order() -> None:
    waiting, said = WaitingWrites(10), list[str]()
    for text, key in (("record 1", "job"), ("line 1", ""), ("record 2", "job"), ("line 2", ""), ("other", "other")):
        assert waiting.put(writing(text, said), key=key)
    assert written(waiting, said) == ["record 2", "line 1", "line 2", "other"]


def test_a_record_of_another_kind_does_not_take_the_place_of_one_that_waits() -> None:
    waiting, said = WaitingWrites(10), list[str]()
    for text, variant in (("1", "a"), ("2", "a"), ("3", "b"), ("4", "a"), ("5", "a")):
        waiting.put(writing(text, said), key="job", variant=variant)
    assert written(waiting, said) == ["2", "3", "5"]


def test_what_waits_is_bounded_and_nobody_who_writes_waits() -> None:
    waiting, said = WaitingWrites(3), list[str]()
    taken = [waiting.put(writing(f"line {number}", said)) for number in range(5)]
    assert taken == [True, True, True, False, False]
    assert [waiting.put(writing(f"record {number}", said), key="job") for number in range(5)] == [True] * 5
    assert (len(waiting), waiting.num_dropped) == (4, 2)
    assert written(waiting, said) == ["line 0", "line 1", "line 2", "record 4"]
    assert waiting.put(writing("line 5", said))


def test_a_batch_says_who_is_to_hear_of_it_and_whether_it_is_the_last() -> None:
    waiting, heard = WaitingWrites(3), list[str]()
    waiting.tell(lambda: heard.append("first"))
    batch = waiting.take()
    for hear in batch.heard_by:
        hear()
    assert (heard, batch.last, batch.writes) == (["first"], False, ())
    waiting.close()
    assert waiting.take().last
