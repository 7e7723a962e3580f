"""VHD files: written so that other tools read them, read as others write them."""

from __future__ import annotations

import tarfile
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pyvhdi
import trio
from dissect.hypervisor import vhd as dissect_vhd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.disks.chain import Chain
from proxy.disks.disk import block_pool, length_of
from proxy.disks.vhd_file import create_vhd_file, open_vhd_file
from proxy.disks.vhd_places import check_table
from proxy.errors import Conflict, Corrupt, Refused, Unreachable
from proxy.formats import vhd
from proxy.remotes.faults import Fail, Gate, Torn
from proxy.remotes.local import LocalRemote
from tests.disks.directories import MIB, content, everything, identity, opened, send, shape, tree
from tests.disks.vhd_images import flat, image, qemu_reads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from proxy.disks.writing import Shape
    from proxy.remotes.faults import Faults
    from proxy.runtime.buffers import BufferPool

FIXTURES = Path(__file__).parents[1] / "fixtures" / "disks"
SIZE = 9 * MIB + 512


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Faults]:
    async with opened(tmp_path) as faults:
        yield faults


async def store(
    remote: Faults,
    path: str,
    blocks: Mapping[int, bytes],
    *,
    pool: BufferPool | None = None,
    **more: Any,
) -> None:
    made: Shape = shape(list(blocks), **{"size": SIZE, **more})
    async with create_vhd_file(remote, path, made) as writer:
        cut = {index: data[: length_of(index, made.virtual_size)] for index, data in blocks.items()}
        await send(writer, cut, pool or block_pool(3))
        await writer.commit()


async def read(remote: Faults, path: str = "a.vhd", *, check_end: bool = True) -> bytes:
    async with open_vhd_file(remote, path, check_end=check_end) as disk:
        return flat(await everything(disk, block_pool(4)), disk.virtual_size)


async def test_what_is_written_is_what_others_read(remote: Faults, tmp_path: Path) -> None:
    blocks = {3: content(3), 0: content(1), 4: content(4)}
    await store(remote, "a.vhd", blocks)
    expected = flat(blocks, SIZE)
    path = tmp_path / "a.vhd"
    assert path.stat().st_size == vhd.stream_size(5, 3)
    assert await qemu_reads(path) == expected
    file = pyvhdi.file()
    file.open(str(path))
    assert file.get_media_size() == SIZE
    assert file.read(SIZE) == expected
    file.close()
    with path.open("rb") as handle:
        assert dissect_vhd.VHD(handle).read(SIZE) == expected
    assert await read(remote) == expected


async def test_a_chain_is_what_others_read(remote: Faults, tmp_path: Path) -> None:
    await store(remote, "20260101T000000Z.vhd", {0: content(1), 1: content(2)})
    await store(
        remote,
        "20260102T000000Z.vhd",
        {1: content(3), 4: content(4)},
        uuid=identity(2),
        is_differencing=True,
        parent_uuid=identity(1),
        parent_name="20260101T000000Z.vhd",
    )
    parent, child = pyvhdi.file(), pyvhdi.file()
    parent.open(str(tmp_path / "20260101T000000Z.vhd"))
    child.open(str(tmp_path / "20260102T000000Z.vhd"))
    assert child.get_parent_identifier() == str(identity(1))
    child.set_parent(parent)
    theirs = child.read(SIZE)
    async with (
        open_vhd_file(remote, "20260101T000000Z.vhd") as older,
        open_vhd_file(remote, "20260102T000000Z.vhd") as newer,
    ):
        ours = flat(await everything(Chain([older, newer]), block_pool(4)), SIZE)
    assert ours == theirs == flat({0: content(1), 1: content(3), 4: content(4)}, SIZE)
    child.close()
    parent.close()


