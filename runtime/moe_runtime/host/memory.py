"""Freed memory stays with the process.

glibc hands large blocks (from 128 KiB, at most 32 MiB) back to the system when they are freed, and a fresh one costs a
page fault for every 4 KiB that is written: 59 ms for 64 MiB where a copy takes 4. A rank frees and asks for the same
tensors in every layer.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """From now on blocks of any size come from the heap, and its end is not given back. Does nothing without glibc."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
