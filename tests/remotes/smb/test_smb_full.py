"""A share whose disk is full, for real: Samba on a small file system of its own."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from proxy.errors import Refused
from proxy.remotes import opened_remote
from tests.jobs.test_incremental_backup import back_up, digests, house_of, restored
from tests.remotes.conftest import KEY, OPTIONS, tree

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from proxy.remotes import Remote
    from tests.remotes.samba import Samba

MIB = 1024 * 1024
SIZE = 6 * MIB
PLAIN, ENCRYPTED = "", f'&encryptionKey="{KEY}"'


def resized(place: Path, size: int) -> None:
    options = f"remount,size={size}"
    subprocess.run(["mount", "-o", options, str(place)], check=True, capture_output=True)


@pytest.fixture
def small(tmp_path: Path, samba: Samba) -> Iterator[Path]:
    """A file system of :data:`SIZE` bytes that ``samba`` shares."""
    del samba
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def whole(remote: Remote) -> None:
    await remote.write_file("d/f", os.urandom(2 * SIZE))


async def stream(remote: Remote) -> None:
    async with remote.create("d/f.xva") as file:
        for _ in range(2 * SIZE // MIB):
            await file.write(os.urandom(MIB))
        await file.commit()


async def blocks(remote: Remote) -> None:
    try:
        async with remote.batch() as batch:
            for number in range(2 * SIZE // MIB):
                await batch.write(f"d/data/blocks/0/{number}", os.urandom(MIB))
            await batch.commit()
    finally:
        await remote.rmtree("d/data")  # as a batch has it: its caller removes the directory


@pytest.mark.parametrize("query", [PLAIN, ENCRYPTED], ids=["plain", "encrypted"])
@pytest.mark.parametrize("write", [whole, stream, blocks])
async def test_what_finds_no_room_leaves_nothing_and_says_so(
    samba: Samba, small: Path, query: str, write: Callable[[Remote], Awaitable[None]]
) -> None:
    async with opened_remote({"url": samba.url(small, query=query)}, options=OPTIONS) as remote:
        await remote.write_file("d/before", b"kept")
        before = tree(small)
        info = await remote.info()
        assert info.size is not None
        assert info.size <= SIZE
        with pytest.raises(Refused) as caught:
            await write(remote)
        assert caught.value.code == "ENOSPC"
        assert caught.value.message.startswith("ENOSPC")
        assert str(caught.value.data["path"]).startswith("d/")
        assert tree(small) == before
        assert await remote.read_file("d/before") == b"kept"
        resized(small, 8 * SIZE)
        await remote.write_file("d/after", os.urandom(MIB))  # no hangover
        assert tree(small) == sorted([*before, "d/after"])


async def test_what_is_to_be_replaced_stays_when_there_is_no_room(
    samba: Samba, small: Path
) -> None:
    async with opened_remote({"url": samba.url(small)}, options=OPTIONS) as remote:
        former = os.urandom(SIZE // 2)
        await remote.write_file("f", former)
        with pytest.raises(Refused) as caught:
            await remote.write_file("f", os.urandom(SIZE - MIB))
        assert caught.value.code == "ENOSPC"
        assert tree(small) == ["f"]
        assert await remote.read_file("f") == former


@pytest.mark.parametrize(
    "query", ["", "&useVhdDirectory=true", ENCRYPTED], ids=["files", "directories", "encrypted"]
)
@pytest.mark.parametrize("mode", ["full", "delta"])
async def test_a_run_that_finds_no_room_fails_and_leaves_no_part_of_a_backup(
    tmp_path: Path, samba: Samba, small: Path, query: str, mode: str
) -> None:
    """And the next one, with room, is whole."""
    async with house_of(tmp_path) as house:
        house.remotes["smb1"] = {
            "id": "smb1",
            "name": "smb1",
            "url": samba.url(small, query=query),
        }

        async def run() -> tuple[str, str]:
            if mode == "delta":
                outcome = await back_up(house, "smb1")
            else:
                outcome = await house.run(house.request(remotes=("smb1",)))
            return outcome.status, str(outcome.snapshot)

        status, told = await run()
        assert status == "failure"
        assert "ENOSPC" in told
        left = [path for path in tree(small) if (small / path).is_file()]
        roots = ["encryption.json", "metadata.json"] if query == ENCRYPTED else []
        assert left == roots
        resized(small, 64 * SIZE)
        status, told = await run()
        assert status == "success", told
        async with house.services.remote(house.remotes["smb1"]) as remote:
            names = [path async for path, _ in remote.walk("xo-vm-backups")]
        vm = house.pool.vm_uuid("vm1")
        (backup,) = [
            name
            for name in names
            if name.startswith(f"xo-vm-backups/{vm}/2") and name.endswith(".json")
        ]
        assert await restored(house, f"/{backup}", "smb1") == digests(house)
