from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest
import trio

from proxy.errors import Busy, Corrupt, Many, Refused
from proxy.repository import delete_backups, format_listing, list_vm_backups, lock_vm
from tests.repository.conftest import NOON, VM, Watched, place_recorded, recorded, write_full

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes.interface import Remote
    from proxy.remotes.wrapper import Operation

OLD, NEW = "20261124T015859Z", "20261124T015901Z"
OTHER = "11111111-2222-4333-8444-555555555555"


def names(vm_dir: Path) -> list[str]:
    return sorted(path.name for path in vm_dir.iterdir())


@pytest.fixture
def full(remote: Remote, root: Path, vm_dir: Path) -> Path:
    place_recorded("full", root)
    for name in (OLD, NEW):
        (vm_dir / f"{name}.xva").write_bytes(b"data")
    return vm_dir


async def test_a_recorded_id_is_deleted_as_recorded(remote: Remote, full: Path) -> None:
    await delete_backups(remote, [f"/xo-vm-backups/{VM}/{NEW}.json"])
    assert names(full) == [f"{OLD}.json", f"{OLD}.xva", f"{OLD}.xva.checksum", "cache.json.gz"]
    listed = [format_listing(backup, "remote1") for backup in await list_vm_backups(remote, VM)]
    assert listed == recorded("full/listing-after-delete.json")["remote1"][VM]
    assert list(json.loads(gzip.decompress((full / "cache.json.gz").read_bytes()))) == [
        f"/xo-vm-backups/{VM}/{OLD}.json"
    ]


async def test_remotes_weakness_8_metadata_data_and_checksum_go_one_after_the_other(
    remote: Remote, full: Path
) -> None:
    """Upstream removes metadata and data at once, so that a crash can leave a backup without
    data, and nobody waits for the end of the checksum."""
    order: list[str] = []

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "unlink" and done:
            order.append(operation.path.rpartition("/")[2])

    await delete_backups(Watched(remote, step), [f"/xo-vm-backups/{VM}/{NEW}.json"])
    assert order == [f"{NEW}.json", f"{NEW}.xva", f"{NEW}.xva.checksum"]


async def test_a_cancel_lets_the_backup_at_hand_go_whole(remote: Remote, full: Path) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "unlink" and done:
            scope.cancel()

    with trio.CancelScope() as scope:
        paths = [f"/xo-vm-backups/{VM}/{name}.json" for name in (NEW, OLD)]
        await delete_backups(Watched(remote, step), paths)
    assert scope.cancelled_caught
    assert names(full) == [f"{OLD}.json", f"{OLD}.xva", f"{OLD}.xva.checksum", "cache.json.gz"]
    assert len(await list_vm_backups(remote, VM)) == 1


async def test_metadata_that_stays_keeps_its_data(remote: Remote, full: Path) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "unlink" and operation.path.endswith(f"{NEW}.json"):
            raise Refused("immutable", code="EPERM")

    paths = [f"/xo-vm-backups/{VM}/{name}.json" for name in (NEW, OLD)]
    with pytest.raises(Refused):
        await delete_backups(Watched(remote, step), paths)
    assert names(full) == [f"{NEW}.json", f"{NEW}.xva", f"{NEW}.xva.checksum", "cache.json.gz"]


async def test_several_failures_are_told_together(remote: Remote, full: Path) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "unlink":
            raise Refused("immutable", code="EPERM")

    paths = [f"/xo-vm-backups/{VM}/{name}.json" for name in (NEW, OLD)]
    with pytest.raises(Many) as caught:
        await delete_backups(Watched(remote, step), paths)
    assert len(caught.value.errors) == 2


async def test_a_missing_backup_only_leaves_the_cache(remote: Remote, full: Path) -> None:
    """Upstream lists ghosts until a clean; a client that deletes one gets no error."""
    (full / f"{NEW}.json").unlink()
    await delete_backups(remote, [f"/xo-vm-backups/{VM}/{NEW}.json"])
    assert f"{NEW}.xva" in names(full), "without metadata its data is the clean's"
    assert len(json.loads(gzip.decompress((full / "cache.json.gz").read_bytes()))) == 1


