"""The memory of uploads in parts, and how large each part is.

How long a stream becomes is not known when its first part is sent, and a store takes only so
many parts.  So parts grow: small at first, that little data needs little memory, up to half of
what all uploads may use.  Beyond what the largest of them can reach, parts are made of objects
that the store itself puts together (:mod:`proxy.remotes.objects.writing`).
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from proxy.remotes.objects.store import Limits

PART = 8 * 1024 * 1024
"""Bytes of the first parts, if the store allows them."""
BUDGET = 128 * 1024 * 1024
"""Bytes of all parts of one remote that are filled or on their way."""
_GROWS_EVERY = 512
"""Parts of one size before they become twice as large."""


class Memory:
    """Buffers of parts, ``budget`` bytes together; one buffer is always to be had.

    A part's buffer is taken whole before its first byte, so that no two uploads can wait for
    each other with half of a part each.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.used = 0
        self._turn = trio.Lock()
        self._freed = trio.Event()
        self._idle: deque[memoryview] = deque()
        self._idle_size = 0

    async def take(self, size: int) -> memoryview:
        """Wait, in the order of asking, until ``size`` bytes fit.  On cancel nothing is taken."""
        async with self._turn:
            while self.used and self.used + size > self.budget:
                self._freed = trio.Event()
                await self._freed.wait()
            self.used += size
        for _ in range(len(self._idle)):
            memory = self._idle.popleft()
            self._idle_size -= len(memory)
            if len(memory) == size:
                return memory
            if self.used + self._idle_size + len(memory) <= self.budget:
                self._idle.append(memory)
                self._idle_size += len(memory)
        self._shrink()
        return memoryview(mmap.mmap(-1, size))  # pages of their own, given back when dropped

    def put_back(self, memory: memoryview) -> None:
        self.used -= len(memory)
        self._idle.append(memory)
        self._idle_size += len(memory)
        self._shrink()
        self._freed.set()

    def _shrink(self) -> None:
        while self._idle and self.used + self._idle_size > self.budget:
            self._idle_size -= len(self._idle.popleft())


class Sizes:
    """Of the parts of one object, by number from 1."""

    def __init__(self, limits: Limits, budget: int, *, first: int = PART) -> None:
        self._first = max(min(first, limits.largest_part), limits.smallest_part)
        self._largest = max(self._first, min(limits.largest_part, budget // 2))

    def of(self, number: int) -> int:
        doubled = min((number - 1) // _GROWS_EVERY, 40)
        return min(self._first << doubled, self._largest)

    @property
    def largest(self) -> int:
        return self._largest
