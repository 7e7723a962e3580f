"""VHD streams: read from any pieces to a proven end, sent so that other tools read them."""

from __future__ import annotations

import tracemalloc
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import pytest
import pyvhdi
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.disks.chain import Chain
from proxy.disks.disk import Block, Blocks, block_pool
from proxy.disks.vhd_stream import open_vhd_stream, send_vhd, vhd_length
from proxy.errors import Corrupt, Refused, Unreachable, XapiError
from proxy.formats import vhd
from tests.disks.directories import MIB, MemoryDisk, content, everything, identity
from tests.disks.vhd_images import flat, image, qemu_reads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from proxy.disks.disk import Disk
    from proxy.runtime.buffers import BufferPool

SIZE = 9 * MIB + 512
ANSWER = b"HTTP/1.1 500 Internal Error\r\nContent-Length: 4000\r\n\r\n".ljust(4000, b"<")


class Source:
    """Bytes in pieces of at most ``most``; ``stops`` holds gates by how much was read."""

    def __init__(
        self,
        data: bytes,
        most: int = 1 << 20,
        *,
        error: Exception | None = None,
        stops: Mapping[int, trio.Event] | None = None,
    ) -> None:
        self.read = 0
        self.finished = 0
        self.stopped = trio.Event()
        self._data = memoryview(data)
        self._most = most
        self._error = error
        self._stops = dict(stops or {})

    async def read_into(self, view: memoryview, /) -> int:
        assert len(view) > 0
        await trio.lowlevel.checkpoint()
        for at in sorted(self._stops):
            if at <= self.read:
                self.stopped.set()
                await self._stops.pop(at).wait()
        count = min(len(view), self._most, len(self._data) - self.read)
        view[:count] = self._data[self.read : self.read + count]
        self.read += count
        return count

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        assert self.read == len(self._data), "not read to its end"
        self.finished += 1
        if self._error is not None:
            raise self._error


async def read(data: bytes, most: int = 1 << 20, pool: BufferPool | None = None) -> bytes:
    """The content; the source has confirmed its end."""
    source = Source(data, most)
    stream = await open_vhd_stream(source)
    found = await everything(stream, pool or block_pool(2))
    assert source.finished == 1
    assert list(found) == list(stream.order)
    return flat(found, stream.virtual_size)


async def refused(data: bytes, *, error: Exception | None = None) -> Corrupt:
    """The error of a stream that must not be taken for whole, after the blocks before it."""
    pool = block_pool(2)

    async def attempt() -> None:
        stream = await open_vhd_stream(Source(data, error=error))
        async with stream.read(pool) as reader:
            for _ in range(2):  # and it stays an error
                try:
                    while (block := await reader.next()) is not None:
                        block.buffer.release()
                except Corrupt as problem:
                    first = problem
            raise first

    with pytest.raises(Corrupt) as caught:
        await attempt()
    assert pool.in_use == 0
    return caught.value


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"gap": b"tdbatmap".ljust(1024, b"\x11")},
    {"before_table": b"locator".ljust(1536, b"\x22")},
    {"blank": 512},
    {"blank": 200 * 1024},
    {"spare_entries": 300},
    {"padding": b"\x33"},
    {"padding": b""},
    {"padding": b"", "blank": 512},
]


@pytest.mark.parametrize("more", LAYOUTS, ids=lambda more: "-".join(more) or "plain")
@pytest.mark.parametrize("order", [(0, 2, 4), (4, 2, 0), (3, 4, 1), ()], ids=str)
async def test_blocks_come_in_the_order_of_the_stream(
    order: tuple[int, ...], more: dict[str, Any]
) -> None:
    blocks = {index: content(index + 1) for index in order}
    data = image(SIZE, blocks, **more)
    stream = await open_vhd_stream(Source(data))
    assert tuple(stream.order) == order
    assert list(stream.blocks) == sorted(order)
    assert stream.virtual_size == SIZE
    assert not stream.is_differencing
    assert await read(data) == flat(blocks, SIZE)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3000) | st.sampled_from([511, 512, 513, 4095, 65537, 2 * MIB + 512]))
