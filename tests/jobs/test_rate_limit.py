"""``maxExportRate``: one budget for a whole run."""

from __future__ import annotations

import pytest
import trio

from proxy.jobs.rate_limit import RateLimit

pytestmark = pytest.mark.virtual_clock


async def test_rate_is_kept_over_several_transfers() -> None:
    rate = RateLimit(lambda: 100)
    async with trio.open_nursery() as nursery:
        for _ in range(4):

            async def transfer() -> None:
                for _ in range(10):
                    await rate.spend(50)

            nursery.start_soon(transfer)
    assert 18 <= trio.current_time() <= 21, "2,000 bytes at 100 a second, one second of burst"


async def test_no_rate_waits_for_nothing() -> None:
    assert await RateLimit(lambda: 0).spend(10**12) == 0
    assert trio.current_time() == 0


async def test_who_came_first_goes_first() -> None:
    rate = RateLimit(lambda: 10)
    order: list[tuple[int, int]] = []

    async def transfer(name: int, count: int) -> None:
        await rate.spend(count)
        order.append((name, round(trio.current_time())))

    async with trio.open_nursery() as nursery:
        for name in range(3):
            nursery.start_soon(transfer, name, 30)
            await trio.sleep(0.01)
    assert order == [(0, 2), (1, 5), (2, 8)]


async def test_a_change_counts_within_a_second() -> None:
    rates = {"now": 1.0}
    rate = RateLimit(lambda: rates["now"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rate.spend, 10_000)
        await trio.sleep(5)
        rates["now"] = 10_000.0
    assert 5 <= trio.current_time() <= 7.5
    rates["now"] = 0
    assert await rate.spend(10**9) == 0


async def test_what_was_not_used_is_no_credit() -> None:
    rate = RateLimit(lambda: 100)
    await rate.spend(10)
    await trio.sleep(1000)
    began = trio.current_time()
    for _ in range(10):
        await rate.spend(100)
    assert trio.current_time() - began == pytest.approx(9, abs=0.1)