async def test_an_unknown_vm_is_no_error_and_makes_no_directory(remote: Remote, root: Path) -> None:
    await delete_backups(remote, [f"/xo-vm-backups/{OTHER}/{NEW}.json"])
    assert not (root / "xo-vm-backups").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [(b'{"mode":"new","vm":{}}', Refused), (b'{"vm":{}}', Refused), (b"{", Corrupt)],
)
async def test_one_that_is_not_understood_keeps_all(
    remote: Remote, full: Path, content: bytes, error: type[Exception]
) -> None:
    (full / f"{OLD}.json").write_bytes(content)
    before = names(full)
    with pytest.raises(error):
        await delete_backups(remote, [f"/xo-vm-backups/{VM}/{name}.json" for name in (NEW, OLD)])
    assert names(full) == before


async def test_a_malformed_id_keeps_all(remote: Remote, full: Path) -> None:
    before = names(full)
    with pytest.raises(Refused):
        await delete_backups(
            remote, [f"/xo-vm-backups/{VM}/{NEW}.json", f"/xo-vm-backups/{VM}/../x.json"]
        )
    assert names(full) == before


async def test_a_vm_whose_backup_runs_is_busy(remote: Remote, full: Path) -> None:
    """Upstream deletes without the lock."""
    path = f"/xo-vm-backups/{VM}/{NEW}.json"
    async with lock_vm(remote, VM, owner="a run") as lock:
        with pytest.raises(Busy):
            await delete_backups(remote, [path])
        assert f"{NEW}.json" in names(full)
        await delete_backups(remote, [path], locks={VM: lock})
        assert f"{NEW}.json" not in names(full)
    assert names(full.parent) == [VM]


async def test_a_lost_lock_stops_the_deletion(remote: Remote, full: Path) -> None:
    class Lost:
        async def check(self) -> None:
            raise Busy("lost")

    before = names(full)
    with pytest.raises(Busy):
        await delete_backups(remote, [f"/xo-vm-backups/{VM}/{NEW}.json"], locks={VM: Lost()})
    assert names(full) == before


@pytest.mark.parametrize("xva", ["../other/x.xva", "/etc/passwd", f"./{OLD}.xva", ".", None])
async def test_data_that_is_not_its_own_is_kept(
    remote: Remote, full: Path, xva: str | None
) -> None:
    metadata = json.loads((full / f"{NEW}.json").read_bytes()) | {"xva": xva}
    (full / f"{NEW}.json").write_text(json.dumps(metadata))
    (full / "cache.json.gz").unlink()
    await delete_backups(remote, [f"/xo-vm-backups/{VM}/{NEW}.json"])
    assert names(full) == [
        f"{OLD}.json",
        f"{OLD}.xva",
        f"{OLD}.xva.checksum",
        f"{NEW}.xva",
        f"{NEW}.xva.checksum",
        "cache.json.gz",
    ]


async def test_data_that_unreadable_metadata_may_need_is_kept(remote: Remote, full: Path) -> None:
    metadata = json.loads((full / f"{NEW}.json").read_bytes()) | {"xva": f"./{OLD}.xva"}
    (full / f"{NEW}.json").write_text(json.dumps(metadata))
    (full / f"{OLD}.json").write_bytes(b"")
    await delete_backups(remote, [f"/xo-vm-backups/{VM}/{NEW}.json"])
    assert f"{OLD}.xva" in names(full)


async def test_disks_of_a_delta_stay_for_the_clean(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("delta", root)
    disk = vm_dir / "vdis" / "job" / "vdi" / "20261124T015412Z.vhd"
    disk.parent.mkdir(parents=True)
    disk.write_bytes(b"disk")
    await delete_backups(remote, [f"/xo-vm-backups/{VM}/20261124T015412Z.json"])
    assert disk.exists()
    assert names(vm_dir) == ["20261124T015414Z.json", "cache.json.gz", "vdis"]


async def test_several_vms_and_the_same_id_twice(remote: Remote, full: Path, root: Path) -> None:
    await write_full(remote, NOON + 60_000)
    ids = [f"/xo-vm-backups/{VM}/{NEW}.json", f"xo-vm-backups/{VM}/{NEW}.json"]
    await delete_backups(remote, [*ids, f"/xo-vm-backups/{OTHER}/{NEW}.json"])
    assert len(await list_vm_backups(remote, VM)) == 2
    assert not (root / "xo-vm-backups" / OTHER).exists()