async def test_pieces_of_any_size(most: int) -> None:
    size = 20 * 1024
    blocks = {0: content(1)[:size]}
    assert await read(image(size, blocks, padding=b""), most) == flat(blocks, size)


async def test_what_another_tool_writes_is_read(tmp_path: Path) -> None:
    raw = tmp_path / "b.raw"
    raw.write_bytes(flat({1: content(5), 3: content(6)}, 8 * MIB))
    words = ["qemu-img", "convert", "-f", "raw", "-O", "vpc"]
    options = ["-o", "subformat=dynamic,force_size=on"]
    await trio.run_process([*words, *options, str(raw), str(tmp_path / "b.vhd")])
    assert await read((tmp_path / "b.vhd").read_bytes()) == raw.read_bytes()


async def test_a_differencing_stream_says_so_and_reads_its_own_blocks() -> None:
    data = image(SIZE, {3: content(1)}, differencing=True)
    stream = await open_vhd_stream(Source(data))
    assert stream.is_differencing
    assert stream.header.parent_uuid == identity(2)
    assert await everything(stream, block_pool(2)) == {3: content(1)}


async def test_a_stream_is_read_once() -> None:
    stream = await open_vhd_stream(Source(image(SIZE, {3: content(1)})))
    assert await everything(stream, block_pool(2)) == {3: content(1)}
    with pytest.raises(ValueError, match="only once"):
        stream.read(block_pool(2))


# The end


@pytest.mark.parametrize("missing", [1, 511, 512])
@pytest.mark.parametrize("blank", [0, 1024])
async def test_weakness_12_a_stream_cut_behind_its_last_block_is_not_whole(
    missing: int, blank: int
) -> None:
    data = image(SIZE, {0: content(1), 3: content(2)}, blank=blank)
    problem = await refused(data[:-missing])
    assert problem.data["what"] == "end footer"
    assert len(data) - 1024 <= problem.data["offset"] <= len(data) - missing


@pytest.mark.parametrize("indexes", [(), (0, 4), (4, 0)])
@pytest.mark.parametrize("padding", [None, b""])
async def test_a_stream_cut_anywhere_is_not_whole(
    indexes: Sequence[int], padding: bytes | None
) -> None:
    data = image(SIZE, {index: content(index) for index in indexes}, padding=padding)
    places = {0, 1, 511, 512, 1535, 1536, 1540, 1556, 2047, 2048, 2049, 2560, 2561}
    places |= {2048 + vhd.STORED_BLOCK + step for step in (-1, 0, 1, 512, 513)}
    places |= {len(data) - step for step in (1, 100, 511, 512, 513, 1024)}
    for place in sorted(places):
        if place < len(data):
            what = (await refused(data[:place])).data["what"]
            assert what == "stream cut" or (what == "end footer" and place >= len(data) - 1024)


async def test_the_sources_reason_for_a_cut_is_the_one_to_tell() -> None:
    reason = XapiError("VDI_IO_ERROR", ["the disk"])
    data = image(SIZE, {0: content(1)})
    for place in (100, 1600, 3 * 1024 * 512, len(data) - 512, len(data) - 1):
        source = Source(data[:place], error=reason)
        with pytest.raises(XapiError) as caught:
            await everything(await open_vhd_stream(source), block_pool(2))
        assert caught.value is reason


async def test_a_whole_stream_that_the_source_does_not_confirm_has_no_end() -> None:
    """The blocks come; the end does not."""
    gone = Unreachable("the task ended in failure")
    stream = await open_vhd_stream(Source(image(SIZE, {0: content(1)}), error=gone))
    pool = block_pool(2)
    async with stream.read(pool) as reader:
        block = await reader.next()
        assert block is not None
        assert block.data == content(1)
        block.buffer.release()
        for _ in range(2):
            with pytest.raises(Unreachable):
                await reader.next()
    assert pool.in_use == 0


