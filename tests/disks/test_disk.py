"""Blocks against a set; reading in order, ahead, and through errors and cancels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.disks.disk import Blocks, RandomAccess, block_pool, length_of, read_in_order
from proxy.errors import Corrupt
from proxy.formats import vhd
from proxy.runtime.buffers import BufferPool
from tests.disks.directories import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.disks.disk import Block

pytestmark = pytest.mark.virtual_clock

INDEXES = st.sets(st.integers(0, 40))


@given(INDEXES, INDEXES, st.integers(41, 60), st.integers(0, 60))
def test_blocks_are_a_set(one: set[int], other: set[int], count: int, shorter: int) -> None:
    blocks = Blocks.of(one, count)
    assert list(blocks) == sorted(one)
    assert len(blocks) == len(one)
    assert blocks.count == count
    assert [index in blocks for index in range(-1, count + 1)] == [
        index in one for index in range(-1, count + 1)
    ]
    union = blocks | Blocks.of(other, 41)
    assert list(union) == sorted(one | other)
    assert union.count == count
    assert list(blocks.resized(shorter)) == sorted(index for index in one if index < shorter)
    assert blocks.resized(shorter).count == shorter
    assert (blocks == Blocks.of(other, count)) == (one == other)
    assert hash(blocks) == hash(Blocks.of(sorted(one), count))


def test_no_block_lies_outside_of_its_disk() -> None:
    for index in (-1, 4):
        with pytest.raises(IndexError):
            Blocks.of([index], 4)
    assert list(Blocks.everything(3)) == [0, 1, 2]
    assert list(Blocks.everything(0)) == []


def test_the_last_block_is_as_long_as_what_is_left() -> None:
    assert length_of(0, 2 * vhd.BLOCK_SIZE + 512) == vhd.BLOCK_SIZE
    assert length_of(2, 2 * vhd.BLOCK_SIZE + 512) == 512


def small_pool(count: int) -> BufferPool:
    return BufferPool(count, vhd.BITMAP_SIZE + 8, prefix=vhd.FULL_BITMAP)


class TimedDisk(MemoryDisk):
    """Block ``i`` takes ``seconds[i]`` to read; knows how many were read at once."""

    def __init__(self, seconds: Sequence[float]) -> None:
        super().__init__({index: index + 1 for index in range(len(seconds))}, len(seconds))
        self.most = 0
        self._seconds = seconds
        self._now = 0

    async def read_block(self, index: int, into: memoryview) -> None:
        self._now += 1
        self.most = max(self.most, self._now)
        await trio.sleep(self._seconds[index])
        self._now -= 1
        await super().read_block(index, into)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 9.0]), max_size=12),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
)
def test_blocks_come_in_order_whatever_ends_first(
    seconds: list[float], depth: int, count: int, slow: bool
) -> None:
    disk, pool = TimedDisk(seconds), small_pool(count)
    found: list[tuple[int, int]] = []

    async def read() -> None:
        async with read_in_order(disk, pool, depth=depth) as reader:
            while (block := await reader.next()) is not None:
                assert block.buffer.length == len(block.stored)
                if slow:
                    await trio.sleep(3)
                found.append((block.index, block.data[0]))
                block.buffer.release()
            assert await reader.next() is None

    trio.run(read, clock=trio.testing.MockClock(autojump_threshold=0))
    assert found == [(index, index + 1) for index in range(len(seconds))]
    assert disk.most <= min(depth, count)
    assert pool.in_use == 0


class GatedDisk(RandomAccess):
    """Each read stands still until its gate opens; some fail, some do not hear a cancel."""

    is_differencing = False

    def __init__(
        self,
        count: int,
        *,
        errors: Mapping[int, Exception] | None = None,
        deaf: bool = False,
    ) -> None:
        self.virtual_size = count * vhd.BLOCK_SIZE
        self.blocks = Blocks.everything(count)
        self.started: list[int] = []
        self.gates = [trio.Event() for _ in range(count)]
        self._errors = errors or {}
        self._deaf = deaf

    async def read_block(self, index: int, into: memoryview) -> None:
        self.started.append(index)
        into[: vhd.BITMAP_SIZE] = bytes(vhd.BITMAP_SIZE)
        with trio.CancelScope(shield=self._deaf):
            await self.gates[index].wait()
        if index in self._errors:
            raise self._errors[index]
        into[: vhd.BITMAP_SIZE] = vhd.FULL_BITMAP
        into[vhd.BITMAP_SIZE :] = bytes([index]) * 8

    def open_all(self) -> None:
        for gate in self.gates:
            gate.set()


async def test_reads_go_on_while_a_block_is_held() -> None:
    disk, pool = GatedDisk(9), small_pool(8)
    async with read_in_order(disk, pool, depth=3) as reader:
        disk.gates[0].set()
        block = await reader.next()
        assert block is not None
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(disk.started) == [0, 1, 2]
        block.buffer.release()
    assert pool.in_use == 0


async def test_a_pool_of_one_is_enough_and_the_end_needs_none() -> None:
    disk, pool = GatedDisk(3), small_pool(1)
    disk.open_all()
    async with disk.read(pool) as reader:
        for expected in range(3):
            block = await reader.next()
            assert block is not None
            assert block.index == expected
            if expected < 2:
                block.buffer.release()
        with trio.fail_after(1):
            assert await reader.next() is None  # while the only buffer is held
        assert block is not None
        block.buffer.release()


async def test_disks_that_share_a_pool_never_wait_in_a_ring() -> None:
    """Each has a block to give, and no buffer is left."""
    pool = small_pool(2)
    one, other = GatedDisk(3), GatedDisk(3)
    one.open_all()
    other.open_all()
    async with (
        read_in_order(one, pool, depth=2) as first,
        read_in_order(other, pool, depth=2) as second,
    ):
        with trio.fail_after(1):
            held = await first.next()
            assert held is not None
            held.buffer.release()
            blocks: list[Block] = []
            for reader in (first, second):  # ``first`` has read ahead already
                block = await reader.next()
                assert block is not None
                blocks.append(block)
                block.buffer.release()
        assert [block.index for block in blocks] == [1, 0]
    assert pool.in_use == 0


async def test_an_error_comes_in_its_turn_and_stays() -> None:
    """A reader that went on with the next block would end a disk with a hole well."""
    broken = Corrupt("bad", data={"what": "test"})
    disk, pool = GatedDisk(5, errors={2: broken}), small_pool(4)
    disk.gates[2].set()  # long before the blocks that come before it
    async with disk.read(pool) as reader:
        disk.gates[0].set()
        disk.gates[1].set()
        for expected in (0, 1):
            block = await reader.next()
            assert block is not None
            assert block.index == expected
            block.buffer.release()
        disk.open_all()
        for _ in range(3):
            with pytest.raises(Corrupt) as caught:
                await reader.next()
            assert caught.value is broken
    assert pool.in_use == 0


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    disk, pool = GatedDisk(5), small_pool(4)
    disk.gates[0].set()

    async def fail() -> None:
        async with disk.read(pool) as reader:
            block = await reader.next()
            assert block is not None
            block.buffer.release()
            raise Corrupt("mine")

    with pytest.raises(Corrupt, match="mine"):
        await fail()
    assert pool.in_use == 0


async def test_a_failed_read_leaves_no_empty_bitmap_to_the_next() -> None:
    disk, pool = GatedDisk(1, errors={0: Corrupt("bad")}), block_pool(1)
    disk.open_all()
    async with disk.read(pool) as reader:
        with pytest.raises(Corrupt):
            await reader.next()
    buffer = await pool.acquire()
    assert buffer.memory[: vhd.BITMAP_SIZE] == vhd.FULL_BITMAP
    buffer.release()


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("opened", [[], [0], [1], [0, 1], [1, 2], [0, 1, 2, 3]])
async def test_leaving_gives_every_buffer_back_once(opened: list[int], *, deaf: bool) -> None:
    """With reads done, under way, and under way in a thread that hears no cancel."""
    disk, pool = GatedDisk(9, deaf=deaf), small_pool(4)

    scope = trio.CancelScope()

    async def reading() -> None:
        with scope:
            async with disk.read(pool) as reader:
                while (block := await reader.next()) is not None:
                    block.buffer.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading)
        await trio.testing.wait_all_tasks_blocked()
        for index in opened:
            disk.gates[index].set()
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        in_use, under_way = pool.in_use, len(set(disk.started) - set(opened))
        disk.open_all()
    if deaf:
        assert in_use == under_way > 0, "threads still write to these"
    else:
        assert in_use == 0
    assert pool.in_use == 0


async def test_a_cancelled_wait_takes_no_block() -> None:
    disk, pool = GatedDisk(3), small_pool(2)
    async with disk.read(pool) as reader:
        with trio.move_on_after(1) as scope:
            await reader.next()
        assert scope.cancelled_caught
        disk.open_all()
        for expected in range(3):
            block = await reader.next()
            assert block is not None
            assert block.index == expected
            block.buffer.release()
    assert pool.in_use == 0


async def test_a_cancelled_wait_for_a_buffer_takes_none() -> None:
    disk, pool = GatedDisk(2), small_pool(1)
    disk.open_all()
    held = await pool.acquire()
    async with disk.read(pool) as reader:
        with trio.move_on_after(1) as scope:
            await reader.next()
        assert scope.cancelled_caught
        held.release()
        block = await reader.next()
        assert block is not None
        block.buffer.release()
    assert pool.in_use == 0
