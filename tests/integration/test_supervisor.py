"""Real processes that die, hang and lose their parent: the spare takes over, loops are slowed, nothing is left behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from layerwise.child import Program
from layerwise.cluster import LocalCluster
from layerwise.errors import NotFoundError
from layerwise.supervision import Supervision
from layerwise.supervisor import SPARE, Problem, Supervisor
from tests.integration.conftest import start
from tests.integration.jobs import MODELS, check_equal_to_plain_loop, finish, image_data, job

SECONDS = 60.0


class Supervised:
    """A cluster of one process of each role that is kept running, and the sentences about its unexpected ends."""

    def __init__(self, directory: Path) -> None:
        self.problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cluster = start(
            shards=1,
            forward=1,
            backward=1,
            directory=directory,
            restart=True,
            spare=True,
            hang_seconds=2.0,
            on_problem=lambda sentence, for_good: self.problems.put(sentence),
        )


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    made = Supervised(tmp_path_factory.mktemp("supervised"))
    with made.cluster as cluster:
        cluster.wait_for_nodes()
        yield made


@pytest.mark.parametrize("name", ["shard-0", "backward-0", "forward-0"])
def test_the_spare_becomes_the_process_that_was_killed_and_a_new_spare_comes(supervised: Supervised, name: str) -> None:
    cluster = supervised.cluster
    spare = cluster.wait_for_spare()
    before = cluster.kill(name)
    assert cluster.wait_for_restart(name, before) == spare
    cluster.wait_for_nodes()
    assert cluster.wait_for_spare() != spare
    events = [(record.name, record.event, record.pid) for record in cluster.records]
    ended = events.index((name, "ended", before))
    assert (name, "adopted", spare) in events[ended:]
    assert (SPARE, "ready", spare) in events[:ended]


def test_an_adopted_shard_computes_what_any_other_computes(
    supervised: Supervised, tmp_path: Path, images: Path
) -> None:
    """Bit for bit, dropout and batch normalisation included: the warm-up has left no trace in the process."""
    cluster = supervised.cluster
    spare = cluster.wait_for_spare()
    cluster.wait_for_restart("shard-0", cluster.kill("shard-0"))
    cluster.wait_for_nodes()
    values = job(
        tmp_path,
        image_data(images),
        MODELS["mlp"],
        cluster={"shards": 1},
        **{"async": {"window": 1, "accumulation": 1}},
    )
    check_equal_to_plain_loop(finish(cluster, values))
    assert cluster.pids["shard-0"] == spare


def test_an_unexpected_end_is_told_in_one_sentence(supervised: Supervised) -> None:
    cluster = supervised.cluster
    pid = cluster.pids["shard-0"]
    os.kill(pid, signal.SIGKILL)
    sentence = supervised.problems.get(timeout=SECONDS)
    assert sentence.startswith(f"shard-0 (process {pid}) ended with signal SIGKILL")
    assert "started again" in sentence
    assert "\n" not in sentence
    cluster.wait_for_restart("shard-0", pid)
    cluster.wait_for_nodes()


def test_a_process_that_stays_stopped_is_replaced(supervised: Supervised) -> None:
    cluster = supervised.cluster
    pid = cluster.pids["shard-0"]
    cluster.pause("shard-0")
    assert "was stopped (SIGSTOP)" in supervised.problems.get(timeout=SECONDS)
    cluster.wait_for_restart("shard-0", pid)
    cluster.wait_for_nodes()
    assert not psutil.pid_exists(pid)


def test_the_coordinator_comes_back_at_its_address_and_everybody_returns(supervised: Supervised) -> None:
    cluster = supervised.cluster
    address = cluster.coordinator_address
    cluster.wait_for_restart("coordinator", cluster.kill("coordinator"))
    assert cluster.coordinator_address == address
    cluster.wait_for_nodes()


def test_an_unknown_process_can_not_be_killed(supervised: Supervised) -> None:
    with pytest.raises(NotFoundError, match="no running process shard-7"):
        supervised.cluster.kill("shard-7")


def test_a_spare_that_is_stopped_is_of_no_use_and_ends(supervised: Supervised) -> None:
    cluster = supervised.cluster
    spare = cluster.wait_for_spare()
    os.kill(spare, signal.SIGSTOP)
    process = psutil.Process(spare)
    while process.status() != psutil.STATUS_STOPPED:
        pass
    started = cluster.wait_for_restart("shard-0", cluster.kill("shard-0"))
    assert started != spare
    cluster.wait_for_nodes()
    assert cluster.wait_for_spare() not in (spare, started)
    assert not psutil.pid_exists(spare)


def test_a_process_that_the_kernel_killed_for_lack_of_memory_is_told_as_such(
    socket_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's counter is a file here, since a test can't make a machine run out of memory."""
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 7\noom_kill 3\n", encoding="ascii")
    monkeypatch.setattr("layerwise.supervisor.VMSTAT", counters)
    told: queue.SimpleQueue[Problem] = queue.SimpleQueue()
    supervisor = Supervisor(Supervision(), on_problem=told.put, on_line=lambda name, line: None)
    state = ("--state", str(tmp_path / "state"))
    program = Program(name="coordinator", arguments=("coordinator", "--listen", f"unix:{socket_folder}/socket", *state))
    try:
        supervisor.start(program)
        supervisor.send("coordinator", signal.SIGKILL)
        assert "memory" not in told.get(timeout=SECONDS).sentence
        counters.write_text("nr_free_pages 0\noom_kill 4\n", encoding="ascii")
        supervisor.send("coordinator", signal.SIGKILL)
        assert "ended with signal SIGKILL, the kernel's way when memory runs out" in told.get(timeout=SECONDS).sentence
    finally:
        supervisor.stop(0.0)


