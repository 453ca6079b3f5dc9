from __future__ import annotations

import subprocess
import sys

CODE = """
import resource, sys
import numpy as np
from layerwise.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(3 << 20, np.uint8)
        np.ones(5 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
took = keep_freed_memory()
faults()
sys.exit(0 if not took or faults() < before / 4 else 1)
"""


def test_blocks_are_reused_without_page_faults() -> None:
    assert subprocess.run([sys.executable, "-c", CODE], check=False).returncode == 0
