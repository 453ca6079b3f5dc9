"""How this process's C library treats freed memory, and which errors say that there is no more."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

LARGEST_KEPT_BLOCK = 64 << 20
MOST_KEPT_BYTES = 512 << 20
_OF_TORCH = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What torch says in errors of no class of their own: on the CPU, on Windows, where CUDA itself refused, and its libraries."""


def keep_freed_memory() -> bool:
    """Let blocks up to 64 MB be reused instead of going back to the kernel, at most 512 MB of them; whether it took effect.

    By default glibc maps each block of a megabyte anew and the kernel zeroes its pages one fault at a time. Activations, gradients and
    frames are such blocks, several for every microbatch: a training step of a small transformer took 3,700 page faults and 5 % more
    processor time, a hop of 16 MB a third more. Concerns all threads; call it once, early. Does nothing with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = (
        (_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK),
        (_TRIM_THRESHOLD, MOST_KEPT_BYTES),
        (_TOP_PAD, LARGEST_KEPT_BLOCK // 4),
    )
    taken = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(taken)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what it was raised from or met on its way, means that memory could not be had: Python's, torch's or a device's."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(words in text for words in _OF_TORCH):
            return True
        error = error.__cause__ or error.__context__
    return False
