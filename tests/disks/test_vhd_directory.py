"""VHD directories: read as the specification lays them out, written so that others read them."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import trio

from proxy.disks.disk import block_pool
from proxy.disks.vhd_directory import create_vhd_directory, open_vhd_directory
from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.formats import vhd
from proxy.formats.vhd_directory import Compression
from proxy.remotes.faults import Call, Fail, Gate
from proxy.runtime.threads import Work, in_thread
from tests.disks.directories import (
    MIB,
    PACK,
    UNPACK,
    content,
    everything,
    identity,
    opened,
    place_alias,
    place_directory,
    send,
    shape,
    tree,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes.faults import Fault, Faults
    from proxy.remotes.wrapper import Operation

RECORDED = Path(__file__).parents[1] / "fixtures" / "disks" / "recorded-directories"
NAME = "20260101T000000Z"
ALIAS = f"vdi/{NAME}.alias.vhd"
DATA = f"vdi/data/{NAME}.vhd"
COMPRESSIONS = ["brotli", "gzip", "none"]
GONE = Unreachable("the server went away", code="ECONNRESET")


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Faults]:
    async with opened(tmp_path) as faults:
        yield faults


async def read(remote: Faults, path: str = DATA) -> dict[int, bytes]:
    async with open_vhd_directory(remote, path) as disk:
        return await everything(disk, block_pool(4))


# -- reading


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_a_directory_made_after_the_specification(
    remote: Faults, tmp_path: Path, compression: str
) -> None:
    blocks = {0: content(1), 3: content(2)}
    place_directory(tmp_path / DATA, blocks, compression=compression)
    async with open_vhd_directory(remote, f"/{DATA}") as disk:
        assert disk.compression == Compression(compression)
        assert disk.virtual_size == 8 * MIB
        assert disk.uuid == identity(1)
        assert not disk.is_differencing
        assert list(disk.blocks) == [0, 3]
        assert await everything(disk, block_pool(4)) == blocks
        assert await everything(disk, block_pool(1)) == blocks, "it can be read again"


async def test_what_xen_orchestra_wrote(remote: Faults, tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path / "vdi")
    async with open_vhd_directory(remote, "vdi/data/20261124T015616Z.vhd") as disk:
        assert disk.compression is Compression.BROTLI
        assert disk.is_differencing
        assert disk.header.parent_name == "20261124T015614Z.alias.vhd"
        assert str(disk.header.parent_uuid) == "350f5c95-26d6-4207-99e4-801f69a6cdcf"
        assert disk.virtual_size == 8 * MIB
        assert list(disk.blocks) == [3]


async def test_a_block_of_the_second_folder(remote: Faults, tmp_path: Path) -> None:
    place_directory(tmp_path / DATA, {1234: content(1)}, size=1235 * 2 * MIB)
    assert (tmp_path / DATA / "blocks" / "1" / "234").exists()
    assert await read(remote) == {1234: content(1)}


@pytest.mark.parametrize(
    ("table", "present"),
    [(b"", []), (b"\xff", [0, 1, 2]), (b"\xff" * 1000, [0, 1, 2]), (b"\x40\xff", [1])],
)
async def test_a_table_of_any_length(
    remote: Faults, tmp_path: Path, table: bytes, present: list[int]
) -> None:
    place_directory(tmp_path / DATA, {}, size=5 * MIB, table=table)
    async with open_vhd_directory(remote, DATA) as disk:
        assert list(disk.blocks) == present
        assert disk.blocks.count == 3


async def test_sectors_that_a_bitmap_lacks_are_zeros_or_the_parents(
    remote: Faults, tmp_path: Path
) -> None:
    some = b"\xaa" * vhd.BITMAP_SIZE
    place_directory(tmp_path / DATA, {0: b"\1" * vhd.BLOCK_SIZE}, bitmap=some)
    assert await read(remote) == {0: (b"\1" * 512 + bytes(512)) * 2048}
    parent = ("older.alias.vhd", identity(2))
    place_directory(tmp_path / "d.vhd", {0: content(1)}, bitmap=some, parent=parent)
    with pytest.raises(Corrupt, match=r"d\.vhd/blocks/0/0.*some sectors"):
        await read(remote, "d.vhd")


async def test_what_a_block_has_behind_the_end_of_the_disk_is_not_read(
    remote: Faults, tmp_path: Path
) -> None:
    place_directory(tmp_path / DATA, {0: b"\1" * vhd.BLOCK_SIZE}, size=MIB)
    assert await read(remote) == {0: b"\1" * MIB + bytes(MIB)}


@pytest.mark.parametrize("name", ["header", "footer", "bat", "blocks/0/0"])
async def test_a_part_that_is_missing_is_corrupt(remote: Faults, tmp_path: Path, name: str) -> None:
    place_directory(tmp_path / DATA, {0: content(1)})
    (tmp_path / DATA / name).unlink()
    with pytest.raises(Corrupt, match="lacks") as caught:
        await read(remote)
    assert "missing" in caught.value.data["what"]


async def test_a_directory_that_is_missing_is_not_found(remote: Faults, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await read(remote)
    (tmp_path / DATA).mkdir(parents=True)
    with pytest.raises(NotFound):
        await read(remote)
    (tmp_path / "file.vhd").write_bytes(bytes(100))
    with pytest.raises(NotFound) as caught:
        await read(remote, "file.vhd")
    assert caught.value.code == "ENOTDIR"


async def test_a_compression_of_tomorrow_is_refused(remote: Faults, tmp_path: Path) -> None:
    place_directory(tmp_path / DATA, {})
    (tmp_path / DATA / "chunk-filters.json").write_text('["zstd"]')
    with pytest.raises(Refused, match=r"chunk-filters.json.*zstd") as caught:
        await read(remote)
    assert caught.value.code == "ENOTSUP"


@pytest.mark.parametrize("verb", ["read_files", "read_file"])
async def test_what_cannot_be_read_now_is_not_called_corrupt(
    remote: Faults, tmp_path: Path, verb: str
) -> None:
    place_directory(tmp_path / DATA, {0: content(1)})
    remote.add(verb, Fail(GONE))
    with pytest.raises(Unreachable):
        await read(remote)
    remote.add("read_file", Fail(GONE), path="*/blocks/*")
    async with open_vhd_directory(remote, DATA) as disk:
        with pytest.raises(Unreachable):
            await disk.read_block(0, memoryview(bytearray(vhd.STORED_BLOCK)))


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        (name, compression)
        for name in ("header", "footer", "bat", "blocks/0/0")
        for compression in COMPRESSIONS
        if (name, compression) != ("bat", "none")  # a table of any length is a table
    ],
)
async def test_a_part_that_is_cut_or_too_long_is_corrupt(
    remote: Faults, tmp_path: Path, name: str, compression: str
) -> None:
    place_directory(tmp_path / DATA, {0: content(1)}, compression=compression)
    part = tmp_path / DATA / name
    whole = part.read_bytes()
    plain = UNPACK[compression](whole)
    damaged = {b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0"}
    if name != "bat":
        damaged |= {PACK[compression](plain[:-1]), PACK[compression](plain + b"\0")}
    for data in damaged:
        part.write_bytes(data)
        with pytest.raises(Corrupt, match=name) as caught:
            await read(remote)
        assert caught.value.data["path"].endswith(name)


async def test_huge_parts_are_not_even_read(remote: Faults, tmp_path: Path) -> None:
    place_directory(tmp_path / DATA, {0: content(1)})
    for name in ("chunk-filters.json", "footer", "blocks/0/0"):
        part = tmp_path / DATA / name
        whole = part.read_bytes()
        with part.open("r+b") as file:
            file.truncate(2**40)  # a hole
        with pytest.raises(Corrupt, match="larger than"):
            await read(remote)
        part.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        *((name, compression) for name in ("header", "footer") for compression in COMPRESSIONS),
        ("chunk-filters.json", "brotli"),
        ("chunk-filters.json", "gzip"),
    ],
)
async def test_no_flipped_bit_goes_unnoticed(
    remote: Faults, tmp_path: Path, name: str, compression: str
) -> None:
    place_directory(tmp_path / DATA, {}, compression=compression)
    async with open_vhd_directory(remote, DATA) as disk:
        expected = (disk.header, disk.footer, disk.compression)
    part = tmp_path / DATA / name
    whole = part.read_bytes()
    for position in range(0, 8 * len(whole), 29):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        part.write_bytes(damaged)
        with contextlib.suppress(Corrupt, Refused):
            async with open_vhd_directory(remote, DATA) as disk:
                assert (disk.header, disk.footer, disk.compression) == expected


async def test_a_damaged_block_never_gives_other_bytes_where_its_compression_has_a_checksum(
    remote: Faults, tmp_path: Path
) -> None:
    place_directory(tmp_path / DATA, {0: content(1)}, compression="gzip")
    part = tmp_path / DATA / "blocks/0/0"
    whole = part.read_bytes()
    noticed = 0
    for position in range(10, len(whole), len(whole) // 20):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        part.write_bytes(damaged)
        try:
            assert await read(remote) == {0: content(1)}, "another way to say the same"
        except Corrupt:
            noticed += 1
    assert noticed > 10


async def test_a_disk_that_is_removed_while_it_is_read_is_not_called_corrupt(
    remote: Faults, tmp_path: Path
) -> None:
    place_directory(tmp_path / DATA, {0: content(1)})
    async with open_vhd_directory(remote, DATA) as disk:
        shutil.rmtree(tmp_path / DATA)
        with pytest.raises(NotFound):
            await disk.read_block(0, memoryview(bytearray(vhd.STORED_BLOCK)))


# -- writing


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_a_disk_as_others_read_it(
    remote: Faults, tmp_path: Path, compression: Literal["brotli", "gzip", "none"]
) -> None:
    blocks = {2: content(1), 0: bytes(vhd.BLOCK_SIZE), 1000: content(3)[: 1 * MIB]}
    pool = block_pool(4)
    wanted = shape(list(blocks), size=2001 * MIB)
    async with create_vhd_directory(
        remote, ALIAS, wanted, compression=Compression(compression)
    ) as writer:
        assert writer.size == vhd.stream_size(1001, 3)
        await send(writer, blocks, pool)
        assert not (tmp_path / ALIAS).exists()
        await writer.commit()
    assert pool.in_use == 0
    data = tmp_path / DATA
    assert (tmp_path / ALIAS).read_bytes() == f"data/{NAME}.vhd".encode()
    filters = [] if compression == "none" else ["chunk-filters.json"]
    assert tree(data) == sorted(
        ["bat", "blocks/0/0", "blocks/0/2", "blocks/1/0", "footer", "header", *filters]
    )
    if filters:
        assert json.loads((data / "chunk-filters.json").read_text()) == [compression]

    def plain(name: str) -> bytes:
        return UNPACK[compression]((data / name).read_bytes())

    assert plain("bat") == b"\xa0" + bytes(124) + b"\x80" + bytes(1001 - 126)
    footer = vhd.Footer.parse(plain("footer"))
    assert (footer.current_size, footer.uuid) == (2001 * MIB, identity(1))
    assert vhd.Header.parse(plain("header")).max_entries == 1001
    for index, path in ((2, "blocks/0/2"), (0, "blocks/0/0"), (1000, "blocks/1/0")):
        assert plain(path) == vhd.FULL_BITMAP + blocks[index].ljust(vhd.BLOCK_SIZE, b"\0")
    assert await read(remote) == {
        index: data.ljust(vhd.BLOCK_SIZE, b"\0") for index, data in sorted(blocks.items())
    }


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_the_small_files_are_byte_for_byte_those_of_xen_orchestra(
    remote: Faults, tmp_path: Path, number: int
) -> None:
    recorded = sorted((RECORDED / "data").iterdir())[number]
    shutil.copytree(RECORDED, tmp_path / "recorded")
    async with open_vhd_directory(remote, f"recorded/data/{recorded.name}") as disk:
        wanted = shape(
            list(disk.blocks),
            disk.virtual_size,
            uuid=disk.uuid,
            timestamp=disk.footer.timestamp,
            is_differencing=disk.is_differencing,
            parent_uuid=disk.header.parent_uuid,
            parent_name=disk.header.parent_name,
        )
        count = {index: bytes(vhd.BLOCK_SIZE) for index in disk.blocks}
    alias = f"vdi/{recorded.stem}.alias.vhd"
    async with create_vhd_directory(remote, alias, wanted) as writer:
        await send(writer, count, block_pool(2))
        await writer.commit()
    ours = tmp_path / "vdi" / "data" / recorded.name
    for name in ("header", "footer", "bat", "chunk-filters.json"):
        assert (ours / name).read_bytes() == (recorded / name).read_bytes()
    assert (tmp_path / alias).read_bytes() == (RECORDED / Path(alias).name).read_bytes()


async def test_a_disk_of_no_blocks(remote: Faults, tmp_path: Path) -> None:
    async with create_vhd_directory(remote, ALIAS, shape([])) as writer:
        await writer.commit()
    assert "bat" in tree(tmp_path / DATA)
    assert await read(remote) == {}


async def test_the_alias_is_the_last_thing_and_comes_after_the_sync(remote: Faults) -> None:
    async with create_vhd_directory(remote, ALIAS, shape([0, 1])) as writer:
        await send(writer, {0: content(1), 1: content(2)}, block_pool(2))
        remote.seen.clear()
        await writer.commit()
    assert remote.seen[-2:] == [("batch.commit", ""), ("write_file", ALIAS)]
    assert {verb for verb, _ in remote.seen[:-2]} == {"batch.write"}


async def test_leaving_without_commit_leaves_nothing(remote: Faults, tmp_path: Path) -> None:
    pool = block_pool(2)
    async with create_vhd_directory(remote, ALIAS, shape([0, 1])) as writer:
        await send(writer, {0: content(1)}, pool)
    assert pool.in_use == 0
    assert tree(tmp_path) == []


async def test_an_error_of_the_caller_comes_out_as_it_is(remote: Faults, tmp_path: Path) -> None:
    with pytest.raises(KeyError):  # noqa: PT012 (the block is what ends)
        async with create_vhd_directory(remote, ALIAS, shape([0, 1])) as writer:
            await send(writer, {0: content(1)}, block_pool(2))
            raise KeyError("x")
    assert tree(tmp_path) == []


async def test_missing_blocks_are_no_disk(remote: Faults, tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="1 blocks before its end"):  # noqa: PT012
        async with create_vhd_directory(remote, ALIAS, shape([0, 1])) as writer:
            await send(writer, {0: content(1)}, block_pool(2))
            await writer.commit()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("indexes", [[2], [4], [0, 0]])
async def test_blocks_that_were_not_announced(remote: Faults, indexes: list[int]) -> None:
    pool = block_pool(2)
    with pytest.raises(ValueError, match="not announced, or comes twice"):  # noqa: PT012
        async with create_vhd_directory(remote, ALIAS, shape([0, 1])) as writer:
            for index in indexes:
                await send(writer, {index: content(1)}, pool)
    assert pool.in_use == 0


@pytest.mark.parametrize("path", ["vdi/x.vhd", "vdi/alias.vhd"])
async def test_a_name_that_is_no_alias(remote: Faults, path: str) -> None:
    with pytest.raises(Refused):
        async with create_vhd_directory(remote, path, shape([])):
            pass
    assert remote.seen == []


async def test_a_parent_whose_name_is_too_long(remote: Faults) -> None:
    with pytest.raises(Refused, match="too long"):
        async with create_vhd_directory(
            remote, ALIAS, shape([], is_differencing=True, parent_name="x" * 257)
        ):
            pass
    assert remote.seen == []


# -- what was there before


async def test_what_a_dead_attempt_left_is_replaced(remote: Faults, tmp_path: Path) -> None:
    place_directory(tmp_path / DATA, {0: content(9), 3: content(9)}, compression="gzip")
    place_directory(tmp_path / "vdi/data/other.vhd", {1: content(4)})
    place_alias(tmp_path / "vdi/newer.alias.vhd", "data/other.vhd")
    async with create_vhd_directory(
        remote, ALIAS, shape([0]), compression=Compression.NONE
    ) as writer:
        await send(writer, {0: content(1)}, block_pool(2))
        await writer.commit()
    assert await read(remote) == {0: content(1)}
    assert tree(tmp_path / DATA) == ["bat", "blocks/0/0", "footer", "header"]
    assert await read(remote, "vdi/data/other.vhd") == {1: content(4)}


@pytest.mark.parametrize("claims", [ALIAS, "vdi/20260109T000000Z.alias.vhd"])
async def test_a_disk_that_is_there_is_never_replaced(
    remote: Faults, tmp_path: Path, claims: str
) -> None:
    place_directory(tmp_path / DATA, {0: content(9)})
    place_alias(tmp_path / claims, f"data/{NAME}.vhd")
    before = tree(tmp_path)
    with pytest.raises(Conflict) as caught:
        async with create_vhd_directory(remote, ALIAS, shape([0])):
            pass
    assert caught.value.code == "EEXIST"
    assert tree(tmp_path) == before
    assert await read(remote) == {0: content(9)}


async def test_nothing_is_removed_beside_an_alias_that_says_nothing(
    remote: Faults, tmp_path: Path
) -> None:
    place_directory(tmp_path / DATA, {0: content(9)})
    place_alias(tmp_path / "vdi/20260109T000000Z.alias.vhd", "")
    before = tree(tmp_path)
    with pytest.raises(Corrupt, match="20260109T000000Z"):
        async with create_vhd_directory(remote, ALIAS, shape([0])):
            pass
    assert tree(tmp_path) == before


# -- failures and cancels

STAGES = [
    ("batch.write", "*/blocks/0/0"),
    ("batch.write", "*/blocks/0/1"),
    ("batch.write", "*/header"),
    ("batch.write", "*/bat"),
    ("batch.commit", "*"),
    ("write_file", "*.alias.vhd"),
]
BLOCKS = {0: content(1), 1: content(2), 2: content(3)}


async def attempt(remote: Faults, pool: Any) -> None:
    async with create_vhd_directory(remote, ALIAS, shape(list(BLOCKS))) as writer:
        await send(writer, BLOCKS, pool)
        await writer.commit()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("verb", "path"), STAGES)
async def test_an_error_at_each_stage_leaves_nothing(
    remote: Faults, tmp_path: Path, verb: str, path: str, *, after: bool
) -> None:
    remote.add(verb, Fail(GONE, after=after), path=path)
    pool = block_pool(2)
    with pytest.raises(Unreachable, match="went away"):
        await attempt(remote, pool)
    assert remote.unused == []
    assert tree(tmp_path) == []
    assert pool.in_use == 0
    await attempt(remote, pool)
    assert await read(remote) == BLOCKS


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("verb", "path"), STAGES[:-1])
async def test_a_cancel_at_each_stage_leaves_nothing(
    remote: Faults, tmp_path: Path, verb: str, path: str, *, after: bool
) -> None:
    gate = remote.add(verb, Gate(after=after), path=path)
    pool = block_pool(2)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt, remote, pool)
            await gate.reached.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert tree(tmp_path) == []
    assert pool.in_use == 0


@pytest.mark.parametrize("after", [False, True])
async def test_a_cancel_during_the_naming_waits_for_its_outcome(
    remote: Faults, *, after: bool
) -> None:
    gate = remote.add("write_file", Gate(after=after))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, remote, block_pool(2))
        await gate.reached.wait()
        nursery.cancel_scope.cancel()
        gate.release.set()
    assert await read(remote) == BLOCKS


async def test_a_lost_answer_to_the_naming_that_was_repeated(
    remote: Faults, tmp_path: Path
) -> None:
    """The repeated call finds the alias of the first one."""

    async def first(operation: Operation) -> None:
        (tmp_path / ALIAS).write_bytes(bytes(operation.data or b""))
        await trio.lowlevel.checkpoint()

    remote.add("write_file", Call(first))
    await attempt(remote, block_pool(2))
    assert await read(remote) == BLOCKS


async def test_an_alias_that_somebody_else_made_meanwhile_stays(
    remote: Faults, tmp_path: Path
) -> None:
    def other(operation: Operation) -> None:
        place_alias(tmp_path / operation.path, "data/other.vhd")

    remote.add("write_file", Call(other))
    with pytest.raises(Conflict):
        await attempt(remote, block_pool(2))
    assert (tmp_path / ALIAS).read_text() == "data/other.vhd"
    assert not (tmp_path / DATA).exists()


async def test_data_stays_when_it_cannot_be_told_whether_it_has_a_name(
    remote: Faults, tmp_path: Path
) -> None:
    remote.add("write_file", Fail(GONE, after=True))
    remote.add("read_file", Fail(GONE), path="*.alias.vhd")
    with pytest.raises(Unreachable):
        await attempt(remote, block_pool(2))
    assert (tmp_path / ALIAS).exists()
    assert await read(remote) == BLOCKS


async def test_a_full_disk(remote: Faults, tmp_path: Path) -> None:
    remote.fill_after(5_000)
    pool = block_pool(2)
    with pytest.raises(Refused) as caught:
        await attempt(remote, pool)
    assert caught.value.code == "ENOSPC"
    assert tree(tmp_path) == []
    assert pool.in_use == 0


async def test_an_undo_that_fails_does_not_hide_the_error(remote: Faults) -> None:
    remote.add("batch.commit", Fail(GONE))
    remote.add("rmtree", Fail(Refused("EPERM: no", code="EPERM")))
    with pytest.raises(Unreachable, match="went away"):
        await attempt(remote, block_pool(2))
    assert remote.unused == []


@pytest.mark.parametrize("fault", [Fail(GONE), None])
async def test_memory_is_what_the_pool_gives(remote: Faults, fault: Fault | None) -> None:
    """A storage that stands still stops the source, whatever the number of blocks."""
    gate = remote.add("batch.write", Gate(), times=3)
    if fault is not None:
        remote.add("batch.write", fault)
    pool = block_pool(3)
    blocks = {index: content(index) for index in range(8)}
    outcome: list[ProxyError | None] = []

    async def write() -> None:
        try:
            wanted = shape(list(blocks), size=16 * MIB)
            async with create_vhd_directory(remote, ALIAS, wanted) as writer:
                await send(writer, blocks, pool)
                await writer.commit()
            outcome.append(None)
        except ProxyError as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await gate.reached.wait()
        while [verb for verb, _ in remote.seen].count("batch.write") < 3:
            await in_thread(Work.DISK, int)  # lets the workers get there
        assert pool.in_use == 3
        gate.release.set()
    assert outcome == [fault.error if isinstance(fault, Fail) else None]
    assert pool.in_use == 0
