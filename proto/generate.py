"""Generate ``layerwise_pb2.py`` from ``layerwise.proto``: ``python proto/generate.py``.

With ``--check`` nothing is written; the exit code is 1 when the checked-in code differs from what would be generated.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
GENERATED = ("layerwise_pb2.py", "layerwise_pb2.pyi")


def generate() -> dict[str, str]:
    """What the compiler makes of the source now: file name to text.

    Raises:
        subprocess.CalledProcessError: the compiler refuses the source (its own message is on standard error).
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={FOLDER}", f"--python_out={out}"]
        subprocess.run([*command, f"--pyi_out={out}", "layerwise.proto"], check=True)
        return {name: (Path(out) / name).read_text() for name in GENERATED}


def stale() -> list[str]:
    """Names of the generated files that are missing or not what would be generated."""
    return [
        name for name, text in generate().items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text
    ]


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if arguments == ["--check"]:
        names = stale()
        for name in names:
            sys.stderr.write(f"proto/{name} does not follow from layerwise.proto; run: python proto/generate.py\n")
        return 1 if names else 0
    if arguments:
        sys.stderr.write("usage: python proto/generate.py [--check]\n")
        return 2
    for name, text in generate().items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
