"""A crash after each single change on the remote, and the recovery from it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from proxy.remotes.recording import Change, Recording, replay
from proxy.repository import (
    clean_vm,
    delete_backups,
    list_all,
    list_vm_backups,
    lock_vm,
    old_entries,
    open_full_backup,
)
from tests.repository.conftest import NOON, VM, metadata_of, open_local, xva_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes.interface import Remote


async def run(remote: Remote, timestamp: int, keep: int) -> None:
    """One run of a job: lock, write, retention, clean, unlock."""
    data = xva_bytes(timestamp)
    async with lock_vm(remote, VM, owner="run") as lock:
        old = old_entries(keep - 1, await list_vm_backups(remote, VM))
        async with open_full_backup(remote, VM, timestamp) as writer:
            half = len(data) // 2
            await writer.write(data[:half])
            await writer.write(data[half:])
            await writer.commit(metadata_of(timestamp), hashlib.md5(data).digest())
        await delete_backups(remote, [backup.id for backup in old], locks={VM: lock})
        await clean_vm(remote, VM, lock=lock, warn=lambda message, data: None, min_age=0)


async def history(root: Path) -> list[Change]:
    """Three runs that keep two, a failed run, and a deletion."""
    remote = await open_local(root)
    recording = Recording(remote)
    for index in range(3):
        await run(recording, NOON + index * 60_000, keep=2)
    async with open_full_backup(recording, VM, NOON + 200_000) as writer:
        await writer.write(b"given up")
    await delete_backups(recording, [(await list_vm_backups(recording, VM))[0].id])
    assert len(await list_vm_backups(recording, VM)) == 1
    await remote.aclose()
    return recording.changes


@pytest.mark.parametrize("lose_unsynced", [False, True])
async def test_after_a_crash_at_any_change(tmp_path: Path, lose_unsynced: bool) -> None:
    changes = await history(tmp_path / "live")
    assert len(changes) > 40
    counts: set[int] = set()
    for upto in range(len(changes) + 1):
        root = tmp_path / str(upto)
        root.mkdir()
        replay(changes[:upto], root, lose_unsynced=lose_unsynced)
        for lock in root.glob("xo-vm-backups/*.lock"):
            lock.rmdir()  # the takeover of a dead lock is tested where locks are
        counts.add(await _recovers(root, f"after {upto} changes: {changes[upto - 1 : upto]}"))
    assert counts == {0, 1, 2, 3}


async def _recovers(root: Path, when: str) -> int:
    remote = await open_local(root)
    vm_dir = root / "xo-vm-backups" / VM
    before = await list_vm_backups(remote, VM)
    for backup in before:
        assert backup.xva is not None
        data = (vm_dir / backup.xva).read_bytes()
        assert data == xva_bytes(int(backup.timestamp)), when
        checksum = (vm_dir / f"{backup.xva}.checksum").read_bytes()
        assert checksum == b"$1$$" + hashlib.md5(data).hexdigest().encode(), when
    warnings: list[str] = []
    async with lock_vm(remote, VM, owner="recovery") as lock:
        await clean_vm(
            remote, VM, lock=lock, warn=lambda message, data: warnings.append(message), min_age=0
        )
    assert warnings == [], when
    listed = (await list_all(remote)).get(VM, [])
    assert listed == before, when
    stems = {backup.id.rpartition("/")[2].removesuffix(".json") for backup in listed}
    wanted = {f"{stem}{end}" for stem in stems for end in (".json", ".xva", ".xva.checksum")}
    assert {path.name for path in vm_dir.iterdir()} - {"cache.json.gz"} == wanted, when
    assert {path.name for path in vm_dir.parent.iterdir()} == {VM}, when
    await remote.aclose()
    return len(before)
