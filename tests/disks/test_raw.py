"""Raw images as disks, and on to other formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy.disks.disk import block_pool
from proxy.disks.raw import open_raw
from proxy.disks.vhd_stream import send_vhd
from proxy.errors import Corrupt, NotFound
from proxy.formats import vhd
from tests.disks.directories import MIB, content, everything, identity, opened
from tests.disks.vhd_images import qemu_reads

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("size", [0, 512, 2 * MIB, 4 * MIB + 512])
async def test_every_block_is_there_and_the_last_is_filled_up(tmp_path: Path, size: int) -> None:
    raw = (content(1) + content(2) + content(3))[:size]
    (tmp_path / "a.raw").write_bytes(raw)
    pool = block_pool(1)
    dirty = await pool.acquire()
    dirty.memory[:] = b"\xee" * len(dirty.memory)
    dirty.release()
    async with opened(tmp_path) as remote, open_raw(remote, "a.raw") as disk:
        assert disk.virtual_size == size
        assert not disk.is_differencing
        found = await everything(disk, pool)
    assert list(found) == list(range(-(-size // vhd.BLOCK_SIZE)))
    assert b"".join(found.values()) == raw.ljust(len(found) * vhd.BLOCK_SIZE, b"\0")


async def test_a_raw_image_becomes_a_vhd_that_qemu_reads(tmp_path: Path) -> None:
    raw = content(1) + content(2)[:512]
    (tmp_path / "a.raw").write_bytes(raw)
    with (tmp_path / "b.vhd").open("wb") as file:

        async def sink(view: memoryview) -> None:
            file.write(view)

        async with opened(tmp_path) as remote, open_raw(remote, "a.raw") as disk:
            await send_vhd(disk, block_pool(2), sink, uuid=identity(1), timestamp=1)
    assert await qemu_reads(tmp_path / "b.vhd") == raw


async def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(content(1))
    stored = memoryview(bytearray(vhd.STORED_BLOCK))
    async with opened(tmp_path) as remote:
        with pytest.raises(NotFound):
            async with open_raw(remote, "b.raw"):
                pass
        async with open_raw(remote, "a.raw") as disk:
            for index in (-1, 1):
                with pytest.raises(ValueError, match="has no block"):
                    await disk.read_block(index, stored)
            (tmp_path / "a.raw").write_bytes(b"short")
            with pytest.raises(Corrupt) as caught:
                await disk.read_block(0, stored)
    assert caught.value.data == {"what": "block cut", "offset": 0, "path": "a.raw"}
