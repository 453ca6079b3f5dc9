"""How a service ends by what its coordinator or its memory says, and with which exit status its command does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from layerwise.cli import exit_codes
from layerwise.cli.main import run
from layerwise.errors import LayerwiseError, OutOfMemoryError
from layerwise.ids import COORDINATOR
from layerwise.messages import Dismissal, DismissalReason, Role
from layerwise.roles import End
from layerwise.service import Service, ServiceHandler, ServiceSettings


def service() -> tuple[Service, list[str]]:
    """One that does not run, and the reasons for which it would end."""
    settings = ServiceSettings(role=Role.FORWARD, coordinator="unix:/nowhere", name="guest", join="toy-1")
    made = Service(settings, lambda _: cast(ServiceHandler, SimpleNamespace()))
    reasons: list[str] = []
    made._lifetime = cast(Any, SimpleNamespace(end=reasons.append))
    return made, reasons


@pytest.mark.parametrize(
    ("reason", "status"),
    [(DismissalReason.OVER, 0), (DismissalReason.NOT_FOUND, 4), (DismissalReason.NOT_ALLOWED, 5)],
)
def test_a_dismissed_process_ends_with_the_sentence_and_a_status_of_its_own(
    reason: DismissalReason, status: int
) -> None:
    made, reasons = service()
    made._on_message(COORDINATOR, Dismissal(reason=reason, message="nothing is left to join"))
    assert len(reasons) == 1
    assert "nothing is left to join" in reasons[0]
    error = made._error
    assert (exit_codes.of_error(error) if isinstance(error, LayerwiseError) else 0) == status


def test_only_the_coordinator_dismisses() -> None:
    made, reasons = service()
    made._handler = cast(Any, SimpleNamespace(on_message=lambda peer, message, now: []))
    made._on_message("shard-0", Dismissal(reason=DismissalReason.OVER, message="go"))
    assert reasons == []


def test_memory_that_ran_out_ends_the_process_with_status_7() -> None:
    made, reasons = service()
    made.perform([End("forward pass of 0:0-1 failed: memory ran out (MemoryError)")])
    assert isinstance(made._error, OutOfMemoryError)
    assert exit_codes.of_error(made._error) == 7
    assert "this process ends, so that another one takes over" in reasons[0]


def test_an_error_of_memory_anywhere_in_the_process_counts_as_that() -> None:
    made, _ = service()
    made.fail(MemoryError())
    assert isinstance(made._error, OutOfMemoryError)
    assert str(made._error).startswith("memory ran out: MemoryError; ")


@pytest.mark.parametrize(
    ("words", "join"), [((), None), (("--join",), ""), (("--join", "--insecure"), ""), (("--join", "toy-1"), "toy-1")]
)
@pytest.mark.parametrize("role", ["forward", "backward"])
def test_the_job_of_join_may_be_left_out(
    monkeypatch: pytest.MonkeyPatch, role: str, words: tuple[str, ...], join: str | None
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(f"layerwise.worker.{role}.run_{role}", lambda **options: asked.append(options["join"]))
    monkeypatch.setattr("layerwise.cli.services.start_logging", lambda *_: None)
    assert run([role, "--coordinator", "unix:/nowhere", *words]) == 0
    assert asked == [join]
