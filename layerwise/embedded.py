"""A job on a cluster of its own that lives as long as the job: what ``layerwise train`` and `layerwise.train` do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerwise.client import FINAL_STATES, CoordinatorClient
from layerwise.cluster import LocalCluster
from layerwise.earlier_run import EarlierRun
from layerwise.errors import BusyError, JobFailedError, RetryableError, sentence
from layerwise.follow import JobFollower
from layerwise.imports import check_allowed
from layerwise.job import JobSpec
from layerwise.own_words import OwnWords, resume_command
from layerwise.progress import ProgressView
from layerwise.run_directory import DirectoryLock, save_result, save_spec
from layerwise.supervision import HANG_SECONDS

REFRESH_SECONDS = 0.5
SPARE_AFTER_SECONDS = 10.0
"""After the first update: a job that is over by then would only pay for a spare process."""


class EmbeddedRun:
    """Starts a cluster as large as the job wants, has it train the job (or go on with it), and ends the cluster.

    ``directory`` is the job's: cuts, event logs, and here the coordinator's state and the processes' logs too, so
    that the run can be resumed after everything has ended. With ``overwrite`` the run that lies there goes with the
    first update of this one; if that does not come about it stays. Of a ``temporary`` one nobody is told how to resume
    it. `run` is called once; `interrupt` belongs into a signal handler of the same thread.
    """

    def __init__(
        self,
        spec: JobSpec,
        directory: Path,
        view: ProgressView,
        *,
        resume: bool = False,
        overwrite: bool = False,
        temporary: bool = False,
        allow_imports: Sequence[str] = (),
        threads: int | None = None,
        devices: Sequence[str] = (),
        metrics: str | None = None,
        spare: bool = True,
        hang_seconds: float | None = HANG_SECONDS,
    ) -> None:
        checkpoint = spec.checkpoint.model_copy(update={"path": str(directory)})
        self.spec = spec.model_copy(update={"checkpoint": checkpoint})
        self.directory = directory
        self.interrupts = 0
        self.document: dict[str, Any] | None = None
        """What is known of the job when `run` has raised after it started something."""
        self.how_to_resume = "" if temporary else resume_command(directory, allow_imports, devices, threads)
        """The command that goes on with this run; empty for one that is gone afterwards."""
        self._view = view
        self._resume = resume
        self._overwrite = overwrite
        self._earlier: EarlierRun | None = None
        """What waits to be deleted or put back."""
        self._gave_way = False
        self._allow_imports = tuple(allow_imports)
        self._follower: JobFollower | None = None
        self._words: OwnWords
        self._job = ""
        self._over = False
        self._has_to_stop = False
        """It was interrupted, and the coordinator has not heard of it yet."""
        self._spare = spare
        self._first_update: float | None = None
        self._cluster = LocalCluster(
            shards=spec.cluster.shards,
            forward=spec.cluster.forward,
            backward=spec.cluster.num_detached,
            directory=directory,
            allow_imports=allow_imports,
            threads=threads,
            devices=devices or (spec.cluster.device,),
            metrics=metrics,
            restart=True,
            hang_seconds=hang_seconds,
            on_problem=self._on_problem,
        )

    def run(self) -> dict[str, Any]:
        """Return the job's document at its end: done, failed or cancelled.

        Raises:
            NotAllowedError: the job imports code that ``allow_imports`` does not cover, or what is to be overwritten is no
                run of ours; nothing was started.
            LayerwiseError: a process of the cluster can't be started, or the job is refused.
            KeyboardInterrupt: interrupted twice, or before the job was submitted.
        """
        for target in self.spec.imports:
            check_allowed(target, self._allow_imports)
        if self._overwrite:
            earlier = EarlierRun(self.directory)
            self._earlier = earlier if earlier.set_aside() else None
        try:
            return self._run()
        except BaseException as error:
            self._over = True
            self._on_error(error)
            raise
        finally:
            self._over = True

    def _run(self) -> dict[str, Any]:
        if not self._resume:
            save_spec(self.directory, self.spec)
        self._view.note(self._starting())
        with self._cluster as cluster, cluster.client() as client:
            cluster.wait_for_nodes(self.spec.timeouts.start)
            self._job, offset = self._begin(client)
            save_result(self.directory, None)
            how_to_resume = self.how_to_resume if self._earlier is None else ""
            self._words = OwnWords(self._view, self._job, how_to_resume, self._on_document)
            self._follower = JobFollower(client, self._job, self._words, offset=offset, refresh_seconds=REFRESH_SECONDS)
            document = self._words.reword(self._follower.run())
            self._over = True
            save_result(self.directory, document)
        if document["state"] == "done":
            self._delete_earlier()
        self._put_earlier_back()
        return document

    def _delete_earlier(self) -> None:
        """This run has begun, and is the one to go on with."""
        if self._earlier is not None:
            self._earlier.delete()
            self._earlier = None
            self._words.how_to_resume = self.how_to_resume

    def _put_earlier_back(self) -> bool:
        """Where there is an earlier run still, this one has not begun and is over: the earlier one takes its place again."""
        if self._earlier is None:
            return False
        where = self._earlier.put_back()
        self._earlier, self._gave_way = None, bool(where)
        if where:
            self._view.say(where)
        return self._gave_way

    def _on_error(self, error: BaseException) -> None:
        """Keep what is known; where nothing was trained, what is left must not stand in the way of the next run."""
        last = self._follower.document if self._follower is not None else None
        if last is not None:
            self.document = self._words.reword(last)
        else:
            self.document = {"job": self._job or self.spec.name, "directory": str(self.directory)}
        if isinstance(error, Exception):
            self.document |= {"state": "failed", "message": sentence(error)}
        elif last is None:
            self.document |= {"state": "failed", "message": "interrupted before it began"}
        if not self._put_earlier_back() and not self._job and not self._resume:
            self._save_failure(self.document)

    def _save_failure(self, document: dict[str, Any]) -> None:
        try:
            lock = DirectoryLock(self.directory)
        except (BusyError, OSError):
            return  # another run's directory, or none: the error that led here says so
        try:
            save_result(self.directory, document)
        except OSError:
            return  # likewise
        finally:
            lock.close()

    def interrupt(self) -> None:
        """Once: stop at the next update, with a cut there. Again: end everything at once. While that happens: nothing.

        Raises:
            KeyboardInterrupt: there is nothing to stop gently.
        """
        if self._over:
            return
        self.interrupts += 1
        if self._follower is None or self.interrupts > 1:
            self._over = True
            self._cluster.stop_seconds = 0.0 if self._follower is not None else self._cluster.stop_seconds
            raise KeyboardInterrupt
        self._follower.interrupt(self._stop)

    @property
    def resumable(self) -> bool:
        """Whether there is something to go on with."""
        return self._resume or (bool(self._job) and not self._gave_way)

    def _starting(self) -> str:
        counts = {
            "shard": self.spec.cluster.shards,
            "forward worker": self.spec.cluster.forward,
            "backward worker": self.spec.cluster.num_detached,
        }
        parts = [f"{count} {role}{'s' if count > 1 else ''}" for role, count in counts.items() if count]
        return f"starting a coordinator, {', '.join(parts)}"

    def _begin(self, client: CoordinatorClient) -> tuple[str, int]:
        """Submit the job or resume it; gives its id, and how many events it logged in earlier runs."""
        if not self._resume:
            return str(client.submit(self.spec.to_json())["job"]), 0
        known = [one for one in client.list_jobs() if one.get("directory") == str(self.directory)]
        if known:
            job, offset = str(known[-1]["job"]), int(known[-1]["num_events"])
            document = client.resume(job=job, shards=self.spec.cluster.shards)
        else:
            offset = 0
            document = client.resume(directory=str(self.directory), shards=self.spec.cluster.shards)
        # The next resume takes as many shards, whatever was said this time.
        save_spec(self.directory, self.spec)
        return str(document["job"]), offset

    def _stop(self) -> None:
        self._view.say("stopping at the next update; interrupt again to end at once")
        self._has_to_stop = True
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        """Cancel the job; a coordinator that is away just now is asked again when it answers."""
        try:
            with self._cluster.client() as client:
                client.cancel(self._job)
        except RetryableError:
            return
        self._has_to_stop = False

    def _on_document(self, document: dict[str, Any]) -> None:
        """The job is this far: with its first update an earlier run goes; from some time after it on, keep a spare process."""
        if self._has_to_stop and document.get("state") not in FINAL_STATES:
            self._ask_to_stop()
        if document.get("steps"):
            self._delete_earlier()
        if self._first_update is None:
            self._first_update = time.monotonic() if document.get("steps") else None
        elif self._spare and time.monotonic() - self._first_update >= SPARE_AFTER_SECONDS:
            self._spare = False
            self._cluster.keep_spare()

    def _on_problem(self, problem: str, for_good: bool) -> None:
        """From a thread of the cluster: a process ended by itself."""
        follower = self._follower
        if follower is None:
            return  # entering the cluster raises it

        def tell() -> None:
            if for_good:
                resumable = self.how_to_resume and self._earlier is None
                raise JobFailedError(problem + (f"; go on with `{self.how_to_resume}`" if resumable else ""))
            self._view.say(f"warning: {problem}")

        follower.interrupt(tell)
