"""qcow2 streams: read against a model and qemu-img, written for qemu-img."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Self

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.disks.chain import Chain
from proxy.disks.disk import Block, Blocks, RandomAccess, block_count, block_pool, length_of
from proxy.disks.qcow2_stream import open_qcow2_stream, qcow2_length, send_qcow2
from proxy.errors import Corrupt, Unreachable
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, FULL_BITMAP
from tests.disks.qcow2_images import (
    COPIED,
    Source,
    checked,
    flat,
    image,
    qemu_img,
    qemu_io,
    qemu_reads,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from proxy.disks.disk import Disk
    from proxy.disks.qcow2_stream import Qcow2Stream

MIB = 1024 * 1024
KIB = 1024
CLUSTER = 64 * KIB


def filled(number: int, length: int = CLUSTER) -> bytes:
    """Content that only this cluster has."""
    return (number + 1).to_bytes(8, "big") * (length // 8)


class RawDisk(RandomAccess):
    """A disk of bytes with the given blocks."""

    def __init__(
        self, content: bytes, indexes: Sequence[int], *, is_differencing: bool = False
    ) -> None:
        self.virtual_size = len(content)
        self.is_differencing = is_differencing
        self.blocks = Blocks.of(indexes, block_count(len(content)))
        self.reads: list[int] = []
        self._content = content

    async def read_block(self, index: int, into: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        assert index in self.blocks
        self.reads.append(index)
        data = self._content[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
        into[BITMAP_SIZE:] = data.ljust(BLOCK_SIZE, b"\0")


class OrderedDisk(RawDisk):
    """A stream whose blocks come in an order of their own."""

    def __init__(self, content: bytes, order: Sequence[int]) -> None:
        super().__init__(content, order)
        self._order = order

    @property
    def order(self) -> Sequence[int]:
        return self._order

    def read(self, pool):  # type: ignore[no-untyped-def]
        return _InOrder(self, pool)


class _InOrder:
    def __init__(self, disk: OrderedDisk, pool) -> None:  # type: ignore[no-untyped-def]
        self._left = iter(disk.order)
        self._disk = disk
        self._pool = pool

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def next(self) -> Block | None:
        index = next(self._left, None)
        if index is None:
            return None
        buffer = await self._pool.acquire()
        await self._disk.read_block(index, buffer.memory)
        return Block(index, buffer)


async def blocks_of(disk: Disk, count: int = 3) -> dict[int, bytes]:
    """What reading gives, through buffers that had other content before."""
    pool = block_pool(count)
    dirty = [await pool.acquire() for _ in range(count)]
    for buffer in dirty:
        buffer.memory[BITMAP_SIZE:] = b"\xdd" * BLOCK_SIZE
        buffer.release()
    found: dict[int, bytes] = {}
    try:
        async with disk.read(pool) as reader:
            while (block := await reader.next()) is not None:
                assert block.stored[:BITMAP_SIZE] == FULL_BITMAP
                assert block.buffer.length == len(block.stored)
                found[block.index] = bytes(block.data)
                block.buffer.release()
    finally:
        assert pool.in_use == 0
    assert list(found) == list(disk.order)
    return found


async def whole(disk: Disk, under: bytes = b"") -> bytes:
    """The disk that its blocks make, over what was there."""
    size = disk.virtual_size
    content = bytearray(under[:size].ljust(block_count(size) * BLOCK_SIZE, b"\0"))
    for index, data in (await blocks_of(disk)).items():
        content[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE] = data
    assert not any(content[size:])
    return bytes(content[:size])


async def sent(disk: Disk) -> bytes:
    """The stream of a disk, as long as announced."""
    pool = block_pool(3)
    out: list[bytes] = []

    async def sink(view: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        out.append(bytes(view))

    await send_qcow2(disk, pool, sink)
    assert pool.in_use == 0
    stream = b"".join(out)
    assert len(stream) == qcow2_length(disk)
    return stream


async def opened(data: bytes, *, is_differencing: bool | None = None) -> Qcow2Stream:
    return await open_qcow2_stream(Source(data), is_differencing=is_differencing)


# Reading


@st.composite
def images(draw: st.DrawFn) -> tuple[int, dict[int, bytes | None], int]:
    """Size, clusters, bits of a cluster."""
    bits = draw(st.sampled_from([9, 12, 15, 16, 17, 21]))
    size = draw(st.integers(1, 7 * MIB // 512)) * 512
    if bits == 9:
        size = min(size, 3 * MIB)  # of so many clusters
    total = -(-size >> bits)
    numbers = draw(st.sets(st.integers(0, total - 1) | st.just(total - 1), max_size=40))
    runs = draw(st.sets(st.integers(0, total - 1), max_size=3))
    numbers |= {number for run in runs for number in range(run, min(total, run + 40))}
    zeros = draw(st.sets(st.sampled_from(sorted(numbers)), max_size=5)) if numbers else set()
    return (
        size,
        {n: None if n in zeros else filled(n, 1 << bits) for n in sorted(numbers)},
        bits,
    )


@settings(max_examples=40, deadline=None)
@given(images(), st.sets(st.integers(0, 400), max_size=4), st.sampled_from([3001, 1 << 20]))
async def test_a_full_stream_is_its_disk(
    made: tuple[int, dict[int, bytes | None], int], gaps: set[int], most: int
) -> None:
    size, clusters, bits = made
    gaps &= {number for number, content in clusters.items() if content is not None}
    source = Source(image(size, clusters, bits=bits, gaps=gaps), most)
    stream = await open_qcow2_stream(source, is_differencing=False)
    per_block = BLOCK_SIZE >> bits
    assert stream.virtual_size == size
    assert not stream.is_differencing
    held = {n // per_block for n, content in clusters.items() if content is not None}
    assert set(stream.blocks) == held
    assert not stream.partial
    assert await whole(stream) == flat(size, clusters, bits)
    assert source.finished


@settings(max_examples=40, deadline=None)
@given(images(), st.integers(0, 12 * MIB // 512), st.sets(st.integers(0, 5)))
async def test_a_differencing_stream_over_its_parent(
    made: tuple[int, dict[int, bytes | None], int], parent_sectors: int, indexes: set[int]
) -> None:
    size, clusters, bits = made
    parent_size = max(512, min(size, parent_sectors * 512))
    indexes = {index for index in indexes if index < block_count(parent_size)}
    below = bytearray(b"\x77" * parent_size)
    for index in set(range(block_count(parent_size))) - indexes:
        length = length_of(index, parent_size)
        below[index * BLOCK_SIZE : index * BLOCK_SIZE + length] = bytes(length)
    parent = RawDisk(bytes(below), sorted(indexes))
    stream = await opened(image(size, clusters, bits=bits), is_differencing=True)
    per_block = BLOCK_SIZE >> bits
    total = -(-size >> bits)
    touched = {number // per_block for number in clusters}
    partial = {
        index
        for index in touched
        if not all(
            n in clusters for n in range(index * per_block, min(total, (index + 1) * per_block))
        )
    }
    assert set(stream.blocks) == touched
    assert set(stream.partial) == partial
    stream.parent = parent
    assert await whole(stream, bytes(below)) == flat(size, clusters, bits, bytes(below))
    assert sorted(parent.reads) == sorted(partial & indexes), "a parent's block is read once"


@pytest.mark.parametrize("size", [(4 << 40) + MIB, 16 << 40])
async def test_what_a_host_streams_above_four_tebibytes(size: int, tmp_path: Path) -> None:
    """A host keeps its clusters of 64 KiB there, so that the L1 table has several; before it
    stand the table of the reference counts (16 bits each) and their blocks, as below."""
    last = block_count(size) - 1
    edge = (4 << 40) // BLOCK_SIZE
    indexes = sorted({0, edge - 1, edge, last // 2, last})
    ends = -(-size >> 16)
    clusters: dict[int, bytes | None] = {
        number: bytes([1 + index % 200]) * 65536
        for index in indexes
        for number in range(32 * index, min(ends, 32 * index + 32))
    }
    data = image(size, clusters)
    l1_size, l1_offset = int.from_bytes(data[36:40], "big"), int.from_bytes(data[40:48], "big")
    assert l1_size > 8192, "more than one cluster"
    made = tmp_path / "a.qcow2"
    made.write_bytes(data)
    checked(made)
    for index in indexes:
        length = length_of(index, size)
        qemu_io(made, f"read -P {1 + index % 200} {index * BLOCK_SIZE} {length}")
    source = Source(data)
    stream = await open_qcow2_stream(source, is_differencing=True)
    assert source.read > l1_offset + 8 * l1_size, "all tables, and nothing is guessed"
    assert not stream.partial
    assert {index: set(block) for index, block in (await blocks_of(stream)).items()} == {
        index: {1 + index % 200} | ({0} if length_of(index, size) < BLOCK_SIZE else set())
        for index in indexes
    }


async def test_l2_tables_in_any_order() -> None:
    clusters: dict[int, bytes | None] = {n: filled(n, 4096) for n in [0, 511, 512, 1500]}
    data = bytearray(image(6 * MIB, clusters, bits=12))
    l1 = int.from_bytes(data[40:48], "big")
    first, last = data[l1 : l1 + 8], data[l1 + 16 : l1 + 24]
    data[l1 : l1 + 8], data[l1 + 16 : l1 + 24] = last, first
    one, other = (int.from_bytes(entry, "big") & ~COPIED for entry in (first, last))
    assert other == one + 8192
    data[one : one + 4096], data[other : other + 4096] = (
        data[other : other + 4096],
        data[one : one + 4096],
    )
    assert await whole(await opened(bytes(data))) == flat(6 * MIB, clusters, 12)


async def test_a_partial_block_without_parent_is_refused() -> None:
    clusters: dict[int, bytes | None] = {n: filled(n) for n in [*range(32), 40]}
    stream = await opened(image(6 * MIB, clusters), is_differencing=True)
    assert list(stream.blocks) == [0, 1]
    assert list(stream.partial) == [1]
    pool = block_pool(3)
    async with stream.read(pool) as reader:
        block = await reader.next()
        assert block is not None
        assert block.index == 0
        block.buffer.release()
        with pytest.raises(Corrupt, match="block 1 ") as caught:
            await reader.next()
    assert caught.value.data["what"] == "partial block"
    assert pool.in_use == 0


async def test_a_block_that_is_in_no_disk_of_the_chain() -> None:
    """The chain's full disk may lack it: then it is zeros.  A chain without one cannot say."""
    clusters = {40: filled(40)}
    full, child = RawDisk(bytes(6 * MIB), []), RawDisk(bytes(6 * MIB), [], is_differencing=True)
    stream = await opened(image(6 * MIB, clusters), is_differencing=True)
    stream.parent = Chain([full, child])
    assert await whole(stream) == flat(6 * MIB, clusters)
    stream = await opened(image(6 * MIB, clusters), is_differencing=True)
    stream.parent = Chain([child])
    with pytest.raises(Corrupt, match="not in a parent"):
        await blocks_of(stream)


