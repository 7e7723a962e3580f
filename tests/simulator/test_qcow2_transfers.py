"""Disks over HTTP as qcow2: checked, read and written by qemu-img, and by the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from proxy.disks.disk import Blocks, RandomAccess, block_count, block_pool
from proxy.disks.qcow2_stream import open_qcow2_stream, send_qcow2
from proxy.formats.vhd import BITMAP_SIZE
from proxy.simulator import SimulatedPool
from proxy.simulator.disks import BLOCK
from tests.disks.qcow2_images import Source, checked, image, qemu_img, qemu_reads
from tests.simulator.conftest import ODD_SIZE, content, one_odd_disk

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.disks.disk import Disk
    from tests.simulator.conftest import Client

CLUSTER = 64 * 1024


@pytest.fixture
async def pool(nursery: trio.Nursery) -> SimulatedPool:
    return await one_odd_disk(nursery)


async def empty(client: Client, pool: SimulatedPool, size: int = ODD_SIZE) -> str:
    fields = {
        "SR": pool.srs[1],
        "virtual_size": size,
        "sm_config": {"image-format": "qcow2"},
    }
    return str(await client.call("VDI.create", fields))


async def overlaid(disk: Disk, under: bytes = b"") -> bytes:
    """What the daemon makes of a stream."""
    made = bytearray(under.ljust(block_count(disk.virtual_size) * BLOCK, b"\0"))
    async with disk.read(block_pool(3)) as reader:
        while (block := await reader.next()) is not None:
            made[block.index * BLOCK : (block.index + 1) * BLOCK] = block.data
            block.buffer.release()
    return bytes(made[: disk.virtual_size])


class Held(RandomAccess):
    """A disk of bytes with some of its blocks."""

    def __init__(self, content: bytes, indexes: list[int], *, size: int = 0) -> None:
        self.virtual_size = size or len(content)
        self.is_differencing = False
        self.blocks = Blocks.of(indexes, block_count(self.virtual_size))
        self._content = content

    async def read_block(self, index: int, into: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        data = self._content[index * BLOCK : (index + 1) * BLOCK] or bytes([index % 251]) * BLOCK
        into[BITMAP_SIZE:] = data.ljust(BLOCK, b"\0")


async def sent(disk: Disk) -> bytes:
    out: list[bytes] = []

    async def sink(view: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        out.append(bytes(view))

    await send_qcow2(disk, block_pool(3), sink)
    return b"".join(out)


async def test_a_full_export(client: Client, pool: SimulatedPool, vdi: str, tmp_path: Path) -> None:
    disk = content(pool, vdi)
    stream, task = await client.export_disk(vdi, format="qcow2")
    assert (task["status"], task["progress"]) == ("success", 1)
    made = tmp_path / "a.qcow2"
    made.write_bytes(stream)
    told = checked(made)
    held = sum(any(disk[at : at + CLUSTER]) for at in range(0, ODD_SIZE, CLUSTER))
    assert told["allocated-clusters"] == held
    assert told["image-end-offset"] == len(stream)
    assert qemu_reads(made) == disk
    assert await overlaid(await open_qcow2_stream(Source(stream))) == disk


async def test_an_export_with_a_base_has_the_changed_clusters_only(
    client: Client, pool: SimulatedPool, vdi: str, tmp_path: Path
) -> None:
    base = pool.do("VDI.snapshot", vdi)
    before = content(pool, vdi)
    live = pool.disks.contents[vdi]
    live.write(3 * BLOCK + 5 * CLUSTER + 100, b"changed")
    live.write(BLOCK + CLUSTER, bytes(2 * CLUSTER))
    live.write(ODD_SIZE - 3, b"end")
    disk = content(pool, vdi)
    stream, _ = await client.export_disk(vdi, format="qcow2", base=base)
    made, raw = tmp_path / "a.qcow2", tmp_path / "base.raw"
    made.write_bytes(stream)
    changed = sum(
        before[at : at + CLUSTER] != disk[at : at + CLUSTER] for at in range(0, ODD_SIZE, CLUSTER)
    )
    assert checked(made)["allocated-clusters"] == changed
    assert 2 <= changed <= 4
    raw.write_bytes(before)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", raw, "-F", "raw", made)
    assert qemu_reads(made) == disk
    opened = await open_qcow2_stream(Source(stream), is_differencing=True)
    assert set(opened.partial) >= {3}
    opened.parent = Held(before, list(range(block_count(ODD_SIZE))))
    assert await overlaid(opened, before) == disk


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1,cluster_size=2M"])
async def test_what_qemu_wrote_is_imported(
    client: Client, pool: SimulatedPool, vdi: str, tmp_path: Path, options: str
) -> None:
    disk = content(pool, vdi)
    raw, made = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(disk)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, made)
    data = made.read_bytes()
    target = await empty(client, pool)
    _, task = await client.import_disk(target, data + bytes(-len(data) % BLOCK), format="qcow2")
    assert task["status"] == "success"
    assert content(pool, target) == disk


async def test_what_the_daemon_sends_is_imported(
    client: Client, pool: SimulatedPool, vdi: str
) -> None:
    disk = content(pool, vdi)
    blocks = [index for index in range(6) if any(disk[index * BLOCK : (index + 1) * BLOCK])]
    target = await empty(client, pool)
    _, task = await client.import_disk(target, await sent(Held(disk, blocks)), format="qcow2")
    assert task["status"] == "success"
    assert content(pool, target) == disk
    target = await empty(client, pool)
    _, task = await client.import_disk(target, await sent(Held(disk, [])), format="qcow2")
    assert task["status"] == "success", "also of an empty disk"


@pytest.mark.parametrize("size", [3 << 40, 9 << 40])
async def test_huge_disks_land_where_they_belong(
    client: Client, pool: SimulatedPool, size: int
) -> None:
    last = block_count(size) - 1
    stream = await sent(Held(b"", [1, last // 2, last], size=size))
    target = await empty(client, pool, size)
    _, task = await client.import_disk(target, stream, format="qcow2")
    assert task["status"] == "success"
    found = pool.disks.contents[target]
    assert found.held_blocks() == [1, last // 2, last]
    again, _ = await client.export_disk(target, format="qcow2")
    opened = await open_qcow2_stream(Source(again))
    assert opened.virtual_size == size
    assert list(opened.blocks) == [1, last // 2, last]


async def test_a_second_cluster_of_the_l1_table_is_counted_from_zero(
    client: Client, pool: SimulatedPool
) -> None:
    """A fault of XAPI's import, for which the daemon makes its clusters larger."""
    size = 5 << 40
    cluster = (9 << 39) // CLUSTER
    target = await empty(client, pool, size)
    _, task = await client.import_disk(target, image(size, {cluster: b"x"}), format="qcow2")
    assert task["status"] == "success"
    assert pool.disks.contents[target].held_blocks() == [(1 << 39) // BLOCK]


@pytest.mark.parametrize(
    ("made", "cut"),
    [
        (image(ODD_SIZE, {}), 0),
        (image(ODD_SIZE, {0: b"x", 1: b"y"}, gaps={1}), 0),
        (image(ODD_SIZE, {0: b"x", 1: b"y"}), 1),
        (image(ODD_SIZE, {0: b"x"}, flags=1 << 62), 0),
        (image(ODD_SIZE + BLOCK, {ODD_SIZE // CLUSTER + 1: b"x"}), 0),
        (b"no image at all".ljust(CLUSTER), 0),
    ],
    ids=["no data", "gap", "cut", "compressed", "beyond the end", "no image"],
)
async def test_imports_that_fail(
    client: Client, pool: SimulatedPool, made: bytes, cut: int
) -> None:
    target = await empty(client, pool)
    _, task = await client.import_disk(target, made[: len(made) - cut], format="qcow2")
    assert (task["status"], task["error_info"][0]) == ("failure", "VDI_IO_ERROR")
