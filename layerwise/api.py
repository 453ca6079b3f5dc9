"""The Python interface: `train` on a cluster of its own, or `connect` to one and `submit <Connection.submit>`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from layerwise.address import UnixAddress, parse_address
from layerwise.client import CoordinatorClient, JobEvent
from layerwise.errors import JobFailedError
from layerwise.follow import JobFollower, Quiet, Silent
from layerwise.job import JobSpec
from layerwise.job_result import JobResult
from layerwise.overrides import read_job


def train(
    job: str | Path | Mapping[str, Any] | JobSpec,
    *,
    overrides: Iterable[str] = (),
    allow_imports: Sequence[str] = (),
    overwrite: bool = False,
    threads: int | None = None,
    check: bool = True,
) -> JobResult:
    """Train a job on processes of this machine, started for it and ended after it; blocks until then.

    Args:
        job: The path of a job file, or its content.
        overrides: Changes to it, such as ``"train.steps=100"``.
        allow_imports: Modules of your own that the job may import; each allows what lies below it too.
        overwrite: Delete the run that lies at ``checkpoint.path`` at this one's first update; otherwise this one gets a number.
        threads: Of each shard's arithmetic; default: the cores divided by the shards.
        check: Raise for a job that fails; else its result says so.

    Raises:
        ConfigError: the job can't be meant.
        NotAllowedError: it imports what is not allowed, or what is to be overwritten is no run of ours.
        JobFailedError: it failed. Its directory, named in the message, holds what was saved.
    """
    from layerwise.embedded import EmbeddedRun
    from layerwise.run_directory import directory_for

    spec = _spec(job, overrides).with_absolute_paths(Path.cwd())
    directory = directory_for(spec.checkpoint_path, overwrite=overwrite)
    run = EmbeddedRun(spec, directory, Quiet(), overwrite=overwrite, allow_imports=allow_imports, threads=threads)
    return _checked(run.run(), check=check)


def connect(address: str) -> Connection:
    """A connection to the coordinator at ``host:port`` or ``unix:/path``. Nothing is sent before the first call.

    Raises:
        ConfigError: that is no address.
    """
    return Connection(address)


class Connection:
    """A coordinator, by its address. Close it, or use it as a context manager. Thread-safe.

    Every call raises `UnreachableError` when nobody answers, and `DeadlineError` when the answer takes too long.
    """

    def __init__(self, address: str) -> None:
        self._same_host = isinstance(parse_address(address), UnixAddress)
        self._client = CoordinatorClient(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where the coordinator is."""
        return self._client.address

    def close(self) -> None:
        """End the connection; jobs go on."""
        self._client.close()

    def submit(self, job: str | Path | Mapping[str, Any] | JobSpec, *, overrides: Iterable[str] = ()) -> Job:
        """Queue a job (arguments as of `train`).

        Through a unix socket, relative paths in it count from the working directory here; otherwise from that of each
        process.

        Raises:
            ConfigError: the job can't be meant.
        """
        spec = _spec(job, overrides)
        if self._same_host:
            spec = spec.with_absolute_paths(Path.cwd())
        return Job(self._client, str(self._client.submit(spec.to_json())["job"]))

    def job(self, job: str) -> Job:
        """A job by its id; `NotFoundError` when there is none."""
        return Job(self._client, str(self._client.get_job(job)["job"]))

    def jobs(self) -> list[JobResult]:
        """All jobs, oldest first."""
        return [JobResult.from_document(document) for document in self._client.list_jobs()]

    def resume(self, job: str = "", *, directory: str | os.PathLike[str] = "", shards: int = 0) -> Job:
        """Queue a failed or cancelled job again, by its id, or by its directory if this coordinator does not know it.

        Its layers are spread over ``shards`` (0: as many as before).

        Raises:
            NotFoundError: there is no such job, or no cut in the directory.
            NotAllowedError: the job is not over, or it is done.
            ConfigError: it can't be split among so many shards.
        """
        document = self._client.resume(job=job, directory=os.fspath(directory), shards=shards)
        return Job(self._client, str(document["job"]))

    def drain(self, node: str, *, undo: bool = False) -> dict[str, Any]:
        """Have every job leave a node, host or process at its next update, and let none come; ``undo``: let them again.

        The answer names the ``jobs`` that move and has the node's ``processes``; `nodes` shows them without a job
        afterwards.

        Raises:
            NotFoundError: there is no such node; with ``undo``, it is not drained.
            NotAllowedError: too few other processes are free; nothing was changed.
        """
        return self._client.drain(node, undo=undo)

    def nodes(self) -> list[dict[str, Any]]:
        """The processes of the cluster."""
        return self._client.list_nodes()


class Job:
    """One job of a coordinator. Lives as long as its `Connection`."""

    def __init__(self, client: CoordinatorClient, job: str) -> None:
        self._client = client
        self.id = job

    def __repr__(self) -> str:
        return f"Job({self.id!r} at {self._client.address!r})"

    def status(self) -> JobResult:
        """The job as it is now."""
        return JobResult.from_document(self._client.get_job(self.id))

    def wait(self, timeout: float | None = None, *, check: bool = True) -> JobResult:
        """Return when the job has ended. A coordinator that is away for less than a minute does not matter.

        Raises:
            DeadlineError: it has not ended after ``timeout`` seconds; it goes on.
            JobFailedError: it failed (not with ``check=False``).
        """
        document = JobFollower(self._client, self.id, Silent(), refresh_seconds=60.0).run(timeout=timeout)
        return _checked(document, check=check)

    def cancel(self) -> JobResult:
        """Have it stop at the next update, with a cut there; `wait` for that."""
        return JobResult.from_document(self._client.cancel(self.id))

    def logs(self, *, follow: bool = False) -> Iterator[JobEvent]:
        """What the job has logged; with ``follow`` also what it will, until it has ended."""
        if follow:
            yield from self._client.follow_events(self.id)
        else:
            yield from self._client.events(self.id)


def _spec(job: str | Path | Mapping[str, Any] | JobSpec, overrides: Iterable[str]) -> JobSpec:
    if isinstance(job, JobSpec):
        job = job.model_dump(mode="json", by_alias=True)
    return read_job(job, overrides)


def _checked(document: dict[str, Any], *, check: bool) -> JobResult:
    result = JobResult.from_document(document)
    if check and result.state == "failed":
        raise JobFailedError(f"job {result.job} failed: {result.message} (directory: {result.directory})")
    return result