@pytest.mark.parametrize("indexes", [(), (0, 3)])
async def test_the_footer_at_the_end_is_the_one_at_the_start(indexes: Sequence[int]) -> None:
    data = bytearray(image(SIZE, {index: content(index) for index in indexes}))
    other = vhd.Footer.make(SIZE, vhd.DiskType.DYNAMIC, identity(1), timestamp=5).pack()
    assert (await refused(bytes(data[:-512]) + other)).data == {
        "what": "end footer",
        "offset": len(data) - 512,
    }
    data[-1] ^= 1
    assert (await refused(bytes(data))).data["what"] == "end footer"


@pytest.mark.parametrize("indexes", [(), (0, 3)])
@pytest.mark.parametrize("more", [b"\0", b"\1", bytes(512), b"x" * 512, bytes(1 << 17)])
async def test_nothing_follows_the_footer(indexes: Sequence[int], more: bytes) -> None:
    data = image(SIZE, {index: content(index) for index in indexes})
    assert (await refused(data + more)).data["what"] == "end footer"


@pytest.mark.parametrize("more", [b"\0", b"x" * 512, b"x" + bytes(1023), bytes(100_000) + b"xx"])
async def test_nothing_but_zeros_comes_before_the_footer(more: bytes) -> None:
    data = image(SIZE, {0: content(1), 3: content(2)})
    assert (await refused(data[:-512] + more + data[-512:])).data["what"] == "end footer"


@pytest.mark.parametrize("length", [13, 400, 4000])
@pytest.mark.parametrize("blank", [0, 512, 100_000])
async def test_an_answer_where_a_footer_should_be_is_the_hosts_error(
    length: int, blank: int
) -> None:
    """XAPI appends a second answer to a body that it cannot go on with."""
    answer = ANSWER[:length]
    if blank == 0:
        assert (await refused(answer)).data == {"what": "HTTP answer", "offset": 0}
    for indexes in ((), (0, 3), (0, 4)):
        data = image(SIZE, {index: content(index) for index in indexes}, blank=blank)
        if not indexes and length + blank > 1000:
            continue  # without blocks nothing tells where the footer should be
        problem = await refused(data[:-512] + answer)
        assert problem.data["what"] == "HTTP answer"
        assert "the host answered an error" in problem.message
        assert "HTTP/1.1 500"[:length] in problem.message
        assert "<<" not in problem.message


# The middle


async def test_sectors_that_a_block_lacks() -> None:
    bitmap = b"\x0f" + b"\xff" * 511
    expected = bytes(4 * 512) + content(1)[4 * 512 :]
    data = image(SIZE, {1: content(1)}, bitmaps={1: bitmap})
    assert await read(data) == flat({1: expected}, SIZE)
    delta = image(SIZE, {0: content(2), 1: content(1)}, bitmaps={1: bitmap}, differencing=True)
    assert (await refused(delta)).data == {
        "what": "partial block",
        "sector": 0,
        "block": 1,
        "offset": 2048 + vhd.STORED_BLOCK,
    }


def with_entry(data: bytes, index: int, sector: int) -> bytes:
    at = 1536 + 4 * index
    return data[:at] + sector.to_bytes(4, "big") + data[at + 4 :]


@pytest.mark.parametrize(
    ("index", "sector"), [(0, 3), (0, 0), (1, 4), (1, 5), (1, 4 + 4096), (3, 4 + 4096)]
)
async def test_blocks_over_something_else_are_refused_at_once(index: int, sector: int) -> None:
    data = with_entry(image(SIZE, {0: content(1), 3: content(2)}), index, sector)
    with pytest.raises(Corrupt) as caught:
        await open_vhd_stream(Source(data))
    assert caught.value.data["what"] == "block place"


