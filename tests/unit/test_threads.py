"""A thread that others wait for does not die unheard; another one may."""

from __future__ import annotations

import asyncio
import threading

import pytest

from layerwise.lifetime import Lifetime
from layerwise.messages import Role
from layerwise.roles import Effect
from layerwise.service import Service, ServiceSettings
from layerwise.threads import DeathWatch, VitalThread

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def die() -> None:
    raise RuntimeError("out of ideas")


@pytest.mark.parametrize(("kind", "heard"), [(VitalThread, ["out of ideas"]), (threading.Thread, [])])
def test_only_the_death_of_a_vital_thread_is_heard(kind: type[threading.Thread], heard: list[str]) -> None:
    before, deaths = threading.excepthook, list[str]()
    with DeathWatch(lambda error: deaths.append(str(error))):
        thread = kind(target=die)
        thread.start()
        thread.join()
    assert deaths == heard
    assert threading.excepthook is before


def test_a_service_ends_with_what_has_killed_a_thread_of_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Handler:
        def __init__(self, service: Service) -> None:
            self.thread = VitalThread(target=die)

        def on_message(self, *_: object) -> list[Effect]:
            return []

        on_lost = on_message

        def on_tick(self, now: float) -> list[Effect]:
            if self.thread.ident is None:
                self.thread.start()
            return []

        def hosting(self) -> tuple[()]:
            return ()

        collect = hosting

        def before_send(self) -> None:
            return

        async def close(self) -> None:
            self.thread.join()

    nobody = f"unix:{tmp_path_factory.mktemp('n')}/nobody"
    service = Service(ServiceSettings(role=Role.FORWARD, coordinator=nobody), Handler)
    with pytest.raises(RuntimeError, match="out of ideas"):
        asyncio.run(service.run())
    assert isinstance(service._lifetime, Lifetime)
    assert service._lifetime.reason == "RuntimeError: out of ideas"
