"""Who is let in: processes that say what they are in words that can be kept, shown and used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerwise.messages import Hello, Role
from layerwise.server.hello_check import LONGEST_WORD, MOST_IMPORTS, hello_fault

HELLO = Hello(
    role=Role.SHARD, name="shard-0", address="unix:/run/a.sock", device="cuda:0", host="here", pid=1, version="1",
    allowed_imports=("my_package",), metrics_address="127.0.0.1:9000",
)  # fmt: skip


@pytest.mark.parametrize(
    "hello",
    [
        HELLO,
        replace(HELLO, metrics_address="0.0.0.0:9000"),
        replace(HELLO, role=Role.FORWARD, address=""),
        replace(HELLO, role=Role.BACKWARD, metrics_address=""),
    ],
)
def test_a_process_that_says_what_it_is_comes_in(hello: Hello) -> None:
    assert hello_fault("shard-0", hello) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "shard-1"}, "it calls itself 'shard-1' there"),
        ({"name": "x" * 5000}, "it calls itself 'xxx"),
        ({"role": Role.CLIENT}, "it is a client, expected shard, forward, backward"),
        ({"role": Role.COORDINATOR}, "it is a coordinator"),
        ({"join": ""}, "it is a shard that joins, and only workers can"),
        ({"join": "toy\n1"}, "its join is no word"),
        ({"address": ""}, "a shard without an address"),
        ({"address": "nonsense"}, "its address can't be used: address 'nonsense' is neither"),
        ({"address": "unix:" + "x" * 200}, "its address can't be used"),
        ({"address": "0.0.0.0:7071"}, "its address can't be used: nobody can call 0.0.0.0:7071, which stands for all"),
        ({"address": "[::]:7071"}, "its address can't be used: nobody can call [::]:7071"),
        ({"address": "here:0"}, "nobody can call here:0, which has no port"),
        ({"metrics_address": "a:b"}, "its metrics address can't be used"),
        ({"host": "x" * (LONGEST_WORD + 1)}, "its host is no word"),
        ({"device": "cuda\x1b[2J"}, "its device is no word"),
        ({"version": "1\n2"}, "its version is no word"),
        ({"allowed_imports": ("x",) * (MOST_IMPORTS + 1)}, "it allows more than 200 imports"),
        ({"allowed_imports": ("x" * (LONGEST_WORD + 1),)}, "longer ones than 500 characters"),
    ],
)
def test_what_can_not_be_meant_is_named(changes: dict[str, Any], words: str) -> None:
    fault = hello_fault("shard-0", replace(HELLO, **changes))
    assert words in fault
    assert len(fault) < 1000
