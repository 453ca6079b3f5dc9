from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from layerwise.errors import LayerwiseError
from layerwise.memory import is_out_of_memory

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


def raised_from(cause: Exception) -> Exception:
    error = LayerwiseError("sample 3 can't be loaded")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        raised_from(MemoryError()),
    ],
)
def test_errors_that_say_that_memory_ran_out_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_what_torch_really_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), KeyError("memory"), LayerwiseError("BLAS has no memory")]
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
