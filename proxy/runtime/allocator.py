"""Tells the C library how to keep its heaps."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
_OWN_MAPPING: Final = 32 * 1024 * 1024
"""Bytes from which on an allocation is a mapping of its own; the most that glibc takes."""
_KEPT: Final = 16 * 1024 * 1024
"""Free bytes at the end of a heap that are not given back to the system."""


def set_up_heaps() -> None:
    """At most two heaps for all threads, which keep memory for a few blocks; call it before the
    first thread starts.

    glibc gives each new thread a heap of its own, up to eight for each core, and what a worker
    thread frees stays in its heap: the daemon's size crept up from run to run.  Python holds
    its lock while it allocates, so the threads lose nothing.

    It also gives every freed buffer of a codec back to the system, which hands out zeroed pages
    for the next one: compressing a block that cannot be compressed took four times as long.

    Other C libraries have no such switches, nor the trouble.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
