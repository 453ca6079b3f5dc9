from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("loaded", ["torch", "json"])
def test_a_process_ends_with_its_status_and_leaves_nothing_unsaid_or_undone(loaded: str) -> None:
    code = (
        "import atexit, logging, sys\n"
        "from layerwise.process_end import end_process\n"
        "atexit.register(print, 'the last thing')\n"
        "sys.modules.setdefault(sys.argv[1], sys)\n"  # torch itself would take a second to load
        "logging.basicConfig(stream=sys.stderr)\n"
        "print('a line', end='')\n"
        "logging.error('a warning')\n"
        "end_process(7)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, loaded], capture_output=True, text=True, check=False)
    assert found.returncode == 7
    assert found.stdout == "a linethe last thing\n"
    assert found.stderr == "ERROR:root:a warning\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    code = (
        "import os, sys\n"
        "from layerwise.process_end import end_process\n"
        "sys.modules['torch'] = sys\n"
        "reader, writer = os.pipe()\n"
        "os.dup2(writer, 1)\n"
        "os.close(reader), os.close(writer)\n"
        "print('nobody hears this')\n"
        "end_process(3)\n"
    )
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    found = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert (found.returncode, found.stderr) == (3, "")