async def test_an_error_of_the_parent_comes_out_as_it_is() -> None:
    class Broken(RawDisk):
        async def read_block(self, index: int, into: memoryview) -> None:
            raise Unreachable("the remote is gone")

    stream = await opened(image(2 * MIB, {3: filled(3)}), is_differencing=True)
    stream.parent = Broken(bytes(2 * MIB), [0])
    with pytest.raises(Unreachable, match="gone"):
        await blocks_of(stream)


async def test_a_backing_file_makes_it_differencing() -> None:
    data = image(2 * MIB, {0: filled(0)}, backing=b"base.qcow2")
    assert (await opened(data)).is_differencing
    assert not (await opened(image(2 * MIB, {0: filled(0)}))).is_differencing
    with pytest.raises(Corrupt, match="full export") as caught:
        await opened(data, is_differencing=False)
    assert caught.value.data["what"] == "backing file"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("bits", [9, 16, 21])
async def test_images_made_by_hand_are_what_qemu_takes_them_for(
    version: int, bits: int, tmp_path: Path
) -> None:
    """So that the reader is not tested against a mistake of its tests."""
    size = 5 * MIB + 512
    total = -(-size >> bits)
    clusters: dict[int, bytes | None] = {
        n: filled(n, 1 << bits) for n in {0, 1, total // 2, total - 1}
    }
    if version == 3 and total > 8:
        clusters[5] = None
    made = tmp_path / "a.qcow2"
    made.write_bytes(image(size, clusters, bits=bits, version=version, gaps={total // 2}))
    checked(made)
    assert qemu_reads(made) == flat(size, clusters, bits)


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on,refcount_bits=1",
        "compat=1.1,cluster_size=4096",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,refcount_bits=64,compression_type=zstd",
    ],
)
@pytest.mark.parametrize("size", [2 * MIB, 7 * MIB + 64 * KIB, 9 * MIB + 3 * 512])
async def test_what_qemu_wrote(options: str, size: int, tmp_path: Path) -> None:
    if "4096" in options:
        size = min(size, 2 * MIB)  # QEMU puts the next L2 table behind the data of the first
    raw, made = tmp_path / "a.raw", tmp_path / "a.qcow2"
    noise = random.Random(1)
    disk = bytearray(size)
    for start in range(0, size, 256 * KIB):
        if noise.random() < 0.5:
            disk[start : start + 256 * KIB] = noise.randbytes(min(256 * KIB, size - start))
    disk[-512:] = noise.randbytes(512)
    raw.write_bytes(disk)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, made)
    stream = await opened(made.read_bytes())
    assert await whole(stream) == disk


async def test_clusters_of_zeros_that_qemu_wrote(tmp_path: Path) -> None:
    """In a differencing image they hide the parent; a discarded one shows it."""
    base, made = tmp_path / "base.raw", tmp_path / "a.qcow2"
    base.write_bytes(b"\x11" * (4 * MIB))
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", made)
    qemu_io(made, "write -P 0x22 64k 128k", "write -z 256k 64k", "write -z 2M 2M")
    stream = await opened(made.read_bytes())
    assert stream.is_differencing
    assert list(stream.blocks) == [0, 1]
    assert list(stream.partial) == [0]
    stream.parent = RawDisk(base.read_bytes(), [0, 1])
    assert await whole(stream) == qemu_reads(made)


async def test_an_image_that_cannot_be_read_forward(tmp_path: Path) -> None:
    """QEMU writes where it pleases; a pool's stream never looks like that."""
    made = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", made, "1G")
    qemu_io(made, "write -P 1 1M 64k", "write -P 2 0 64k")
    with pytest.raises(Corrupt) as caught:
        await opened(made.read_bytes())
    assert caught.value.data["what"] == "cluster order"
    made.unlink()
    qemu_img("create", "-f", "qcow2", made, "1G")
    qemu_io(made, "write -P 1 0 64k", "write -P 2 600M 64k")
    with pytest.raises(Corrupt) as caught:
        await opened(made.read_bytes())
    assert caught.value.data["what"] == "cluster order"


async def test_a_stream_that_is_cut_anywhere() -> None:
    data = image(5 * MIB, {0: filled(0), 1: None, 40: filled(40), 79: filled(79)})
    for end in [0, 1, 103, 104, 65535, *range(CLUSTER, len(data), CLUSTER), len(data) - 1]:
        with pytest.raises(Corrupt) as caught:
            await blocks_of(await opened(data[:end], is_differencing=False))
        assert caught.value.data == {"what": "stream cut", "offset": end}


async def test_an_end_that_the_source_does_not_confirm() -> None:
    source = Source(image(2 * MIB, {0: filled(0)}), error=Unreachable("the export failed"))
    stream = await open_qcow2_stream(source)
    pool = block_pool(2)
    async with stream.read(pool) as reader:
        block = await reader.next()
        assert block is not None
        block.buffer.release()
        with pytest.raises(Unreachable, match="failed"):
            await reader.next()


async def test_what_follows_the_last_cluster_is_read_before_the_end() -> None:
    source = Source(image(2 * MIB, {0: filled(0)}) + bytes(3 * CLUSTER))
    await blocks_of(await open_qcow2_stream(source))
    assert source.finished


async def test_an_error_of_the_pool_instead_of_an_image() -> None:
    with pytest.raises(Corrupt, match="invalid HTTP header"):
        await opened(b"HTTP/1.1 500 Internal Server Error\r\n".ljust(300, b"."))


async def test_an_empty_disk() -> None:
    for data in (image(3 << 40, {}), image(0, {})):
        source = Source(data)
        stream = await open_qcow2_stream(source, is_differencing=True)
        assert await blocks_of(stream) == {}
        assert source.finished


async def test_leaving_early_and_cancel_give_everything_back() -> None:
    data = image(64 * MIB, {n: filled(n) for n in range(1024)})
    stream = await opened(data)
    pool = block_pool(6)
    async with stream.read(pool) as reader:
        block = await reader.next()
        assert block is not None
        block.buffer.release()
    assert pool.in_use == 0
    stream = await opened(data)
    with trio.CancelScope() as scope:
        async with stream.read(pool) as reader:
            block = await reader.next()
            assert block is not None
            block.buffer.release()
            scope.cancel()
            await reader.next()
    assert scope.cancelled_caught
    assert pool.in_use == 0


@pytest.mark.parametrize("count", [1, 2])
async def test_few_buffers_are_enough(count: int) -> None:
    clusters: dict[int, bytes | None] = {n: filled(n) for n in range(0, 320, 3)}
    stream = await opened(image(20 * MIB, clusters), is_differencing=True)
    stream.parent = RawDisk(bytes(20 * MIB), range(10))
    assert len(await blocks_of(stream, count)) == 10


# Writing


def content(size: int, indexes: Sequence[int]) -> bytes:
    disk = bytearray(size)
    noise = random.Random(size)
    for index in indexes:
        length = length_of(index, size)
        start = index * BLOCK_SIZE
        disk[start : start + length] = noise.randbytes(length)
    return bytes(disk)


def padded(disk: bytes) -> bytes:
    """To whole clusters."""
    return disk + bytes(-len(disk) % CLUSTER)


@pytest.mark.parametrize(
    ("size", "indexes"),
    [
        (10 * MIB, [0, 4]),
        (10 * MIB, []),
        (512, [0]),
        (64 * KIB + 512, [0]),
        (9 * MIB + 3 * 512, [1, 4]),
        (9 * MIB + 64 * KIB, [4]),
        (2 * MIB, [0]),
    ],
)
async def test_qemu_takes_what_is_sent(size: int, indexes: list[int], tmp_path: Path) -> None:
    disk = content(size, indexes)
    made = tmp_path / "a.qcow2"
    made.write_bytes(await sent(RawDisk(disk, indexes)))
    told = checked(made)
    assert told["image-end-offset"] == made.stat().st_size, "nothing behind the last cluster"
    clusters = sum(-(-length_of(index, size) // CLUSTER) for index in indexes or [0])
    assert told["allocated-clusters"] == clusters
    assert qemu_reads(made) == padded(disk)


async def test_the_worked_example() -> None:
    """Byte for byte what Xen Orchestra writes for this disk."""
    stream = await sent(RawDisk(content(10 * MIB, [0, 4]), [0, 4]))
    assert len(stream) == 4_521_984
    head = "514649fb00000002 0000000000000000 00000000 00000010 0000000000a00000 00000000"
    head += "00000001 0000000000030000 0000000000010000 00000001"
    assert stream[:60] == bytes.fromhex(head)
    assert stream[0x10000:0x10008].hex() == "0000000000020000"
    assert stream[0x20000:0x2008C] == b"\0\1" * 69 + b"\0\0"
    assert stream[0x30000:0x30010].hex() == "8000000000040000" + 16 * "0"
    assert stream[0x40000:0x40010].hex() == "8000000000050000" + "8000000000060000"
    assert stream[0x40000 + 8 * 128 : 0x40008 + 8 * 128].hex() == "8000000000250000"


@pytest.mark.parametrize("size", [3 << 40, 16 << 40])
async def test_a_huge_sparse_disk(size: int, tmp_path: Path) -> None:
    last = block_count(size) - 1
    indexes = [0, 1000, last // 2, last]

    class Sparse(RawDisk):
        def __init__(self) -> None:
            self.virtual_size = size
            self.is_differencing = False
            self.blocks = Blocks.of(indexes, last + 1)

        async def read_block(self, index: int, into: memoryview) -> None:
            await trio.lowlevel.checkpoint()
            into[BITMAP_SIZE:] = bytes([1 + index % 200]) * BLOCK_SIZE

    made = tmp_path / "a.qcow2"
    data = await sent(Sparse())
    made.write_bytes(data)
    checked(made)
    for index in indexes:
        qemu_io(made, f"read -P {1 + index % 200} {index * BLOCK_SIZE} 2M")
    told = qemu_img("map", "--output=json", made)
    assert told.count('"data": true') == len(indexes)
    # clusters so large that the L1 table is a single one: XAPI counts each from zero
    l1_size = int.from_bytes(data[36:40], "big")
    assert 8 * l1_size <= 1 << data[23]
    stream = await opened(data)
    assert stream.virtual_size == size
    assert {index: block[0] for index, block in (await blocks_of(stream)).items()} == {
        index: 1 + index % 200 for index in indexes
    }


async def test_the_union_of_a_chain_is_sent_in_order(tmp_path: Path) -> None:
    """Weakness of Xen Orchestra: the union of a chain comes unsorted, and its writer throws."""
    size = 14 * MIB
    full = RawDisk(b"\x01" * size, [5])
    first = RawDisk(b"\x02" * size, [0, 3], is_differencing=True)
    second = RawDisk(b"\x03" * size, [4, 3], is_differencing=True)
    made = tmp_path / "a.qcow2"
    made.write_bytes(await sent(Chain([full, first, second])))
    checked(made)
    disk = qemu_reads(made)
    assert [disk[index * BLOCK_SIZE] for index in range(7)] == [2, 0, 0, 3, 3, 1, 0]
    stream = await opened(made.read_bytes())
    assert await whole(stream) == disk


async def test_a_disk_with_an_order_of_its_own(tmp_path: Path) -> None:
    """Streams may have any order; the last block, which is shorter, may be the first."""
    size = 9 * MIB + 512
    disk = content(size, [0, 1, 3, 4])
    made = tmp_path / "a.qcow2"
    made.write_bytes(await sent(OrderedDisk(disk, [4, 1, 0, 3])))
    checked(made)
    assert qemu_reads(made) == padded(disk)


async def test_an_empty_disk_is_sent_with_one_block() -> None:
    """XAPI's import fails on an image without data.  In a delta it would hide the base."""
    stream = await opened(await sent(RawDisk(bytes(10 * MIB), [])))
    assert list(stream.blocks) == [0]
    assert await whole(stream) == bytes(10 * MIB)
    delta = await sent(RawDisk(bytes(10 * MIB), [], is_differencing=True))
    assert list((await opened(delta)).blocks) == []


async def test_a_disk_that_does_not_give_what_it_announced() -> None:
    class Short(OrderedDisk):
        def read(self, pool):  # type: ignore[no-untyped-def]
            return _InOrder(OrderedDisk(bytes(self.virtual_size), self._order[:-1]), pool)

    with pytest.raises(Corrupt, match="before its block 2"):
        await sent(Short(bytes(10 * MIB), [0, 2]))

    class Other(OrderedDisk):
        def read(self, pool):  # type: ignore[no-untyped-def]
            return _InOrder(OrderedDisk(bytes(self.virtual_size), [0, 3]), pool)

    with pytest.raises(ValueError, match="block 3"):
        await sent(Other(bytes(10 * MIB), [0, 2]))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20 * MIB // 512), st.sets(st.integers(0, 9)), st.booleans())
async def test_round_trips(sectors: int, indexes: set[int], is_differencing: bool) -> None:
    size = sectors * 512
    indexes = {index for index in indexes if index < block_count(size)}
    disk = content(size, sorted(indexes))
    made = RawDisk(disk, sorted(indexes), is_differencing=is_differencing)
    stream = await opened(await sent(made), is_differencing=is_differencing)
    assert stream.virtual_size == len(padded(disk))
    expected = indexes if is_differencing else indexes or {0}
    assert set(stream.blocks) == expected
    assert not stream.partial
    assert await whole(stream) == padded(disk)


# Hostile bytes


def damaged(noise: random.Random) -> bytes:
    """An image with a few changed bytes in its header, its L1 or its L2 table."""
    clusters: dict[int, bytes | None] = {n: filled(n) for n in [0, 1, 5, 31, 40, 62]}
    data = bytearray(image(4 * MIB, clusters | {7: None}, version=noise.choice([2, 3])))
    for _ in range(noise.randint(1, 3)):
        spot = noise.choice([0, 3 * CLUSTER, 4 * CLUSTER])
        at = spot + noise.randrange(104 if spot == 0 else 512)
        if 48 <= at < 72:
            continue  # reference counts and snapshots, which are not read here
        if noise.random() < 0.5:
            data[at] ^= 1 << noise.randrange(8)
        else:
            data[at] = noise.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
async def test_damaged_images_are_refused_or_read_as_qemu_does(seed: int, tmp_path: Path) -> None:
    noise = random.Random(seed)
    read = 0
    for _ in range(60):
        data = damaged(noise)
        try:
            stream = await opened(data)
            if stream.is_differencing:
                continue
            disk = await whole(stream) if stream.virtual_size < 64 * MIB else b""
        except Corrupt as error:
            if {"what", "offset"} <= set(error.data):
                continue
            raise
        made = tmp_path / "a.qcow2"
        made.write_bytes(data)
        if len(disk) == stream.virtual_size:
            read += 1
            assert qemu_reads(made) == disk
    assert read > 3


async def test_a_header_that_promises_too_much() -> None:
    """Nothing is allocated before it was sent."""
    data = bytearray(image(4 * MIB, {0: filled(0)}))
    data[24:32] = (64 << 40).to_bytes(8, "big")
    data[36:40] = (128 * 1024).to_bytes(4, "big")
    with pytest.raises(Corrupt) as caught:
        await opened(bytes(data))
    assert caught.value.data["what"] == "stream cut"
