from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from layerwise.garbage import imports_kept

PROGRAM = """
import gc
from layerwise.garbage import imports_kept
begun = []
gc.callbacks.append(lambda phase, info: begun.append(phase))
with imports_kept():
    import torch
print(len(begun), gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 10_000)
"""


def test_no_garbage_is_looked_for_while_torch_is_imported_nor_in_it_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True", "True"]


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    try:
        with pytest.raises(ModuleNotFoundError), imports_kept():
            import nothing_of_the_sort  # noqa: F401
        assert gc.isenabled()
    finally:
        gc.unfreeze()
