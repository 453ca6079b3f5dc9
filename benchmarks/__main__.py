"""``python -m benchmarks [NAME [arguments] | NAME ...]``: run benchmarks and write their sections of ``benchmarks/RESULTS.md``."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("startup", "restart", "hop", "cpu", "digits", "throughput", "convergence")
LONG = ("guarantees", "chaos")
"""Run only when named."""


def main(words: list[str]) -> None:
    """Run those named (all of `NAMES` without a name); words after a name that are none go to it."""
    runs: list[tuple[str, list[str]]] = []
    for word in words:
        if word in (*NAMES, *LONG):
            runs.append((word, []))
        elif runs:
            runs[-1][1].append(word)
        else:
            raise SystemExit(f"no benchmark is called {word!r}; there are {', '.join((*NAMES, *LONG))}")
    for name, arguments in runs or [(name, []) for name in NAMES]:
        import_module(f"benchmarks.{name}").main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
