"""The client calls: what one side encodes the other decodes, and nothing else gets through."""

from __future__ import annotations

import pytest

from layerwise.errors import MalformedMessageError, RejectedError
from layerwise.proto.calls import CALLS, ClientRequest, EventDocument, JobsPage

REQUESTS = {
    "Submit": ClientRequest(spec_json='{"name": "x"}'),
    "ListJobs": ClientRequest(offset=3),
    "GetJob": ClientRequest(job="x-1"),
    "Cancel": ClientRequest(job="x-1"),
    "Resume": ClientRequest(job="", directory="/runs/x", shards=3),
    "Drain": ClientRequest(node="rack-2", undo=True),
    "ListNodes": ClientRequest(),
    "FollowEvents": ClientRequest(job="x-1", offset=7),
}
ANSWERS = {
    "ListJobs": JobsPage(documents=[{"job": "x-1"}], next_offset=7),
    "ListNodes": [],
    "FollowEvents": EventDocument(offset=3, event={"message": "ü"}),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_requests_and_answers_come_out_as_they_went_in(name: str) -> None:
    call = CALLS[name]
    answer = ANSWERS.get(name, {"job": "x-1", "steps": 3})
    assert call.decode_request(call.encode_request(REQUESTS[name])) == REQUESTS[name]
    assert call.decode_reply(call.encode_reply(answer)) == answer


def test_a_caller_of_another_wire_version_is_told_so() -> None:
    call = CALLS["GetJob"]
    request = call.decode_request(call.encode_request(ClientRequest(job="x", wire_version=99)))
    with pytest.raises(RejectedError, match="wire version 99"):
        request.check_version()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_bytes_that_are_no_message_are_refused(name: str) -> None:
    call = CALLS[name]
    for data in (b"\xff\xff\xff", b"\x0a\x05ab"):
        with pytest.raises(MalformedMessageError, match=name):
            call.decode_request(data)
        with pytest.raises(MalformedMessageError, match=name):
            call.decode_reply(data)


def test_an_answer_of_the_wrong_kind_is_refused() -> None:
    jobs, job, event = CALLS["ListJobs"], CALLS["GetJob"], CALLS["FollowEvents"]
    for call, wrong in ((jobs, {"a": 1}), (job, [1])):
        with pytest.raises(MalformedMessageError, match="belongs"):
            call.decode_reply(call.encode_reply(wrong))
    with pytest.raises(MalformedMessageError, match="no event"):
        event.decode_reply(event.encode_reply(EventDocument(offset=0, event=[])))  # type: ignore[arg-type]
    with pytest.raises(MalformedMessageError, match="no JSON"):
        job.decode_reply(job.reply(job_json="{").SerializeToString())
