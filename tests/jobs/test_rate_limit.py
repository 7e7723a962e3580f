"""``maxExportRate``: one budget for a whole run."""

from __future__ import annotations

import pytest
import trio

from proxy.jobs.rate_limit import RateLimit

pytestmark = pytest.mark.virtual_clock


async def test_rate_is_kept_over_several_transfers() -> None:
    rate = RateLimit(100)
    async with trio.open_nursery() as nursery:
        for _ in range(4):

            async def transfer() -> None:
                for _ in range(10):
                    await rate.spend(50)

            nursery.start_soon(transfer)
    assert 18 <= trio.current_time() <= 21, "2,000 bytes at 100 a second, one second of burst"


async def test_no_rate_waits_for_nothing() -> None:
    assert await RateLimit(0).spend(10**12) == 0
    assert trio.current_time() == 0