async def test_recorded_disks_read_as_others_read_them(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "recorded-files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    names = sorted(tmp_path.glob("remote1/xo-vm-backups/*/vdis/*/*/*.vhd"))
    assert len(names) == 4
    async with opened(tmp_path) as remote:
        for older, newer in (names[0:2], names[2:4]):
            files = []
            for path in (older, newer):
                file = pyvhdi.file()
                file.open(str(path))
                files.append(file)
            files[1].set_parent(files[0])
            theirs = [file.read(file.get_media_size()) for file in files]
            paths = [str(path.relative_to(tmp_path)) for path in (older, newer)]
            async with open_vhd_file(remote, paths[0]) as a, open_vhd_file(remote, paths[1]) as b:
                assert b.is_differencing
                assert b.header.parent_uuid == a.uuid
                assert b.header.parent_name == older.name
                pool = block_pool(4)
                ours = [flat(await everything(d, pool), a.virtual_size) for d in (a, Chain([a, b]))]
            assert ours == theirs
            assert await qemu_reads(older) == ours[0]
            for file in reversed(files):
                file.close()


async def test_a_disk_of_another_tool_is_read(remote: Faults, tmp_path: Path) -> None:
    raw = tmp_path / "b.raw"
    raw.write_bytes(flat({1: content(5), 3: content(6)}, 8 * MIB))
    words = [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "vpc",
        "-o",
        "subformat=dynamic,force_size=on",
    ]
    await trio.run_process([*words, str(raw), str(tmp_path / "b.vhd")])
    assert await read(remote, "b.vhd") == raw.read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        {"gap": b"tdbatmap".ljust(1024, b"\x11")},
        {"before_table": b"locator".ljust(1536, b"\x22")},
        {"blank": 4096},
        {"padding": b""},
        {"padding": b"\x33"},
        {"spare_entries": 300},
    ],
    ids=lambda more: next(iter(more)),
)
async def test_what_other_tools_leave_between_and_behind(
    remote: Faults, tmp_path: Path, more: dict[str, Any]
) -> None:
    blocks = {2: content(1), 0: content(2), 4: content(3)}
    (tmp_path / "a.vhd").write_bytes(image(SIZE, blocks, **more))
    assert await read(remote) == flat(blocks, SIZE)
    assert await read(remote, check_end=False) == flat(blocks, SIZE)


async def test_a_table_behind_the_blocks_is_read(remote: Faults, tmp_path: Path) -> None:
    """Where a table goes that has become too small for its disk."""
    blocks = {1: content(1), 0: content(2)}
    raw = image(4 * MIB, blocks, spare_entries=0)
    table, body, end = raw[1536:2048], raw[2048:-512], raw[-512:]
    header = vhd.Header(max_entries=2, table_offset=2048 + len(body)).pack()
    (tmp_path / "a.vhd").write_bytes(end + header + bytes(512) + body + table + end)
    assert await read(remote) == flat(blocks, 4 * MIB)


async def test_sectors_that_a_block_lacks_are_zeros(remote: Faults, tmp_path: Path) -> None:
    """As the format says.  No writer that we know leaves anything but zeros there, and qemu,
    libvhdi and Xen Orchestra read what is there."""
    bitmap = b"\xf0\x01" + b"\xff" * 508 + b"\x7f\xfe"
    (tmp_path / "a.vhd").write_bytes(image(4 * MIB, {1: content(1)}, bitmaps={1: bitmap}))
    expected = bytearray(content(1))
    for lacking in [*range(4, 15), 4080, 4095]:
        expected[lacking * 512 : lacking * 512 + 512] = bytes(512)
    assert await read(remote) == flat({1: bytes(expected)}, 4 * MIB)


async def test_sectors_that_a_delta_lacks_are_not_guessed(remote: Faults, tmp_path: Path) -> None:
    bitmap = b"\xff" * 511 + b"\xfe"
    raw = image(6 * MIB, {0: content(1), 1: content(2)}, differencing=True, bitmaps={1: bitmap})
    (tmp_path / "a.vhd").write_bytes(raw)
    pool = block_pool(2)
    with pytest.raises(Corrupt) as caught:
        async with open_vhd_file(remote, "a.vhd") as disk:
            await everything(disk, pool)
    assert caught.value.data == {
        "what": "partial block",
        "sector": 4095,
        "block": 1,
        "offset": 2048 + vhd.STORED_BLOCK,
        "path": "a.vhd",
    }
    assert pool.in_use == 0
    buffer = await pool.acquire()
    assert buffer.memory[: vhd.BITMAP_SIZE] == vhd.FULL_BITMAP
    buffer.release()


async def test_sectors_behind_the_end_need_no_bit(remote: Faults, tmp_path: Path) -> None:
    size = 2 * MIB + 1024
    raw = image(size, {1: content(1)}, differencing=True, bitmaps={1: b"\xc0".ljust(512, b"\0")})
    (tmp_path / "a.vhd").write_bytes(raw)
    assert await read(remote) == flat({1: content(1)}, size)


async def test_a_block_that_is_not_there_is_not_read(remote: Faults, tmp_path: Path) -> None:
    (tmp_path / "a.vhd").write_bytes(image(6 * MIB, {1: content(1)}))
    stored = memoryview(bytearray(vhd.STORED_BLOCK))
    async with open_vhd_file(remote, "a.vhd") as disk:
        for index in (-1, 0, 2, 3):
            with pytest.raises(ValueError, match="has no block"):
                await disk.read_block(index, stored)


async def test_a_file_that_shrinks_while_it_is_read(remote: Faults, tmp_path: Path) -> None:
    (tmp_path / "a.vhd").write_bytes(image(6 * MIB, {1: content(1)}))
    async with open_vhd_file(remote, "a.vhd") as disk:
        with (tmp_path / "a.vhd").open("r+b") as file:
            file.truncate(2 * MIB)
        with pytest.raises(Corrupt, match="ends before") as caught:
            await disk.read_block(1, memoryview(bytearray(vhd.STORED_BLOCK)))
    assert caught.value.data["what"] == "block cut"


def _entry(index: int, sector: int) -> Callable[[bytearray], None]:
    def spoil(raw: bytearray) -> None:
        raw[1536 + 4 * index : 1540 + 4 * index] = sector.to_bytes(4, "big")

    return spoil


def _spoil_end(raw: bytearray) -> None:
    raw[-1] ^= 1


def _cut_sectors(raw: bytearray) -> None:
    """As many as leave a footer at the end."""
    del raw[-1024:-512]


def _cut_table(raw: bytearray) -> None:
    footer = vhd.Footer.make(2 << 40, vhd.DiskType.DYNAMIC, identity(1), timestamp=1).pack()
    raw[:] = footer + vhd.Header(max_entries=1 << 20).pack() + bytes(1024) + footer


def _lose_a_byte(raw: bytearray) -> None:
    del raw[3 * MIB]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_spoil_end, "end footer"),
        (_cut_sectors, "block place"),
        (_cut_table, "table cut"),
        (_lose_a_byte, "file size"),
        (_entry(0, 4 + 4097), "block place"),  # where another block is
        (_entry(0, 4 + 4096), "block place"),  # over its first sector
        (_entry(3, 4 + 4096), "block place"),
        (_entry(0, 3), "block place"),  # over the table
        (_entry(0, 0), "block place"),  # over the header
        (_entry(3, 4 + 4097 + 1), "block place"),  # over the footer at the end
        (_entry(0, 0xFFFFFFFE), "block place"),  # behind the end
    ],
)
async def test_a_damaged_file_says_what_and_where(
    remote: Faults, tmp_path: Path, spoil: Any, what: str
) -> None:
    await store(remote, "a.vhd", {0: content(1), 3: content(2)})
    raw = bytearray((tmp_path / "a.vhd").read_bytes())
    spoil(raw)
    (tmp_path / "a.vhd").write_bytes(raw)
    with pytest.raises(Corrupt) as caught:
        await read(remote)
    assert caught.value.data["what"] == what
    assert caught.value.data["path"] == "a.vhd"
    assert isinstance(caught.value.data["offset"], int)


async def test_of_an_unfinished_file_the_blocks_that_did_not_arrive_are_left_out(
    remote: Faults, tmp_path: Path
) -> None:
    blocks = {0: content(1), 2: content(2), 3: content(3)}
    raw = image(8 * MIB, blocks)
    (tmp_path / "a.vhd").write_bytes(raw[: -512 - 100])
    async with open_vhd_file(remote, "a.vhd", check_end=False) as disk:
        assert disk.misplaced == {3}
        assert list(disk.blocks) == [0, 2]
        found = flat(await everything(disk, block_pool(2)), 8 * MIB)
    del blocks[3]
    assert found == flat(blocks, 8 * MIB)


async def test_the_largest_tables_cost_what_they_hold(remote: Faults, tmp_path: Path) -> None:
    count = 1 << 20
    raw = image(2 * MIB, {0: content(1)})
    footer = vhd.Footer.make(2 << 40, vhd.DiskType.DYNAMIC, identity(1), timestamp=1).pack()
    header = vhd.Header(max_entries=count).pack()
    table = b"\xff" * (4 * count - 4) + ((1536 + 4 * count) // 512).to_bytes(4, "big")
    (tmp_path / "a.vhd").write_bytes(footer + header + table + raw[2048:-512] + footer)
    async with open_vhd_file(remote, "a.vhd") as disk:
        assert list(disk.blocks) == [count - 1]
        stored = memoryview(bytearray(vhd.STORED_BLOCK))
        await disk.read_block(count - 1, stored)
        assert stored[vhd.BITMAP_SIZE :] == content(1)


async def test_without_its_end_footer_only_who_asks_for_it_reads(
    remote: Faults, tmp_path: Path
) -> None:
    """A file that blocks are merged into has none."""
    await store(remote, "a.vhd", {0: content(1)})
    path = tmp_path / "a.vhd"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(Corrupt):
        await read(remote)
    assert await read(remote, check_end=False) == flat({0: content(1)}, SIZE)


# One changed byte, at the places of each part of a disk of three blocks, the second absent.
PARTS = {
    "footer": (0, 512),
    "header": (512, 1024),
    "table": (1536, 12),
    "padding": (1548, 500),
    "bitmap": (2048, 512),
    "data": (2560, 2 * MIB),
    "bitmap of the last": (2048 + vhd.STORED_BLOCK, 512),
    "end": (2048 + 2 * vhd.STORED_BLOCK, 512),
}


def after_change(raw: bytes, part: str, at: int, *, differencing: bool) -> bytes | None:
    """The content of the disk with a changed byte in ``part``; ``None``: it must be refused."""
    if part in ("footer", "header", "table", "end"):
        return None
    first, last = raw[2560 : 2560 + 2 * MIB], raw[2560 + vhd.STORED_BLOCK :][: 2 * MIB]
    if part.startswith("bitmap"):
        if differencing:
            return None
        data = bytearray(first if part == "bitmap" else last)
        start = PARTS[part][0]
        for sector in range(8 * (at - start), 8 * (at - start) + 8):
            if not raw[at] & 0x80 >> sector % 8:
                data[sector * 512 : sector * 512 + 512] = bytes(512)
        if part == "bitmap":
            first = bytes(data)
        else:
            last = bytes(data)
    return flat({0: first, 2: last}, 6 * MIB)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    part=st.sampled_from(sorted(PARTS)),
    place=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
    differencing=st.booleans(),
)
def test_a_changed_byte_is_refused_or_changes_what_it_is_in(
    tmp_path: Path, part: str, place: float, change: int, *, differencing: bool
) -> None:
    raw = bytearray(image(6 * MIB, {0: content(1), 2: content(2)}, differencing=differencing))
    start, length = PARTS[part]
    at = start + int(place * length)
    raw[at] ^= change
    (tmp_path / "a.vhd").write_bytes(raw)
    expected = after_change(bytes(raw), part, at, differencing=differencing)
    assert opened_and_read(tmp_path) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    place=st.integers(0, 2100) | st.integers(2049 + vhd.STORED_BLOCK, 2560 + vhd.STORED_BLOCK),
    count=st.integers(1, 1500),
    inserted=st.none() | st.binary(min_size=1, max_size=1) | st.just(b"\xff"),
)
def test_bytes_lost_or_gained_are_noticed(
    tmp_path: Path, place: int, count: int, inserted: bytes | None
) -> None:
    """Whole sectors gained behind the head are a gap, as other tools leave them."""
    raw = bytearray(image(4 * MIB, {0: content(1), 1: content(2)}))
    if inserted is None:
        del raw[place : place + count]
    else:
        count += count % 512 == 0
        raw[place:place] = inserted * count
    (tmp_path / "a.vhd").write_bytes(raw)
    assert opened_and_read(tmp_path) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.binary(max_size=4096), keep=st.integers(0, 2))
def test_no_bytes_raise_anything_but_corrupt(tmp_path: Path, data: bytes, keep: int) -> None:
    """Any bytes, some behind a footer and a header that are well."""
    head = image(4 * MIB, {})[:1536]
    (tmp_path / "a.vhd").write_bytes(head[: (0, 512, 1536)[keep]] + data)
    assert opened_and_read(tmp_path) is None


def opened_and_read(folder: Path) -> bytes | None:
    """What ``a.vhd`` reads as; ``None`` when it is refused."""

    async def check() -> bytes | None:
        async with opened(folder) as remote:
            try:
                return await read(remote)
            except Corrupt as error:
                refused = error
        assert refused.data["path"] == "a.vhd"
        assert refused.data["what"]
        assert refused.data["offset"] >= 0
        return None

    return trio.run(check)


def test_the_places_of_blocks_are_checked_in_any_order() -> None:
    header = vhd.Header(max_entries=3)
    block = vhd.STORED_BLOCK // 512
    check_table(array("I", [4 + block, vhd.UNUSED, 4]), header, 6 * MIB, None)
    with pytest.raises(Corrupt):
        check_table(array("I", [4 + block - 1, vhd.UNUSED, 4]), header, 6 * MIB, None)


async def test_blocks_must_come_as_announced(remote: Faults, tmp_path: Path) -> None:
    pool = block_pool(3)

    async def cut_short() -> None:
        async with create_vhd_file(remote, "a.vhd", shape([0, 2])) as writer:
            await send(writer, {0: content(1)}, pool)
            await writer.commit()

    with pytest.raises(ValueError, match="not the one announced"):
        async with create_vhd_file(remote, "a.vhd", shape([0, 2])) as writer:
            await send(writer, {2: content(1)}, pool)
    with pytest.raises(Corrupt) as caught:
        await cut_short()
    assert caught.value.data["what"] == "blocks missing"
    assert tree(tmp_path) == []
    assert pool.in_use == 0


async def test_a_taken_name_is_a_conflict_and_stays(remote: Faults, tmp_path: Path) -> None:
    await store(remote, "a.vhd", {0: content(1)})
    before = (tmp_path / "a.vhd").read_bytes()
    with pytest.raises(Conflict):
        await store(remote, "a.vhd", {0: content(2)})
    assert (tmp_path / "a.vhd").read_bytes() == before


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("verb", "skip"),
    [
        ("create.open", 0),
        ("create.write", 0),  # footer, header, table
        ("create.write", 1),
        ("create.write", 2),
        ("create.write", 3),  # the footer at the end
        ("create.commit", 0),
    ],
)
async def test_cancelled_at_any_stage_nothing_is_left(
    remote: Faults, tmp_path: Path, verb: str, skip: int, *, after: bool
) -> None:
    gate = remote.add(verb, Gate(after=after), skip=skip)
    pool = block_pool(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(store, remote, "a.vhd", {0: content(1), 1: content(2)}, pool=pool)
        )
        await gate.reached.wait()
        nursery.cancel_scope.cancel()
    if verb == "create.commit" and after:
        assert await read(remote) == flat({0: content(1), 1: content(2)}, SIZE)
    assert tree(tmp_path) == (["a.vhd"] if verb == "create.commit" and after else [])
    assert pool.in_use == 0


async def test_a_full_disk_leaves_nothing(remote: Faults, tmp_path: Path) -> None:
    remote.fill_after(3 * MIB)
    with pytest.raises(Refused, match="ENOSPC"):
        await store(remote, "a.vhd", {0: content(1), 1: content(2)})
    assert tree(tmp_path) == []


async def test_a_read_error_comes_out_and_gives_the_buffers_back(remote: Faults) -> None:
    await store(remote, "a.vhd", {index: content(index) for index in range(5)})
    gone = Unreachable("the server went away", code="ECONNRESET")
    remote.add("read.read_into_at", Fail(gone), skip=2)
    pool = block_pool(4)
    with pytest.raises(Unreachable):
        async with open_vhd_file(remote, "a.vhd") as disk:
            await everything(disk, pool)
    assert pool.in_use == 0


async def test_a_cancelled_reader_gives_the_buffers_back(remote: Faults) -> None:
    await store(remote, "a.vhd", {index: content(index) for index in range(5)})
    gate = remote.add("read.read_into_at", Gate(), skip=3)
    pool = block_pool(4)

    async def reading() -> None:
        async with open_vhd_file(remote, "a.vhd") as disk, disk.read(pool) as reader:
            while (block := await reader.next()) is not None:
                block.buffer.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading)
        await gate.reached.wait()
        nursery.cancel_scope.cancel()
    assert pool.in_use == 0


async def test_after_a_failed_write_nothing_is_committed(remote: Faults, tmp_path: Path) -> None:
    """A caller that goes on would give its name to a file with a hole."""
    pool = block_pool(2)
    remote.add("create.write", Torn(MIB, Unreachable("gone")), skip=2)
    async with create_vhd_file(remote, "a.vhd", shape([0, 2])) as writer:
        await send(writer, {0: content(1)}, pool)
        with pytest.raises(Unreachable):
            await send(writer, {2: content(2)}, pool)
        with pytest.raises(ValueError, match="nothing more"):
            await writer.commit()
        with pytest.raises(ValueError, match="nothing more"):
            await send(writer, {2: content(2)}, pool)
    assert remote.unused == []
    assert tree(tmp_path) == []
    assert pool.in_use == 0


async def test_what_cannot_be_written_is_refused_before_a_byte(
    remote: Faults, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="twice"):
        async with create_vhd_file(remote, "a.vhd", shape([1, 1])):
            pass
    with pytest.raises(Refused) as caught:
        async with create_vhd_file(remote, "a.vhd", shape([1], parent_name="x" * 257)):
            pass
    assert caught.value.code == "EINVAL"
    assert remote.seen == []
    assert tree(tmp_path) == []


async def test_an_immutable_remote_is_written_in_place(tmp_path: Path) -> None:
    remote = await LocalRemote.open(str(tmp_path), url="file://x", is_immutable=True)
    async with create_vhd_file(remote, "a.vhd", shape([0])) as writer:
        await send(writer, {0: content(1)}, block_pool(1))
        await writer.commit()
        assert writer.size == (tmp_path / "a.vhd").stat().st_size
    assert (tmp_path / "a.vhd").read_bytes() == image(8 * MIB, {0: content(1)})
    await remote.aclose()
