"""What a crash during an incremental backup may leave: recording, recovering, reading back."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

from xxhash import xxh3_128_hexdigest

from proxy.disks.disk import block_pool
from proxy.disks.opening import open_chain, open_disk
from proxy.formats import vhd_directory
from proxy.formats.vhd import BLOCK_SIZE, stream_size
from proxy.remotes.factory import RemoteOptions, opened_remote
from proxy.remotes.interface import Remote
from proxy.remotes.recording import Change, Recording, crash_states
from proxy.repository import clean_vm, list_vm_backups, lock_vm
from proxy.runtime.buffers import BufferPool
from proxy.runtime.threads import inline_threads

from .conftest import House, explained, files_of
from .test_incremental_backup import back_up, live

KIB = 1024
OPTIONS = RemoteOptions(disable_file_remotes=False)

EXPECTED_WARNINGS = {
    "unexpected number of entries in backup cache",
    "orphaned data file",
    "parent disk is missing",
}
"""What a recovery may say of a crash."""


@contextmanager
def recording(changes: list[Change]) -> Iterator[None]:
    """Let runs write what they do to their remotes into ``changes``."""

    @asynccontextmanager
    async def opened(spec: Mapping[str, Any], *, options: RemoteOptions) -> AsyncIterator[Remote]:
        async with opened_remote(spec, options=options) as remote:
            recorder = Recording(remote)
            recorder.changes = changes
            yield recorder

    with mock.patch("proxy.jobs.services.opened_remote", opened):
        yield


@dataclass(frozen=True)
class Content:
    """A disk of the pool: its size, and of each block a digest."""

    size: int
    blocks: list[str]
    sha256: list[str]
    """The same, as programs of others can tell it."""

    @classmethod
    def of(cls, data: bytes) -> Content:
        parts = [data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE)]
        return cls(
            len(data),
            [xxh3_128_hexdigest(part) for part in parts],
            [sha256(part).hexdigest() for part in parts],
        )

    def holes(self) -> set[int]:
        """The blocks that are zeros."""
        return {index for index, block in enumerate(self.blocks) if block == _ZEROS}


_ZEROS = xxh3_128_hexdigest(bytes(BLOCK_SIZE))


@dataclass
class Tale:
    """A history of one VM's backups on one remote, the last part of it recorded."""

    house: House
    remote: str
    changes: list[Change] = field(default_factory=list[Change])
    contents: dict[str, dict[str, Content]] = field(default_factory=dict[str, "dict[str, Content]"])
    """Of each backup that ever was, the disks by the uuid of the live one."""
    lasting: set[str] = field(default_factory=set[str])
    """Backups that no crash may take."""
    pool: BufferPool = field(default_factory=lambda: block_pool(4))
    decoded: Callable[..., bytes] = field(default_factory=lambda: cache(vhd_directory.decompress))

    @property
    def start(self) -> Path:
        return self.house.root / "start"

    @property
    def vm(self) -> str:
        return self.house.pool.vm_uuid("vm1")

    def write(self, block: int, fill: int, disk: int = 0) -> None:
        """What a guest does: some bytes in the middle of one block, the rest stays."""
        uuid = live(self.house)[disk]
        self.house.pool.write(uuid, block * BLOCK_SIZE + 12 * KIB, bytes([fill]) * 8 * KIB)

    async def back_up(self, **settings: Any) -> None:
        before = set(self.house.backups(self.remote))
        outcome = await back_up(self.house, self.remote, **settings)
        assert outcome.status == "success", outcome.snapshot
        pool = self.house.pool
        for backup in set(self.house.backups(self.remote)) - before:
            self.contents[backup] = {
                uuid: Content.of(b"".join(pool.disk_bytes(uuid))) for uuid in live(self.house)
            }

    @contextmanager
    def told(self) -> Iterator[list[Change]]:
        """The part that crashes; what is there before and after it lasts."""
        folder = self.house.folder(self.remote)
        folder.mkdir(exist_ok=True)
        shutil.copytree(folder, self.start)
        before = set(self.house.backups(self.remote))
        self.changes.clear()
        yield self.changes
        self.lasting = before & set(self.house.backups(self.remote))

    def states(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        return crash_states(self.changes, start=self.start)

    @asynccontextmanager
    async def opened(self, root: Path) -> AsyncIterator[Remote]:
        """The remote at ``root``, as the next run finds it."""
        spec = self.house.remote_spec(self.remote)
        url = str(spec["url"]).replace(str(self.house.folder(self.remote)), str(root))
        for lock in root.glob("xo-vm-backups/*.lock"):
            lock.rmdir()  # the takeover of a dead lock is tested where locks are
        async with opened_remote({**spec, "url": url}, options=OPTIONS) as remote:
            yield remote

    async def recover(self, remote: Remote, changed: Remote | None = None) -> list[str]:
        """What the next run does before anything else; the warnings."""
        warnings: list[str] = []
        async with lock_vm(remote, self.vm, owner="recovery") as lock:
            await clean_vm(
                changed or remote,
                self.vm,
                lock=lock,
                warn=lambda message, data: warnings.append(message),
                merge=True,
                min_age=0,
            )
        return warnings

    async def check(self, root: Path, when: str) -> None:
        """All that is promised of the state at ``root``, before and after its recovery."""
        # A hop to a thread costs more than what most of these reads and writes do; and the
        # states have nearly all blocks in common.
        with inline_threads(), mock.patch.object(vhd_directory, "decompress", self.decoded):
            await self._check(root, when)

    async def _check(self, root: Path, when: str) -> None:
        async with self.opened(root) as remote:
            backups = metadata_of(root)
            assert set(backups) >= self.lasting, f"{when}: a backup is missing"
            await self.reads(remote, backups, f"{when}: before the recovery")
            warnings = await self.recover(remote)
            assert set(warnings) <= EXPECTED_WARNINGS, (when, warnings)
            await self.check_recovered(root, remote, set(backups), when)
            again = Recording(remote)
            warnings = await self.recover(remote, again)
            assert warnings == [], when
            assert again.changes == [], f"{when}: the second recovery had something to do"

    async def check_recovered(
        self, root: Path, remote: Remote, expected: set[str], when: str
    ) -> None:
        backups = metadata_of(root)
        assert set(backups) == expected, f"{when}: the recovery changed what there is"
        listed = [backup.id for backup in await list_vm_backups(remote, self.vm)]
        assert listed == sorted(expected), f"{when}: the listing"
        # checksums may be missing: without them a verify calls a disk unknown
        assert {name for name in files_of(root) if not name.endswith(".xxh3")} == {
            name for name in explained(root) if not name.endswith(".xxh3")
        }, f"{when}: files that no backup has"
        await self.reads(remote, backups, f"{when}: after the recovery")
        for backup, metadata in backups.items():
            await self.is_true(remote, metadata, f"{when}: {backup}")

    async def reads(self, remote: Remote, backups: Mapping[str, Any], when: str) -> None:
        """Every disk of every backup, byte for byte."""
        for backup, metadata in backups.items():
            contents = self.contents[backup]
            disks = {path.split("/")[2]: path for path in metadata["vhds"].values()}
            assert set(disks) == set(contents), f"{when}: the disks of {backup}"
            for uuid, path in disks.items():
                full = f"xo-vm-backups/{self.vm}/{path}"
                await reads_as(remote, full, contents[uuid], self.pool, f"{when}: {path}")

    async def is_true(self, remote: Remote, metadata: Mapping[str, Any], when: str) -> None:
        """What metadata says of its disks, once no merge is under way."""
        size = 0
        for reference, path in metadata["vhds"].items():
            async with open_chain(remote, f"xo-vm-backups/{self.vm}/{path}") as chain:
                is_differencing = len(chain.disks) > 1
            async with open_disk(remote, f"xo-vm-backups/{self.vm}/{path}") as disk:
                size += stream_size(disk.header.max_entries, len(disk.blocks))
            assert metadata["isVhdDifferencing"][reference] == is_differencing, when
        assert metadata["size"] == size, f"{when}: its size"


def metadata_of(root: Path) -> dict[str, Any]:
    """The metadata of each backup at ``root``, by id."""
    base = root / "xo-vm-backups"
    return {
        f"/xo-vm-backups/{path.relative_to(base)}": json.loads(path.read_bytes())
        for path in sorted(base.glob("*/*.json"))
    }


async def reads_as(
    remote: Remote, path: str, content: Content, pool: BufferPool, when: str
) -> None:
    async with open_chain(remote, path) as chain:
        assert not chain.is_differencing, when
        assert chain.virtual_size == content.size, when
        assert set(range(len(content.blocks))) - set(chain.blocks) <= content.holes(), when
        async with chain.read(pool) as reader:
            while (block := await reader.next()) is not None:
                found = xxh3_128_hexdigest(block.data)
                block.buffer.release()
                assert found == content.blocks[block.index], f"{when}: block {block.index}"