def test_without_a_parent_nothing_lives_on(tmp_path: Path) -> None:
    """SIGKILL leaves the parent no time to end anybody; the spare, and one that has become a shard, end all the same."""
    code = (
        "import json, sys\n"
        "from layerwise.cluster import LocalCluster\n"
        "with LocalCluster(shards=1, forward=0, directory=sys.argv[1], restart=True, spare=True) as cluster:\n"
        "    cluster.wait_for_nodes()\n"
        "    cluster.wait_for_spare()\n"
        "    cluster.wait_for_restart('shard-0', cluster.kill('shard-0'))\n"
        "    print(json.dumps([*cluster.pids.values(), cluster.wait_for_spare()]), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(pid) for pid in json.loads(parent.stdout.readline())]
        parent.kill()
        parent.wait()
    assert len(children) == 3
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    assert alive == []


def test_a_parent_may_give_a_pipe_in_place_of_a_socket(socket_folder: Path, tmp_path: Path) -> None:
    """Then there are no signs of life, but the end of the parent is noticed all the same."""
    command = [sys.executable, "-m", "layerwise", "coordinator", "--exit-with-parent"]
    command += ["--listen", f"unix:{socket_folder}/socket", "--state", str(tmp_path / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert "the coordinator listens" in process.stderr.readline()
        process.stdin.close()
        assert "the parent process ended" in process.stderr.read()
        assert process.wait(SECONDS) == 0


def test_a_crash_loop_is_slowed_down_and_told_each_time() -> None:
    """A Python that can't find its library ends at once, with status 1."""
    told: queue.SimpleQueue[Problem] = queue.SimpleQueue()
    supervisor = Supervisor(Supervision(), on_problem=told.put, on_line=lambda name, line: None)
    try:
        supervisor.start(Program(name="broken", arguments=("shard",), environment={"PYTHONHOME": "/nowhere"}))
        problems = [told.get(timeout=SECONDS) for _ in range(4)]
    finally:
        supervisor.stop(0.0)
    assert [problem.for_good for problem in problems] == [False] * 4
    consequences = [problem.sentence.rpartition("; ")[2] for problem in problems]
    assert consequences == [
        "it was started again",
        "it is started again in 0.5 s",
        "it is started again in 1.0 s",
        "it is started again in 2.0 s",
    ]
    assert "has ended 4 times in a row" in problems[-1].sentence
    assert "exit status 1: " in problems[-1].sentence, "its last words are told"


def test_a_spare_that_can_not_start_is_given_up_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.supervision.SPARE_DELAY_SECONDS", 0.0)
    told: queue.SimpleQueue[Problem] = queue.SimpleQueue()
    supervisor = Supervisor(
        Supervision(),
        spare_environment={"PYTHONHOME": "/nowhere"},
        spare_log=tmp_path / "spare.log",
        on_problem=told.put,
    )
    try:
        supervisor.keep_spare()
        problem = told.get(timeout=SECONDS)
    finally:
        supervisor.stop(0.0)
    assert (problem.name, problem.for_good) == (SPARE, True)
    assert problem.sentence.startswith("no spare process can be kept, it ends with exit status 1")
    assert "spare.log" in problem.sentence


def test_a_cluster_without_a_spare_starts_none(tmp_path: Path) -> None:
    with LocalCluster(shards=0, forward=0, directory=tmp_path, restart=True) as cluster:
        cluster.wait_for_restart("coordinator", cluster.kill("coordinator"))
        assert cluster.spare_pid is None
        assert SPARE not in {record.name for record in cluster.records}