async def test_a_table_behind_blocks_cannot_be_streamed() -> None:
    footer = vhd.Footer.make(SIZE, vhd.DiskType.DYNAMIC, identity(1), timestamp=1).pack()
    header = vhd.Header(max_entries=5, table_offset=2048 + vhd.STORED_BLOCK).pack()
    table = (4).to_bytes(4, "big").ljust(512, b"\xff")
    data = footer + header + bytes(512) + vhd.FULL_BITMAP + content(1) + table + footer
    with pytest.raises(Corrupt) as caught:
        await open_vhd_stream(Source(data))
    assert caught.value.data["what"] == "block place"
    assert "before the table" in caught.value.message


async def test_a_table_costs_memory_only_as_it_comes() -> None:
    """A header may announce 256 MiB of it."""
    size = vhd.MAX_ENTRIES * vhd.BLOCK_SIZE
    footer = vhd.Footer.make(size, vhd.DiskType.DYNAMIC, identity(1), timestamp=1).pack()
    head = footer + vhd.Header(max_entries=vhd.MAX_ENTRIES).pack()
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match="ends at byte"):
            await open_vhd_stream(Source(head + b"\xff" * 4096))
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


async def test_more_blocks_than_a_file_has_room_for_are_not_even_sorted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vhd, "MAX_BLOCKS", 100)
    size = 101 * vhd.BLOCK_SIZE
    footer = vhd.Footer.make(size, vhd.DiskType.DYNAMIC, identity(1), timestamp=1).pack()
    head = footer + vhd.Header(max_entries=101).pack()
    with pytest.raises(Corrupt, match="101 blocks cannot lie in one file"):
        await open_vhd_stream(Source(head + bytes(512)))


