from __future__ import annotations

import pytest
import trio
import trio.testing

from proxy.runtime.background import background


async def test_what_the_block_raises_comes_out_as_it_is_once_its_tasks_have_ended() -> None:
    ended: list[str] = []

    async def serve() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            ended.append("task")

    with pytest.raises(KeyError):  # noqa: PT012 (the block is what raises)
        async with background() as nursery:
            nursery.start_soon(serve)
            await trio.testing.wait_all_tasks_blocked()
            raise KeyError("x")
    assert ended == ["task"]
    async with background() as nursery:
        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
    assert ended == ["task", "task"]


async def test_a_cancel_passes_through() -> None:
    with trio.CancelScope() as scope:
        async with background() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_what_a_task_raises_is_in_a_group_and_ends_the_block() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("x")

    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with background() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()
    assert caught.group_contains(KeyError)
