"""A process that has loaded all that a shard or worker needs and then waits to be told which one it is.

Run as ``python -m layerwise.spare`` by a supervisor, with one end of a socket pair as standard input. It writes `READY`
there, reads one line (see `Task`), and from then on is that service in every respect, except for the command line that
``ps`` shows. It ends when the other end is closed.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Self

from layerwise.garbage import imports_kept
from layerwise.lifetime import READY
from layerwise.process_end import end_process

STANDARD_INPUT = 0
NICENESS = 5
"""Of the thread that loads everything: it takes a quarter of a core that others want, the whole of one that nobody wants."""
LONGEST_LINE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the spare is to become: the arguments of ``layerwise``, the environment, the log's file (none: stay as it is)."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: str | None = None

    def to_line(self) -> bytes:
        """As it travels."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read what `to_line` wrote. Only our own supervisor can write it, so that what it says is not checked."""
        values = json.loads(line)
        return cls(
            name=values["name"],
            arguments=tuple(values["arguments"]),
            environment=values["environment"],
            log=values["log"],
        )


def warm_up() -> None:
    """Import what every shard and worker imports, sooner or later."""
    import torch

    import layerwise.cli.services
    import layerwise.data
    import layerwise.models
    import layerwise.muon
    import layerwise.server.shard
    import layerwise.worker.backward
    import layerwise.worker.forward  # noqa: F401  (this and the others are imported for the time that it takes)

    torch.accelerator.current_accelerator(check_available=True)


def first_pass() -> None:
    """What torch does once, at the first pass and the first update.

    Not on a niced thread: the threads that torch starts here, for good, would inherit the niceness. The state of random
    numbers stays that of a fresh process.
    """
    import torch

    from layerwise.optimizers import build_optimizer
    from layerwise.sections import AdamW, Sgd

    with torch.random.fork_rng(devices=[]):
        layer = torch.nn.Linear(4, 4)
    for settings in (Sgd(name="sgd", lr=0.1), AdamW(name="adamw", lr=0.1)):
        loss = torch.nn.functional.cross_entropy(layer(torch.zeros(2, 4)), torch.zeros(2, dtype=torch.long))
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        optimizer = build_optimizer(settings, layer.named_parameters())
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def wait_for_task() -> Task | None:
    """Warm up, say so, wait; None when the supervisor is gone."""
    ended, ending = os.pipe()
    failures: list[BaseException] = []

    def load() -> None:
        try:
            if sys.platform == "linux":
                # There niceness is a thread's own. A process could not take it back later.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            with imports_kept():
                warm_up()
        except BaseException as error:  # raised again below, on the main thread
            failures.append(error)
        finally:
            os.close(ending)

    loader = threading.Thread(target=load, name="layerwise-warm-up", daemon=True)
    loader.start()
    readable, _, _ = select.select([STANDARD_INPUT, ended], [], [])
    if STANDARD_INPUT in readable:
        return None  # nothing is sent before it is ready
    loader.join()
    os.close(ended)
    if failures:
        raise failures[0]
    first_pass()
    line = b""
    try:
        os.write(STANDARD_INPUT, READY)
        while not line.endswith(b"\n"):
            part = os.read(STANDARD_INPUT, LONGEST_LINE)
            if not part:
                return None
            line += part
    except (BrokenPipeError, ConnectionResetError):
        return None
    return Task.from_line(line)


def become(task: Task) -> int:
    """Be that service until its end; returns its exit status."""
    os.environ.update(task.environment)
    if task.log is not None:
        log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
    if sys.platform == "linux":
        Path("/proc/self/comm").write_text(task.name[:15], encoding="utf-8")  # what top shows
    from layerwise.cli.main import run

    return run(list(task.arguments))


def main() -> NoReturn:
    """Wait, become, end."""
    task = wait_for_task()
    if task is None:
        # Without the interpreter's own end: a thread may be in the middle of importing torch.
        os._exit(0)
    end_process(become(task))


if __name__ == "__main__":
    main()
