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
