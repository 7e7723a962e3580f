from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import Busy, Refused, Unreachable
from proxy.repository import clean_vm, is_valid_xva, list_vm_backups, lock_vm
from tests.repository.conftest import (
    NOON,
    VM,
    Watched,
    open_local,
    write_full,
    xva_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes.interface import Remote
    from proxy.remotes.wrapper import Operation

NAME = "20261124T015901Z"
OTHER = "20260101T000000Z"
WHOLE = {f"{NAME}.json", f"{NAME}.xva", f"{NAME}.xva.checksum", "cache.json.gz"}


def names(vm_dir: Path) -> set[str]:
    return {path.name for path in vm_dir.iterdir()}


def place(vm_dir: Path, name: str, content: bytes = b"x", *, age: float = 7200) -> None:
    path = vm_dir / name
    path.write_bytes(content)
    then = time.time() - age
    os.utime(path, (then, then))


async def clean(remote: Remote, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    warnings: list[tuple[str, dict[str, Any]]] = []

    def warn(message: str, data: dict[str, Any]) -> None:
        warnings.append((message, data))

    async with lock_vm(remote, VM, owner="clean") as lock:
        result = await clean_vm(remote, VM, lock=lock, warn=warn, **options)
    assert result == {"merge": False, "size": 0}
    return warnings


async def test_a_whole_backup_is_left_alone(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)
    assert await clean(remote, min_age=0) == []
    assert names(vm_dir) == WHOLE


@pytest.mark.parametrize(
    "name",
    [
        f"{OTHER}.xva",
        f"{OTHER}.xva.checksum",
        f".1795485541901.{OTHER}.xva",
        f".1795485541901.{OTHER}.xva.tmp",
        f".1795485541901.{OTHER}.json.tmp",
        f".1795485541901.{NAME}.xva",
        ".1795485541901.cache.json.gz.tmp",
    ],
)
async def test_what_dead_writers_left_goes_when_it_is_old(
    remote: Remote, vm_dir: Path, name: str
) -> None:
    await write_full(remote)
    place(vm_dir, name, age=600)
    assert await clean(remote) == []
    assert name in names(vm_dir), "perhaps its writer lives"
    place(vm_dir, name, age=-7200)
    await clean(remote)
    assert name in names(vm_dir), "a time in the future is no age"
    place(vm_dir, name)
    await clean(remote)
    assert names(vm_dir) == WHOLE


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "vdis.vhd",
        ".hidden",
        ".1795485541901.notes.txt",
        "backup.xva",
        f"{OTHER}.xva.old",
        f"{OTHER}.vhd",
    ],
)
async def test_what_is_not_known_stays(remote: Remote, vm_dir: Path, name: str) -> None:
    await write_full(remote)
    place(vm_dir, name)
    await clean(remote, min_age=0)
    assert names(vm_dir) == WHOLE | {name}


@pytest.mark.parametrize("content", [b"", b'{"vm":', b"[]", b'{"mode":"full"}', b"\0" * 512])
async def test_unreadable_metadata_stays_and_protects_its_data(
    remote: Remote, vm_dir: Path, content: bytes
) -> None:
    """Upstream removes metadata that does not parse, then its data."""
    await write_full(remote)
    for name in (f"{OTHER}.xva", f"{OTHER}.xva.checksum"):
        place(vm_dir, name)
    place(vm_dir, f"{OTHER}.json", content)
    warnings = await clean(remote, min_age=0)
    assert [message for message, _ in warnings] == [f"Issue loading {OTHER}.json"]
    assert names(vm_dir) == WHOLE | {f"{OTHER}{end}" for end in (".json", ".xva", ".xva.checksum")}


async def test_an_unknown_mode_stays_and_protects_its_data(remote: Remote, vm_dir: Path) -> None:
    """Upstream removes metadata of a mode that it does not know."""
    await write_full(remote)
    place(vm_dir, f"{OTHER}.json", b'{"mode":"newer","vm":{}}')
    place(vm_dir, f"{OTHER}.xva")
    warnings = await clean(remote, min_age=0)
    assert f"Issue loading {OTHER}.json" in [message for message, _ in warnings]
    assert {f"{OTHER}.json", f"{OTHER}.xva"} < names(vm_dir)


async def test_metadata_that_the_storage_fails_to_give_stays(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)

    class Failing(Watched):
        async def read_files(self, paths: Any, *, limit: int = 0) -> Any:
            return [Unreachable("EIO") for _ in paths]

    watched = Failing(remote, lambda operation, done: None)
    await clean(watched, min_age=0)
    assert names(vm_dir) == WHOLE


async def test_a_directory_that_cannot_be_listed_ends_the_clean(
    remote: Remote, vm_dir: Path
) -> None:
    await write_full(remote)
    place(vm_dir, f"{OTHER}.xva")

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "list":
            raise Unreachable("EIO", code="EIO")

    with pytest.raises(Unreachable):
        await clean(Watched(remote, step), min_age=0)
    assert f"{OTHER}.xva" in names(vm_dir)


async def test_metadata_without_its_data_goes(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)
    await write_full(remote, NOON + 5_000)
    (vm_dir / f"{NAME}.xva").unlink()
    warnings = await clean(remote, min_age=0)
    assert ("XVA is missing", {"path": f"/xo-vm-backups/{VM}/{NAME}.xva"}) in warnings
    assert not any(name.startswith(NAME) for name in names(vm_dir))
    assert len(await list_vm_backups(remote, VM)) == 1


