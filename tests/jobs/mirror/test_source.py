"""Looking at what a mirror reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from proxy.jobs.mirror.mirror_job import Filter
from proxy.jobs.mirror.source import look
from proxy.remotes.local import LocalRemote
from proxy.runtime.background import background

from .mirrors import CHAIN, Stock


@pytest.mark.parametrize("field", [("timestamp",), ("vdis",)])
async def test_a_filter_that_takes_long_stops_nothing_else(
    tmp_path: Path, stock: Stock, field: tuple[str, ...]
) -> None:
    """Locks are refreshed every few seconds, or somebody else takes them."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.sleep(0.005)
            ticks += 1

    def matches(value: object) -> bool:
        del value
        time.sleep(0.05)
        return True

    remote = await LocalRemote.open(str(stock.root / "source"), url="file:///source")
    try:
        await look(remote, stock.vm, "delta", None)
        async with background() as nursery:
            nursery.start_soon(tick)
            found = await look(remote, stock.vm, "delta", Filter(matches, frozenset({field})))
    finally:
        await remote.aclose()
    assert len(found.matching) == CHAIN
    assert ticks >= 10
