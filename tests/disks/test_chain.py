"""Chains and their negatives, against a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.disks.chain import Chain
from proxy.disks.disk import block_pool
from proxy.disks.negative import Negative
from proxy.errors import Refused
from proxy.formats import vhd
from proxy.runtime.buffers import BufferPool
from tests.disks.directories import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.disks.disk import Disk

pytestmark = pytest.mark.virtual_clock


def disks(layers: Sequence[tuple[int, set[int]]]) -> list[MemoryDisk]:
    """One disk for each ``(block count, indexes)``, oldest first; disk n is filled with n + 1."""
    return [
        MemoryDisk(
            {index: number + 1 for index in indexes if index < count},
            count,
            is_differencing=number > 0,
        )
        for number, (count, indexes) in enumerate(layers)
    ]


async def tags(disk: Disk) -> dict[int, int]:
    """The byte that fills each block, read in order through tiny buffers."""
    pool = BufferPool(3, vhd.BITMAP_SIZE + 8, prefix=vhd.FULL_BITMAP)
    found: dict[int, int] = {}
    async with disk.read(pool) as reader:
        while (block := await reader.next()) is not None:
            assert bytes(block.data) == block.data[:1].tobytes() * 8
            found[block.index] = block.data[0]
            block.buffer.release()
    assert pool.in_use == 0
    return found


LAYERS = st.lists(
    st.tuples(st.integers(1, 20), st.sets(st.integers(0, 19))), min_size=1, max_size=6
)


@settings(deadline=None)
@given(LAYERS)
async def test_the_newest_disk_that_holds_a_block_gives_it(
    layers: list[tuple[int, set[int]]],
) -> None:
    chain = Chain(disks(layers))
    count = layers[-1][0]
    expected: dict[int, int] = {}
    for number, (own, indexes) in enumerate(layers):
        expected |= {index: number + 1 for index in indexes if index < min(own, count)}
    assert chain.virtual_size == count * vhd.BLOCK_SIZE
    assert list(chain.blocks) == sorted(expected)
    assert await tags(chain) == expected
    for index in range(-1, 21):
        tag = expected.get(index)
        assert chain.owner(index) is (None if tag is None else chain.disks[tag - 1])


@pytest.mark.parametrize("length", [1, 254, 255, 256, 257, 600])
async def test_a_chain_of_any_length(length: int) -> None:
    layers = [(length + 1, {number, length}) for number in range(length)]
    chain = Chain(disks(layers))
    for index in range(length):
        assert chain.owner(index) is chain.disks[index]
    assert chain.owner(length) is chain.disks[-1]


async def test_a_chain_is_differencing_when_its_oldest_disk_is() -> None:
    full, child = disks([(2, {0}), (2, {1})])
    assert not Chain([full, child]).is_differencing
    assert Chain([child]).is_differencing
    with pytest.raises(ValueError, match="no disks"):
        Chain([])


async def test_a_block_that_no_disk_has() -> None:
    chain = Chain(disks([(2, {0}), (3, {1})]))
    with pytest.raises(ValueError, match="block 2"):
        await chain.read_block(2, memoryview(bytearray(vhd.STORED_BLOCK)))


@settings(deadline=None)
@given(LAYERS, st.data())
async def test_the_negative_turns_the_child_back_into_its_parent(
    layers: list[tuple[int, set[int]]], data: st.DataObject
) -> None:
    count = layers[-1][0]
    layers = [(count, indexes) for _, indexes in layers]
    split = data.draw(st.integers(0, len(layers) - 1))
    every = disks(layers)
    parent, whole = Chain(every[: split + 1]), Chain(every)
    if split + 1 == len(layers):
        child = Chain([MemoryDisk({}, count, is_differencing=True)])
    else:
        child = Chain(every[split + 1 :])
    negative = Negative(parent, child)
    assert negative.is_differencing
    assert negative.blocks == child.blocks
    before = dict.fromkeys(range(count), 0) | await tags(parent)
    after = dict.fromkeys(range(count), 0) | await tags(whole)
    assert after | await tags(negative) == before


async def test_a_resized_disk_has_no_negative() -> None:
    parent, child = disks([(2, {0}), (3, {1})])
    with pytest.raises(Refused) as caught:
        Negative(parent, child)
    assert caught.value.code == "GEOMETRY_CHANGED"


async def test_what_an_incomplete_parent_lacks_is_not_zeros() -> None:
    _, parent, child = disks([(2, {0}), (2, {1}), (2, {0})])
    with pytest.raises(Refused, match="full disk"):
        Negative(parent, child)


async def test_zeros_replace_what_a_used_buffer_held() -> None:
    parent, child = disks([(3, {2}), (3, {0, 1, 2})])
    negative = Negative(parent, child)
    pool = block_pool(1)
    buffer = await pool.acquire()
    buffer.memory[vhd.BITMAP_SIZE :] = b"\xee" * vhd.BLOCK_SIZE
    buffer.release()
    async with negative.read(pool) as reader:
        for expected in (0, 0, 1):
            block = await reader.next()
            assert block is not None
            assert bytes(block.data) == bytes([expected]) * vhd.BLOCK_SIZE
            block.buffer.release()