@pytest.mark.parametrize("verb", ["read.open", "read.read_at"])
async def test_data_that_cannot_be_looked_at_is_not_missing(
    remote: Remote, vm_dir: Path, verb: str
) -> None:
    """Upstream takes any error of the check for a valid archive."""
    await write_full(remote)

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == verb:
            raise Unreachable("EIO: input/output error", code="EIO")

    warnings = await clean(Watched(remote, step), min_age=0)
    assert [message for message, _ in warnings] == ["Issue while checking XVA"]
    assert names(vm_dir) == WHOLE


async def test_look_up_and_listing_must_agree_that_data_is_missing(
    remote: Remote, vm_dir: Path
) -> None:
    await write_full(remote)

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "read.open" and not done:
            (vm_dir / f"{NAME}.xva").rename(vm_dir / "away")

    warnings = await clean(Watched(remote, step), min_age=0)
    assert [message for message, _ in warnings] == ["Issue while checking XVA"]
    assert f"{NAME}.json" in names(vm_dir)


async def test_a_broken_archive_is_told_and_kept(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote, data=xva_bytes()[:2048])
    assert await clean(remote, min_age=0) == [
        ("XVA might be broken", {"path": f"/xo-vm-backups/{VM}/{NAME}.xva"}),
        (
            "This files may be corrupted but not yet to be removed",
            {"files": [f"{NAME}.json", f"{NAME}.xva", f"{NAME}.xva.checksum"]},
        ),
    ]
    assert names(vm_dir) == WHOLE


async def test_a_missing_checksum_and_a_wrong_cache_are_told(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)
    (vm_dir / f"{NAME}.xva.checksum").unlink()
    copy = (vm_dir / f"{NAME}.json").read_bytes()
    (vm_dir / f"{OTHER}.json").write_bytes(copy)
    messages = dict(await clean(remote, min_age=0))
    assert messages["unexpected number of entries in backup cache"] == {
        "path": f"/xo-vm-backups/{VM}/cache.json.gz",
        "actual": 1,
        "expected": 2,
    }
    assert "Checksum file not valid, not blocking" in messages
    assert await clean(remote, min_age=0)
    assert "unexpected number of entries in backup cache" not in dict(await clean(remote))


async def test_data_whose_metadata_appears_meanwhile_stays(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)
    place(vm_dir, f"{OTHER}.xva")

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "stat" and operation.path.endswith(f"{OTHER}.xva") and done:
            (vm_dir / f"{OTHER}.json").write_bytes(b"{}")

    await clean(Watched(remote, step), min_age=0)
    assert f"{OTHER}.xva" in names(vm_dir)


async def test_what_cannot_be_removed_is_told_and_the_rest_goes(
    remote: Remote, vm_dir: Path
) -> None:
    await write_full(remote)
    for name in (f"{OTHER}.xva", f"{OTHER}.xva.checksum"):
        place(vm_dir, name)

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "unlink" and operation.path.endswith(f"{OTHER}.xva"):
            raise Refused("EPERM: operation not permitted", code="EPERM")

    warnings = await clean(Watched(remote, step))
    assert [message for message, _ in warnings] == [f"Issue removing {OTHER}.xva"]
    assert names(vm_dir) == WHOLE | {f"{OTHER}.xva"}


async def test_a_lost_lock_ends_the_clean(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)
    place(vm_dir, f"{OTHER}.xva")

    class Lost:
        async def check(self) -> None:
            raise Busy("lost")

    with pytest.raises(Busy):
        await clean_vm(remote, VM, lock=Lost(), warn=lambda message, data: None)
    assert f"{OTHER}.xva" in names(vm_dir)


async def test_on_an_immutable_remote_metadata_stays(tmp_path: Path) -> None:
    remote = await open_local(tmp_path, is_immutable=True)
    vm_dir = tmp_path / "xo-vm-backups" / VM
    await write_full(remote)
    (vm_dir / f"{NAME}.xva").unlink()
    warnings = await clean(remote, min_age=0)
    assert warnings[0][0] == "XVA is missing"
    assert f"{NAME}.json" in names(vm_dir)
    await remote.aclose()


async def test_delta_metadata_that_names_no_disk_protects_all(remote: Remote, vm_dir: Path) -> None:
    await write_full(remote)
    disk = vm_dir / "vdis" / "job" / "vdi" / f".1795485541901.{OTHER}.vhd"
    disk.parent.mkdir(parents=True)
    disk.write_bytes(b"x")
    place(vm_dir, f"{OTHER}.json", b'{"mode":"delta","vm":{},"vhds":{"a":"vdis/none"}}')
    assert [message for message, _ in await clean(remote, min_age=0)] == [
        "unexpected number of entries in backup cache",
        "disk check error",
    ]
    assert names(vm_dir) == WHOLE | {"vdis", f"{OTHER}.json"}
    assert disk.exists()


async def test_no_directory_no_clean(remote: Remote) -> None:
    assert await clean(remote) == []


@pytest.mark.parametrize(
    ("content", "valid"),
    [
        (xva_bytes(), True),
        (xva_bytes()[:2048], False),
        (xva_bytes()[:-1], False),
        (b"\0" * 1024, False),
        (b"\x1f\x8b" + b"g" * 30, True),
        (b"\x28\xb5\x2f\xfd" + b"z" * 30, True),
        (b"\x1f\x8b", False),
        (b"", False),
    ],
)
async def test_archives_are_known_by_their_ends(
    remote: Remote, content: bytes, valid: bool
) -> None:
    await remote.write_file("x.xva", content)
    assert await is_valid_xva(remote, "x.xva") is valid
    assert await is_valid_xva(remote, "x.xva", size=len(content)) is valid
    assert not await is_valid_xva(remote, "x.xva", size=len(content) + 1)
