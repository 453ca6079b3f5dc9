from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from layerwise.cli import exit_codes
from layerwise.cli.main import COMMANDS, LazyGroup, cli, run
from layerwise.cli.options import coordinator_address, forget_coordinator, record_coordinator
from layerwise.cli.output import format_bytes, format_cell, print_facts, print_table
from layerwise.errors import (
    BusyError,
    ConfigError,
    DeadlineError,
    JobFailedError,
    LayerwiseError,
    NotAllowedError,
    NotFoundError,
    UnreachableError,
)
from layerwise.overrides import read_job
from layerwise.run_directory import save_spec

JOB = "name: tiny\nmodel: mlp\ndata: digits\n"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LAYERWISE_COORDINATOR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == exit_codes.DONE
    shown = capsys.readouterr().out
    assert f"Usage: layerwise {name}" in shown
    assert f"Examples:\n    layerwise {name}" in shown


def test_the_list_of_commands_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == exit_codes.DONE
    shown = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert name in shown
        assert text in shown


def test_every_examples_command_line_is_one_that_parses() -> None:
    assert isinstance(cli, LazyGroup)
    group = click.Context(cli, info_name="layerwise")
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        assert command.epilog is not None
        for line in command.epilog.splitlines()[2:]:
            words = line.strip().partition("|")[0].partition(">")[0].replace(" '", " ").split()
            assert words[:2] == ["layerwise", name]
            command.make_context(name, words[2:], parent=group)


def test_neither_torch_nor_grpc_is_imported_at_the_start() -> None:
    code = (
        "import sys, layerwise, layerwise.cli.main as m; m.run(['train', '--help']); m.run(['coordinator', '--help']);"
        "bad = {'torch', 'grpc', 'rich', 'pydantic'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_checking_a_job_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    code = (
        "import sys, layerwise.cli.main as m, layerwise.embedded, layerwise.api, layerwise.client;"
        "m.run(['submit', 'job.yaml']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path, stderr=subprocess.DEVNULL)


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layerwise", "--version"], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.startswith("layerwise, version ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (UnreachableError("x"), 3),
        (NotFoundError("x"), 4),
        (NotAllowedError("x"), 5),
        (DeadlineError("x"), 124),
        (JobFailedError("x"), 1),
        (BusyError("x"), 1),
        (LayerwiseError("x"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_status(error: LayerwiseError, code: int) -> None:
    assert exit_codes.of_error(error) == code


def test_states_have_exit_statuses() -> None:
    assert [exit_codes.of_state(state) for state in ("done", "failed", "cancelled")] == [0, 1, 6]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["no-such-command"], 2, "no-such-command"),
        (["train"], 2, "SPEC"),
        (["train", "nowhere.yaml"], 2, "no job file at nowhere.yaml"),
        (["train", "job.yaml", "--set", "train.steps=none"], 2, "train.steps"),
        (["train", "job.yaml", "--device", "gpu"], 2, "'gpu' is none of"),
        (["plan", "job.yaml", "--set", "x=1"], 2, "unknown key"),
        (["jobs"], 3, "no cluster of this user runs on this machine"),
        (["jobs", "--coordinator", "unix:/nowhere/socket"], 3, "no coordinator answers at unix:/nowhere/socket"),
        (["submit", "job.yaml", "--coordinator", "nonsense"], 2, "neither host:port"),
        (["healthcheck", "unix:/nowhere/socket"], 3, "nothing healthy answers"),
        (["resume", "./nothing"], 4, "no run in"),
        (["resume", "./nothing", "--timeout", "3"], 2, "--timeout goes with"),
        (["resume", "digits-1", "--device", "cpu"], 2, "--device goes with"),
        (["resume", "digits-1", "--allow-import", "own"], 2, "--allow-import goes with a DIRECTORY"),
        (["resume", "digits-1", "--metrics", "127.0.0.1:0"], 2, "--metrics goes with a DIRECTORY"),
        (["resume", "digits-1", "--no-spare"], 2, "--no-spare goes with a DIRECTORY"),
        (["resume", "digits-1", "--hang-timeout", "15"], 2, "--hang-timeout goes with a DIRECTORY"),
        (["resume", "digits-1", "--timeout", "3"], 2, "--timeout goes with --follow only"),
        (["resume", "digits-1", "--quiet"], 2, "--quiet goes with --follow only"),
        (["submit", "job.yaml", "--timeout", "3"], 2, "--timeout goes with --follow only"),
        (["cancel", "digits-1", "--timeout", "3"], 2, "--timeout goes with --wait only"),
        (["drain", "here", "--undo", "--timeout", "3"], 2, "--timeout goes with a drain without --undo only"),
        (["resume", "./run", "--metrics", "0.0.0.0:0"], 5, "serves on loopback addresses only"),
        (["resume", "./run", "--no-spare", "--hang-timeout", "0", "--metrics", "unix:/m"], 2, "expected host:port"),
        (["evaluate", "./nothing"], 4, "no directory"),
        (["evaluate", "."], 4, "no saved cut"),
        (["evaluate", "job.yaml"], 2, "job.yaml is a file; expected the directory of a run"),
        (["train", "job.yaml", "--metrics", "0.0.0.0:0"], 5, "serves on loopback addresses only"),
        (["train", "job.yaml", "--metrics", "unix:/m"], 2, "expected host:port"),
        (["up", "--listen", "0.0.0.0:0"], 5, "say --insecure"),
        (["up", "--metrics", "0.0.0.0:0"], 5, "say --insecure"),
        (["export", ".", "--cut", "3"], 4, "no saved cut"),
        (["audit", "."], 4, "no event logs"),
    ],
)
def test_what_goes_wrong_is_one_sentence_with_its_exit_status(
    arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    save_spec(tmp_path / "run", read_job(tmp_path / "job.yaml"))
    assert run(arguments) == code
    shown = capsys.readouterr()
    assert text in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "nowhere.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.rstrip().endswith("layerwise: no job file at nowhere.yaml")


def test_an_unexpected_error_is_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("no idea")

    monkeypatch.setattr("layerwise.job.job_schema", fail)
    assert run(["schema"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("layerwise: unexpected ZeroDivisionError: no idea")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "MemoryError"),
        (
            RuntimeError("not enough memory: you tried to allocate\n9 bytes"),
            "RuntimeError: not enough memory: you tried to allocate 9 bytes",
        ),
    ],
)
def test_a_command_that_runs_out_of_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("layerwise.job.job_schema", fail)
    assert run(["schema"]) == exit_codes.OUT_OF_MEMORY == 7
    assert capsys.readouterr().err == f"layerwise: memory ran out: {words}\n"


