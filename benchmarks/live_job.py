"""A job on a cluster of its own, looked at between two moments of its run, so that neither start nor end counts."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.client import CoordinatorClient
from layerwise.cluster import LocalCluster
from layerwise.overrides import read_job

POLL_SECONDS = 1.0
"""Seldom: the coordinator's answers are work, too, on the same cores."""


def python_path(folder: Path) -> str:
    """``PYTHONPATH`` with ``folder`` first, for a ``sitecustomize`` in it."""
    return os.pathsep.join([str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


class LiveJob:
    """The job while it runs; its run is in ``directory``."""

    def __init__(self, cluster: LocalCluster, client: CoordinatorClient, job: str, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self._client = client
        self._job = job

    def until(self, step: int) -> dict[str, Any]:
        """Wait for the job's ``step``-th update; its document then."""
        while True:
            document = self._client.get_job(self._job)
            if document["state"] not in ("queued", "preparing", "running"):
                raise SystemExit(f"the job is {document['state']} before update {step}: {document.get('message')}")
            if document.get("steps", 0) >= step:
                return document
            time.sleep(POLL_SECONDS)

    def end(self) -> dict[str, Any]:
        """Wait for the job's end; its document then."""
        while (document := self._client.get_job(self._job))["state"] in ("queued", "preparing", "running"):
            time.sleep(POLL_SECONDS)
        if document["state"] != "done":
            raise SystemExit(f"the job is {document['state']}: {document.get('message')}")
        return document


@contextmanager
def live_job(spec: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> Iterator[LiveJob]:
    """The job of ``spec`` on as many processes as it wants, without a spare one; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        job = read_job(spec, (*overrides, f"checkpoint.path={directory}"))
        with (
            LocalCluster(
                shards=job.cluster.shards,
                forward=job.cluster.forward,
                backward=job.cluster.num_detached,
                environment=environment,
            ) as cluster,
            cluster.client() as client,
        ):
            yield LiveJob(cluster, client, str(client.submit(job.to_json())["job"]), directory)
