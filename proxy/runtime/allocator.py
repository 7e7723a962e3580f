"""Tells the C library to share its heaps between threads."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8
_ARENAS = 2


def share_heaps() -> None:
    """At most two heaps for all threads; call it before the first of them starts.

    glibc gives each new thread a heap of its own, up to eight for each core, and what a worker
    thread frees stays in its heap: the daemon's size crept up from run to run.  Python holds
    its lock while it allocates, so the threads lose nothing.  Other C libraries have no such
    switch, nor the trouble.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
