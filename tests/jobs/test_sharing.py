"""Connections shared by several users, kept for a while after the last."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
import trio.testing

from proxy.errors import Unreachable
from proxy.jobs.sharing import Shared

pytestmark = pytest.mark.virtual_clock


class Opener:
    """Opens numbered things and notes what happens to them."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.opened = 0
        self.closed = 0
        self.seconds = seconds
        self.error: Exception | None = None

    def __call__(self) -> AbstractAsyncContextManager[int]:
        return self._open()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[int]:
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.opened += 1
        try:
            yield self.opened
        finally:
            self.closed += 1


async def test_users_at_the_same_time_share_and_it_outlives_them(nursery: trio.Nursery) -> None:
    opener, shared = Opener(1), Shared[int](nursery, lambda: 60)
    seen: list[int] = []

    async def user() -> None:
        async with shared.use("key", opener) as one:
            seen.append(one)
            await trio.sleep(10)

    async with trio.open_nursery() as users:
        for _ in range(5):
            users.start_soon(user)
    assert seen == [1] * 5
    await trio.sleep(59)
    async with shared.use("key", opener) as again:
        assert again == 1
    await trio.sleep(61)
    assert (opener.opened, opener.closed) == (1, 1)
    assert shared.statistics() == {"open": 0, "users": 0}


async def test_another_key_is_another_thing(nursery: trio.Nursery) -> None:
    opener, shared = Opener(), Shared[int](nursery, lambda: 0)
    async with shared.use("a", opener) as one, shared.use("b", opener) as other:
        assert one != other


async def test_a_failed_opening_is_everybodys_error_and_is_tried_afresh(
    nursery: trio.Nursery,
) -> None:
    opener, shared = Opener(1), Shared[int](nursery, lambda: 60)
    opener.error = Unreachable("no route")
    failures: list[Unreachable] = []

    async def user() -> None:
        try:
            async with shared.use("key", opener):
                pass
        except Unreachable as error:
            failures.append(error)

    async with trio.open_nursery() as users:
        users.start_soon(user)
        users.start_soon(user)
    assert len(failures) == 2
    opener.error = None
    async with shared.use("key", opener) as one:
        assert one == 1


async def test_an_opening_that_nobody_waits_for_is_given_up(nursery: trio.Nursery) -> None:
    opener, shared = Opener(1000), Shared[int](nursery, lambda: 60)
    with trio.move_on_after(1):
        async with shared.use("key", opener):
            pass
    await trio.testing.wait_all_tasks_blocked()
    assert shared.statistics()["open"] == 0
    assert trio.current_time() < 5
    opener.seconds = 0
    async with shared.use("key", opener) as one:
        assert one == 1


async def test_one_users_cancel_does_not_cut_the_other(nursery: trio.Nursery) -> None:
    opener, shared = Opener(5), Shared[int](nursery, lambda: 0)
    got: list[int] = []

    async def patient() -> None:
        async with shared.use("key", opener) as one:
            got.append(one)

    async with trio.open_nursery() as users:
        users.start_soon(patient)
        with trio.move_on_after(1):
            async with shared.use("key", opener):
                pass
    assert got == [1]


async def test_it_stays_open_for_the_undo_of_its_users() -> None:
    """When the daemon is cancelled as a whole, a run still destroys its snapshot through it."""
    opener = Opener()
    undone: list[bool] = []

    async def user(shared: Shared[int]) -> None:
        async with shared.use("key", opener):
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(30)
                    undone.append(opener.closed == 0)

    async with trio.open_nursery() as daemon:
        shared = Shared[int](daemon, lambda: 0)
        daemon.start_soon(user, shared)
        await trio.testing.wait_all_tasks_blocked()
        daemon.cancel_scope.cancel()
    assert undone == [True]
    assert opener.closed == 1