@settings(deadline=None, max_examples=50)
@given(
    place=st.integers(0, 2100) | st.integers(2048 + vhd.STORED_BLOCK, 2600 + vhd.STORED_BLOCK),
    change=st.binary(min_size=1, max_size=600) | st.just(b""),
    count=st.integers(0, 600),
)
async def test_no_bytes_raise_anything_but_corrupt(place: int, change: bytes, count: int) -> None:
    """Some bytes replaced by some others: refused, or the same disk."""
    data = image(2 * MIB, {0: content(1)})
    changed = data[:place] + change + data[place + count :]
    pool = block_pool(2)
    problem, found = None, b""
    try:
        found = await read(changed, pool=pool)
    except Corrupt as error:
        problem = error
    if problem is not None:
        assert problem.data["what"]
        assert problem.data["offset"] >= 0
    else:
        expected = bytearray(content(1))
        for sector in range(4096):  # a lost bit is a sector of zeros
            if not changed[2048 + sector // 8] & 0x80 >> sector % 8:
                expected[sector * 512 : sector * 512 + 512] = bytes(512)
        start = max(place - 2560, 0)
        end = max(place + len(change) - 2560, 0)
        expected[start:end] = changed[2560 + start : 2560 + end]
        assert found == bytes(expected[: 2 * MIB])
    assert pool.in_use == 0


# Reading ahead, and leaving


async def test_the_next_block_is_read_while_one_is_held() -> None:
    source = Source(image(20 * MIB, {index: content(index) for index in range(10)}))
    stream = await open_vhd_stream(source)
    pool = block_pool(3)
    async with stream.read(pool) as reader:
        block = await reader.next()
        assert block is not None
        await trio.testing.wait_all_tasks_blocked()
        assert source.read == 2048 + 3 * vhd.STORED_BLOCK, "as far as the pool goes"
        assert pool.in_use == 3
        block.buffer.release()
    assert pool.in_use == 0


STOPS = {
    "the first block": 2048,
    "the middle of a block": 2048 + 100_000,
    "the second block": 2048 + vhd.STORED_BLOCK,
    "the footer": 2048 + 3 * vhd.STORED_BLOCK,
    "the end": 2560 + 3 * vhd.STORED_BLOCK,
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
async def test_a_cancel_while_waiting_for_anything(stop: int, *, held: bool) -> None:
    data = image(6 * MIB, {0: content(1), 1: content(2), 2: content(3)})
    source = Source(data, most=100_000, stops={stop: trio.Event()})
    pool = block_pool(5)

    async def reading() -> None:
        stream = await open_vhd_stream(source)
        async with stream.read(pool) as reader:
            if held:  # the consumer is busy with something else
                await trio.sleep_forever()
            while (block := await reader.next()) is not None:
                block.buffer.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading)
        await source.stopped.wait()
        nursery.cancel_scope.cancel()
    assert pool.in_use == 0
    assert source.finished == 0


async def test_a_cancel_while_the_pool_is_empty() -> None:
    stream = await open_vhd_stream(Source(image(6 * MIB, {0: content(1), 1: content(2)})))
    pool = block_pool(1)
    async with trio.open_nursery() as nursery:
        async with stream.read(pool) as reader:
            block = await reader.next()
            assert block is not None
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert pool.in_use == 1
    block.buffer.release()


async def test_leaving_early_gives_back_what_was_read_ahead() -> None:
    stream = await open_vhd_stream(
        Source(image(20 * MIB, {index: content(index) for index in range(10)}))
    )
    pool = block_pool(8)
    async with stream.read(pool):
        await trio.testing.wait_all_tasks_blocked()
        assert pool.in_use > 1
    assert pool.in_use == 0


# Sending


class StreamedDisk(MemoryDisk):
    """Gives other blocks, or in another order, than it says."""

    def __init__(self, given_order: Sequence[int], said: Sequence[int], count: int) -> None:
        super().__init__({index: index + 1 for index in said}, count)
        self._given = given_order
        self._said = said

    @property
    def order(self) -> Sequence[int]:
        return self._said

    def read(self, pool: BufferPool) -> Any:
        return _Reading(self, self._given, pool)


class _Reading:
    def __init__(self, disk: MemoryDisk, order: Sequence[int], pool: BufferPool) -> None:
        self._disk, self._left, self._pool = disk, iter(order), pool

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def next(self) -> Block | None:
        if (index := next(self._left, None)) is None:
            return None
        buffer = await self._pool.acquire()
        buffer.memory[vhd.BITMAP_SIZE :] = bytes([index + 1]) * vhd.BLOCK_SIZE
        buffer.length = vhd.STORED_BLOCK
        return Block(index, buffer)


async def sent(disk: Disk, pool: BufferPool | None = None) -> bytes:
    stream = bytearray()

    async def sink(view: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        stream.extend(view)

    pool = pool or block_pool(3)
    await send_vhd(disk, pool, sink, uuid=identity(1), timestamp=1_700_000_000)
    assert pool.in_use == 0
    assert len(stream) == vhd_length(disk)
    return bytes(stream)


def filled(*indexes: int) -> dict[int, bytes]:
    return {index: bytes([index + 1]) * vhd.BLOCK_SIZE for index in indexes}


async def test_the_worked_stream() -> None:
    """A disk of 10 MiB with its first and its last block, in either order."""
    straight = await sent(MemoryDisk({0: 1, 4: 5}, 5))
    assert len(straight) == 4_197_888
    assert straight[1536:1556] == bytes.fromhex("00000004 ffffffff ffffffff ffffffff 00001005")
    assert straight == image(10 * MIB, filled(0, 4))
    turned = await sent(StreamedDisk([4, 0], [4, 0], 5))
    assert turned[1536:1556] == bytes.fromhex("00001005 ffffffff ffffffff ffffffff 00000004")
    assert turned == image(10 * MIB, filled(4, 0))
    assert len(await sent(MemoryDisk({}, 5))) == 2560


async def test_what_is_sent_is_what_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(await sent(MemoryDisk({0: 1, 3: 4}, 4)))
    expected = flat(filled(0, 3), 8 * MIB)
    assert await qemu_reads(path) == expected
    file = pyvhdi.file()
    file.open(str(path))
    assert file.read(8 * MIB) == expected
    file.close()


async def test_a_chain_is_sent_as_one_disk_and_a_delta_as_a_delta(tmp_path: Path) -> None:
    full = MemoryDisk({0: 1, 1: 2}, 4)
    delta = MemoryDisk({1: 3, 3: 4}, 4, is_differencing=True)
    whole = {0: b"\1" * 2 * MIB, 1: b"\3" * 2 * MIB, 3: b"\4" * 2 * MIB}
    path = tmp_path / "a.vhd"
    path.write_bytes(await sent(Chain([full, delta])))
    assert await qemu_reads(path) == flat(whole, 8 * MIB)
    stream = await open_vhd_stream(Source(await sent(delta)))
    assert stream.is_differencing
    assert await everything(stream, block_pool(2)) == {1: whole[1], 3: whole[3]}


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(0, 4), st.booleans())
async def test_round_trips(order: list[int], count: int, is_differencing: bool) -> None:
    chosen = order[:count]
    data = image(8 * MIB, {index: content(index) for index in chosen}, differencing=is_differencing)
    stream = await open_vhd_stream(Source(data))
    again = await open_vhd_stream(Source(await sent(stream)))
    assert list(again.order) == chosen
    assert again.is_differencing == is_differencing
    assert await everything(again, block_pool(2)) == {index: content(index) for index in chosen}


@pytest.mark.parametrize(
    ("given_order", "said", "error"),
    [
        ([1, 0], [0, 1], ValueError),
        ([0, 0], [0, 1], ValueError),
        ([0, 1, 2], [0, 1], ValueError),
        ([0], [0, 1], Corrupt),
        ([], [0], Corrupt),
    ],
)
async def test_a_disk_that_is_not_what_it_said_gets_no_footer(
    given_order: list[int], said: list[int], error: type[Exception]
) -> None:
    """Its blocks would stand at each other's places, or their places hold nothing."""
    pieces: list[int] = []

    async def sink(view: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        pieces.append(len(view))

    pool = block_pool(2)
    disk = StreamedDisk(given_order, said, 4)
    with pytest.raises(error):
        await send_vhd(disk, pool, sink, uuid=identity(1), timestamp=1)
    assert 512 not in pieces
    assert pool.in_use == 0


class _Huge(MemoryDisk):
    """More blocks than a table can place."""

    def __init__(self) -> None:
        super().__init__({}, vhd.MAX_BLOCKS)
        self.blocks = Blocks.everything(vhd.MAX_BLOCKS)


async def test_more_than_a_vhd_holds_is_refused_before_a_byte() -> None:
    async def sink(view: memoryview) -> None:
        raise AssertionError(f"{len(view)} bytes sent")

    with pytest.raises(Refused) as caught:
        await send_vhd(_Huge(), block_pool(1), sink, uuid=identity(1), timestamp=1)
    assert caught.value.code == "EFBIG"


@pytest.mark.parametrize("fails_at", range(4))
@pytest.mark.parametrize("by_cancel", [False, True], ids=["error", "cancel"])
async def test_a_sink_that_ends_at_any_piece_leaves_no_buffer(
    fails_at: int, *, by_cancel: bool
) -> None:
    pool = block_pool(4)
    stood = trio.Event()
    pieces = 0

    async def sink(view: memoryview) -> None:
        nonlocal pieces
        await trio.lowlevel.checkpoint()
        assert len(view)
        if pieces == fails_at:
            stood.set()
            if not by_cancel:
                raise Unreachable("gone")
            await trio.sleep_forever()
        pieces += 1

    disk = MemoryDisk({0: 1, 2: 3}, 4)
    send: Callable[[], Any] = partial(send_vhd, disk, pool, sink, uuid=identity(1), timestamp=1)
    if by_cancel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await stood.wait()
            nursery.cancel_scope.cancel()
    else:
        with pytest.raises(Unreachable):
            await send()
    assert pieces == fails_at
    assert pool.in_use == 0
