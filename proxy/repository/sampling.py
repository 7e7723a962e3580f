"""Which part of the data a verify of some of it reads: another one each day, in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from proxy.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SECONDS_A_DAY = 86400


class Sample:
    """A ``share`` of things, evenly spread, the same all day (UTC) for one ``key``.

    Each day it moves on by one: after ``1 / share`` days everything has had its turn.
    """

    def __init__(self, share: float, *, now: float) -> None:
        """``Refused`` (``EINVAL``) unless 0 < ``share`` <= 1; ``now`` in seconds."""
        if not 0 < share <= 1:
            raise Refused(f"a sample of {share} is none: 0 < sample <= 1", code="EINVAL")
        self.share = share
        self._day = int(now // _SECONDS_A_DAY)

    def takes(self, rank: int, key: str) -> bool:
        """Whether the thing with the number ``rank`` among those of ``key`` is in it."""
        place = rank + self._day + xxhash.xxh3_64_intdigest(key.encode()) % 1024
        return int((place + 1) * self.share) > int(place * self.share)

    def of(self, things: Iterable[int], key: str) -> Iterator[int]:
        """Those of ``things`` that are in it, in order; at least the first."""
        nothing = True
        first: int | None = None
        for rank, thing in enumerate(things):
            first = thing if first is None else first
            if self.takes(rank, key):
                nothing = False
                yield thing
        if nothing and first is not None:
            yield first
