"""Which stored disk a delta is chained on, and the reasons for none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from proxy.disks.disk import block_pool
from proxy.disks.vhd_file import create_vhd_file
from proxy.remotes.local import LocalRemote
from proxy.repository.parents import NoParent, Parent, find_parent
from tests.disks.directories import MIB, content, identity, send, shape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

VM, JOB, DISK = (f"{number}0000000-0000-4000-8000-000000000000" for number in (1, 2, 3))
FOLDER = f"xo-vm-backups/{VM}/vdis/{JOB}/{DISK}"
FIRST, SECOND = "20260101T000000Z", "20260102T000000Z"


@contextlib.asynccontextmanager
async def opened(root: Path, **options: Any) -> AsyncIterator[LocalRemote]:
    remote = await LocalRemote.open(str(root), url=f"file://{root}", **options)
    try:
        yield remote
    finally:
        await remote.aclose()


async def place(
    remote: LocalRemote, name: str, blocks: Mapping[int, bytes], number: int, **more: Any
) -> None:
    wanted = shape(list(blocks), uuid=identity(number), **more)
    async with create_vhd_file(remote, f"{FOLDER}/{name}.vhd", wanted) as writer:
        await send(writer, blocks, block_pool(2))
        await writer.commit()


async def find(remote: LocalRemote, number: int) -> Parent | NoParent:
    return await find_parent(remote, VM, JOB, DISK, str(identity(number)), damaged={})


async def reason(remote: LocalRemote, number: int) -> str:
    found = await find(remote, number)
    assert isinstance(found, NoParent)
    return found.reason


async def test_the_disk_with_the_bases_identity(tmp_path: Path) -> None:
    async with opened(tmp_path) as remote:
        assert await reason(remote, 1) == "NO_BACKUP"
        await place(remote, FIRST, {0: content(1), 1: content(2)}, 1)
        found = await find(remote, 1)
        assert isinstance(found, Parent)
        assert (found.name, found.uuid) == (f"{FIRST}.vhd", identity(1))
        assert await reason(remote, 2) == "BASE_NOT_STORED"


async def test_a_disk_that_has_a_child_gets_no_second_one(tmp_path: Path) -> None:
    """A merge of one of two children would change what the other is made from."""
    async with opened(tmp_path) as remote:
        await place(remote, FIRST, {0: content(1), 1: content(2)}, 1)
        await place(
            remote,
            SECOND,
            {1: content(3)},
            2,
            is_differencing=True,
            parent_uuid=identity(1),
            parent_name=f"{FIRST}.vhd",
        )
        assert await reason(remote, 1) == "HAS_CHILD"
        assert isinstance(await find(remote, 2), Parent)


async def test_a_broken_chain_and_hidden_files_are_no_parents(tmp_path: Path) -> None:
    async with opened(tmp_path) as remote:
        await place(
            remote,
            SECOND,
            {1: content(3)},
            2,
            is_differencing=True,
            parent_uuid=identity(1),
            parent_name=f"{FIRST}.vhd",
        )
        assert await reason(remote, 2) == "UNREADABLE"
        (tmp_path / FOLDER / f"{SECOND}.vhd").rename(tmp_path / FOLDER / f".1.{SECOND}.vhd")
        assert await reason(remote, 2) == "BASE_NOT_STORED"


async def test_a_remote_that_keeps_directories_now_takes_no_delta_of_a_file(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, use_vhd_directory=True) as remote:
        await place(remote, FIRST, {0: content(1), 1: content(2)}, 1)
        assert await reason(remote, 1) == "STORAGE_CHANGED"


@pytest.mark.parametrize(
    ("told", "data", "accepted"),
    [
        ({"includeNonNbdQcow2Fix": True}, bytes(2 * MIB), True),
        ({"vdis": {"ref": {"sm_config": {}}}}, bytes(2 * MIB), True),
        ({"vdis": {"ref": {"sm_config": {"image-format": "qcow2"}}}}, bytes(2 * MIB), False),
        ({"vdis": {"ref": {"sm_config": {"image-format": "qcow2"}}}}, content(5), True),
        ({}, bytes(2 * MIB), False),
        (None, bytes(2 * MIB), False),
    ],
    ids=["mended", "no qcow2", "zeros", "data", "no record", "no metadata"],
)
async def test_a_qcow2_base_that_may_lack_its_data_is_not_built_on(
    tmp_path: Path, told: dict[str, Any] | None, data: bytes, accepted: bool
) -> None:
    async with opened(tmp_path) as remote:
        await place(remote, FIRST, {0: content(1), 1: data, 2: data}, 1)
        if told is not None:
            vhds = {"ref": f"vdis/{JOB}/{DISK}/{FIRST}.vhd"}
            record = {"mode": "delta", "vm": {}, "vhds": vhds, **told}
            path = tmp_path / "xo-vm-backups" / VM / f"{FIRST}.json"
            path.write_bytes(msgspec.json.encode(record))
        found = await find(remote, 1)
        assert isinstance(found, Parent) == accepted, found
        if not accepted:
            assert isinstance(found, NoParent)
            assert found.reason == "QCOW2_SUSPECT"
            # a copy would not be any better for being whole
            uuid = str(identity(1))
            copied = await find_parent(
                remote, VM, JOB, DISK, uuid, damaged={}, suspects_qcow2=False
            )
            assert isinstance(copied, Parent)
