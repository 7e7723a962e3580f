"""Counted, reused buffers."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from proxy.runtime.buffers import BufferPool

pytestmark = pytest.mark.virtual_clock


async def test_a_buffer_comes_back_when_its_last_holder_is_done() -> None:
    pool = BufferPool(1, 16)
    buffer = await pool.acquire()
    buffer.memory[:3] = b"abc"
    buffer.length = 3
    buffer.share(2)
    assert bytes(buffer.view) == b"abc"
    buffer.release()
    assert pool.in_use == 1
    with trio.move_on_after(1) as scope:
        await pool.acquire()
    assert scope.cancelled_caught, "there is only one"
    buffer.release()
    assert pool.in_use == 0
    assert (await pool.acquire()).length == 0


async def test_no_more_are_made_than_needed() -> None:
    pool = BufferPool(8, 16)
    for _ in range(20):
        (await pool.acquire()).release()
    assert pool._made == 1


async def test_a_buffer_begins_as_the_first_time_whatever_its_last_holder_did() -> None:
    pool = BufferPool(1, 16, prefix=b"head")
    for _ in range(2):
        buffer = await pool.acquire()
        assert bytes(buffer.memory[:4]) == b"head"
        buffer.memory[:16] = bytes(16)
        buffer.release()


async def test_without_waiting_there_is_a_buffer_or_none() -> None:
    pool = BufferPool(1, 16)
    buffer = pool.try_acquire()
    assert buffer is not None
    assert pool.try_acquire() is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.acquire)
        await trio.testing.wait_all_tasks_blocked()
        buffer.release()
        assert pool.try_acquire() is None, "it is for the task that waits"


async def test_memory_that_is_refused_leaves_the_pool_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("out of memory")

    pool = BufferPool(1, 16)
    with monkeypatch.context() as patched:
        patched.setattr("proxy.runtime.buffers.mmap.mmap", refuse)
        with pytest.raises(OSError, match="out of memory"):
            await pool.acquire()
    assert pool.in_use == 0
    assert pool.try_acquire() is not None


async def test_a_release_too_many_is_a_fault() -> None:
    buffer = await BufferPool(1, 16).acquire()
    buffer.release()
    with pytest.raises(AssertionError, match="more often"):
        buffer.release()


async def test_a_finished_transfers_memory_goes_back_to_the_system() -> None:
    """Without waiting for the garbage collector, whose next visit may be far."""
    import gc
    import weakref

    pool = BufferPool(1, 16)
    buffer = await pool.acquire()
    memory = weakref.ref(buffer.memory.obj)
    gc.disable()
    try:
        buffer.release()
        del buffer, pool
        assert memory() is None
    finally:
        gc.enable()