def test_the_schema_is_json_that_names_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "data", "train", "async", "checkpoint"} <= set(schema["properties"])


def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LAYERWISE_COORDINATOR", "unix:/from/environment")
    assert run(["jobs"]) == 3
    assert "unix:/from/environment" in capsys.readouterr().err
    assert run(["jobs", "--coordinator", "unix:/from/argument"]) == 3
    assert "unix:/from/argument" in capsys.readouterr().err


def test_the_local_clusters_address_is_found_until_it_is_taken_back() -> None:
    path = record_coordinator("unix:/tmp/somewhere/coordinator.sock")
    assert coordinator_address(None) == "unix:/tmp/somewhere/coordinator.sock"
    assert path.parent.stat().st_mode & 0o077 == 0
    forget_coordinator(path, "unix:/tmp/a-later-one/coordinator.sock")
    assert coordinator_address(None) == "unix:/tmp/somewhere/coordinator.sock"
    forget_coordinator(path, "unix:/tmp/somewhere/coordinator.sock")
    with pytest.raises(UnreachableError, match="layerwise up"):
        coordinator_address(None)


def test_tables_are_aligned_and_facts_leave_out_what_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["job", "steps"], [["a", 5], ["longer", 100]])
    assert capsys.readouterr().out.splitlines() == ["JOB     STEPS", "a           5", "longer    100"]
    print_table(["job"], [])
    assert capsys.readouterr().out == "JOB\n"
    print_facts({"state": "done", "message": "", "loss": None, "cuts": [1, 2]})
    assert capsys.readouterr().out.splitlines() == ["state  done", "cuts   1, 2"]


def test_cells_read_well() -> None:
    assert [format_cell(value) for value in (None, True, 0.123456, 123456.0, "x")] == [
        "-",
        "yes",
        "0.1235",
        "123,456",
        "x",
    ]
    assert [format_bytes(number) for number in (None, 12, 1500, 2.5e9)] == ["-", "12 B", "1.5 kB", "2.5 GB"]


def test_a_reader_that_goes_away_is_no_error_message(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "layerwise", "schema"], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b""
