"""What the soaks count must be able to grow: sockets that are listened on, files that are open."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from benchmarks.open_files import OpenFiles, listening_sockets


def test_a_socket_counts_while_somebody_listens_even_without_its_file(socket_folder: Path) -> None:
    path = socket_folder / "one.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert listening_sockets(socket_folder) == ()
        listener.listen()
        path.unlink()
        assert listening_sockets(socket_folder) == (str(path),)
        assert listening_sockets(socket_folder / "other") == ()
    assert listening_sockets(socket_folder) == ()


def test_files_that_stay_open_are_seen() -> None:
    files = OpenFiles()
    mine = {"shard-0": os.getpid(), "shard-1": 2**31 - 1}
    files.sample(mine, 0.0)
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    files.sample(mine, 60.0)
    for one in opened:
        os.close(one)
    first, last = files.change("shard", 10.0)
    assert last - first == 3
