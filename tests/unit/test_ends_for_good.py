"""Waiting for a cluster's processes of which some ended for good and were started again. Nothing is started here."""

from __future__ import annotations

from typing import Any, Self

import pytest

from layerwise.cluster import LocalCluster
from layerwise.errors import ConfigError, UnreachableError
from layerwise.supervisor import Problem


class NoNodes:
    """A client, and a supervisor, of a cluster in which nothing has presented itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *how: object) -> None:
        pass

    def list_nodes(self) -> list[dict[str, Any]]:
        return []

    def start(self, program: object) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    made = LocalCluster(directory="/played")
    monkeypatch.setattr(made, "client", NoNodes)
    monkeypatch.setattr(made, "_running", NoNodes)
    monkeypatch.setattr(made, "_program", lambda name: name)
    return made


def end(cluster: LocalCluster, name: str, status: int) -> None:
    cluster._hear(Problem(name=name, sentence=f"{name} ended", status=status, for_good=True))


def test_who_ended_too_is_not_waited_for_when_the_first_one_is_started_again(cluster: LocalCluster) -> None:
    end(cluster, "shard-0", 1)
    end(cluster, "shard-1", 2)
    with pytest.raises(UnreachableError, match="shard-0 ended"):
        cluster.wait_for_nodes(60.0)
    cluster.start("shard-0")
    with pytest.raises(ConfigError, match="shard-1 ended"):
        cluster.wait_for_nodes(60.0)
    end(cluster, "shard-0", 1)
    cluster.start("shard-1")
    with pytest.raises(UnreachableError, match="shard-0 ended"):
        cluster.wait_for_nodes(60.0)


def test_an_end_that_is_taken_back_while_it_is_noticed_is_none(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the wait would fail without a reason to give."""

    def wait(seconds: float) -> bool:
        if cluster.problems == ("shard-0 ended",):
            cluster.start("shard-0")
            cluster._problems.append("")
        else:
            end(cluster, "shard-1", 2)
        return True

    end(cluster, "shard-0", 1)
    monkeypatch.setattr(cluster._gone, "wait", wait)
    with pytest.raises(ConfigError, match="shard-1 ended"):
        cluster.wait_for_nodes(60.0)
