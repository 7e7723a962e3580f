from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from proxy.errors import Refused, Unreachable
from proxy.repository import format_listing, list_all, list_vm_backups, total_backup_size
from proxy.repository.cache import refresh_cache
from tests.repository.conftest import (
    NOON,
    VM,
    Watched,
    open_local,
    place_recorded,
    recorded,
    write_full,
)

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.remotes.interface import Remote
    from proxy.remotes.wrapper import Operation
    from proxy.repository import Backup

OTHER = "11111111-2222-4333-8444-555555555555"


def cache_of(vm_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress((vm_dir / "cache.json.gz").read_bytes()))
    return content


def set_cache(vm_dir: Path, content: Any) -> None:
    (vm_dir / "cache.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))


def names(backups: list[Backup]) -> list[str]:
    return [backup.id.rpartition("/")[2] for backup in backups]


@pytest.mark.parametrize("name", ["full", "delta"])
async def test_a_recorded_remote_is_listed_as_recorded(
    remote: Remote, root: Path, name: str
) -> None:
    place_recorded(name, root)
    listed = {
        vm: [format_listing(backup, "remote1") for backup in backups]
        for vm, backups in (await list_all(remote)).items()
    }
    answer = {"remote1": listed}
    wanted = recorded(f"{name}/listing.json")
    assert msgspec.json.encode(answer) == json.dumps(wanted, separators=(",", ":")).encode()


async def test_the_recorded_total(remote: Remote, root: Path, vm_dir: Path) -> None:
    place_recorded("delta", root)
    assert await total_backup_size(remote) == 14688768 + 4200448
    (vm_dir / "20261124T015412Z.json").unlink()
    assert await total_backup_size(remote) == recorded("delta/total.json")["onDisk"]


async def test_the_cache_we_make_is_the_one_upstream_makes(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("full", root)
    upstream = cache_of(vm_dir)
    (vm_dir / "cache.json.gz").unlink()
    await list_vm_backups(remote, VM)
    ours = cache_of(vm_dir)
    assert list(ours) == list(upstream)
    for path, entry in ours.items():
        assert entry.pop("isImmutable") is False
        assert entry == upstream[path]
        assert entry["_filename"] == entry["id"] == path


async def test_a_good_cache_is_used_and_not_rewritten(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("full", root)
    before = (vm_dir / "cache.json.gz").stat().st_ino
    for path in vm_dir.glob("*.json"):
        path.write_text("not read")
    assert len(await list_vm_backups(remote, VM)) == 2
    assert (vm_dir / "cache.json.gz").stat().st_ino == before


async def test_ghosts_in_the_cache_are_not_listed(remote: Remote, root: Path, vm_dir: Path) -> None:
    """Upstream believes the cache: entries stay whose metadata was removed."""
    place_recorded("full", root)
    (vm_dir / "20261124T015901Z.json").unlink()
    assert names(await list_vm_backups(remote, VM)) == ["20261124T015859Z.json"]
    assert list(cache_of(vm_dir)) == [f"/xo-vm-backups/{VM}/20261124T015859Z.json"]


async def test_a_backup_that_the_cache_lacks_is_listed(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("full", root)
    entries = cache_of(vm_dir)
    gone = entries.pop(f"/xo-vm-backups/{VM}/20261124T015859Z.json")
    set_cache(vm_dir, entries)
    assert len(await list_vm_backups(remote, VM)) == 2
    healed = cache_of(vm_dir)[gone["id"]]
    assert healed == gone | {"isImmutable": False}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        gzip.compress(b"{}", mtime=0)[:-4],
        gzip.compress(b"[]", mtime=0),
        gzip.compress(b'{"a":', mtime=0),
        gzip.compress(b'{"/a":5}', mtime=0),
        gzip.compress(b"[" * 100_000, mtime=0),
        gzip.compress(b"null", mtime=0),
    ],
)
async def test_a_bad_cache_is_made_anew(
    remote: Remote, root: Path, vm_dir: Path, content: bytes
) -> None:
    place_recorded("full", root)
    (vm_dir / "cache.json.gz").write_bytes(content)
    assert len(await list_vm_backups(remote, VM)) == 2
    assert len(cache_of(vm_dir)) == 2


async def test_a_cache_that_unpacks_without_end_is_ignored(
    remote: Remote, root: Path, vm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.repository.cache._LARGEST", 100_000)
    place_recorded("full", root)
    (vm_dir / "cache.json.gz").write_bytes(gzip.compress(b" " * 10_000_000))
    assert len(await list_vm_backups(remote, VM)) == 2


async def test_a_bad_entry_in_the_cache_is_read_from_its_file(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("full", root)
    entries = cache_of(vm_dir)
    set_cache(vm_dir, {path: 5 if "15859" in path else entry for path, entry in entries.items()})
    assert len(await list_vm_backups(remote, VM)) == 2
    assert cache_of(vm_dir)[f"/xo-vm-backups/{VM}/20261124T015859Z.json"]["mode"] == "full"


@pytest.mark.parametrize("content", [b"", b'{"vm":', b"{}", b'{"mode":"full"}', b"\x00" * 4096])
async def test_one_unreadable_backup_hides_no_other_and_stays(
    remote: Remote, root: Path, vm_dir: Path, content: bytes
) -> None:
    place_recorded("full", root)
    bad = vm_dir / "20261124T015900Z.json"
    bad.write_bytes(content)
    for _ in range(2):
        assert len(await list_vm_backups(remote, VM)) == 2
        assert len((await list_all(remote))[VM]) == 2
    assert bad.read_bytes() == content


async def test_what_is_no_backup_is_not_listed(remote: Remote, root: Path, vm_dir: Path) -> None:
    place_recorded("full", root)
    (vm_dir / ".1795485541901.20261124T015901Z.json").write_bytes(
        (vm_dir / "20261124T015901Z.json").read_bytes()
    )
    (vm_dir / "directory.json").mkdir()
    (root / "xo-vm-backups" / f"{VM}.lock").mkdir()
    (root / "xo-vm-backups" / ".queue").mkdir()
    (root / "xo-vm-backups" / "file").write_text("")
    listed = await list_all(remote)
    assert list(listed) == [VM]
    assert len(listed[VM]) == 2


async def test_nothing_there_is_an_empty_list(remote: Remote, root: Path) -> None:
    assert await list_all(remote) == {}
    assert await list_vm_backups(remote, VM) == []
    (root / "xo-vm-backups" / VM).mkdir(parents=True)
    assert await list_all(remote) == {}
    assert await total_backup_size(remote) == 0


async def test_oldest_first(remote: Remote) -> None:
    for timestamp in (NOON, NOON - 5_000, NOON + 5_000):
        await write_full(remote, timestamp)
    times = [backup.timestamp for backup in await list_vm_backups(remote, VM)]
    assert times == [NOON - 5_000, NOON, NOON + 5_000]


async def test_an_immutable_remote_has_no_cache(tmp_path: Path) -> None:
    remote = await open_local(tmp_path, is_immutable=True)
    await write_full(remote)
    assert len(await list_vm_backups(remote, VM)) == 1
    assert not list(tmp_path.rglob("cache*"))
    await remote.aclose()


async def test_updates_of_the_cache_are_not_lost(remote: Remote, vm_dir: Path) -> None:
    """Upstream synchronises by the text of the path, per adapter: updates get lost."""
    await write_full(remote)
    raw = (vm_dir / "20261124T015901Z.json").read_bytes()

    updating = most = 0

    def step(operation: Operation, done: bool) -> None:
        nonlocal updating, most
        if operation.verb == "list" and not done:
            updating += 1
            most = max(most, updating)

    async def one(index: int) -> None:
        nonlocal updating
        path = f"/xo-vm-backups/{VM}/20260101T0000{index:02}Z.json"
        await remote.write_file(path, raw)
        # each has its own object for the same remote, as two calls have
        await refresh_cache(Watched(remote, step), VM, {path: raw})
        updating -= 1

    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(one, index)
    assert len(cache_of(vm_dir)) == 21
    assert most == 1, "one update at a time"


async def test_a_cache_that_cannot_be_written_fails_nothing(remote: Remote, root: Path) -> None:
    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "write_file" and "cache" in operation.path:
            raise Refused("no space", code="ENOSPC")

    watched = Watched(remote, step)
    await write_full(watched)
    assert len(await list_vm_backups(watched, VM)) == 1
    place_recorded("full", root)


async def test_a_directory_that_cannot_be_read_is_an_error_not_an_empty_list(
    remote: Remote,
) -> None:
    await write_full(remote)

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "list" and operation.path.endswith(VM):
            raise Refused("no", code="EACCES")

    with pytest.raises(Refused):
        await list_vm_backups(Watched(remote, step), VM)


async def test_one_vm_that_cannot_be_read_does_not_hide_the_others(
    remote: Remote, root: Path
) -> None:
    """Upstream: one bad entry makes the whole remote's list fail."""
    place_recorded("full", root)
    (root / "xo-vm-backups" / OTHER).mkdir()

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "list" and operation.path.endswith(OTHER):
            raise Refused("no", code="EACCES")

    assert list(await list_all(Watched(remote, step))) == [VM]


async def test_a_remote_that_stops_answering_fails_the_list(remote: Remote, root: Path) -> None:
    place_recorded("full", root)

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "list" and operation.path.endswith(VM):
            raise Unreachable("gone", code="ESTALE")

    with pytest.raises(Unreachable):
        await list_all(Watched(remote, step))


async def test_a_file_removed_while_listing_is_not_listed(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("full", root)
    (vm_dir / "cache.json.gz").unlink()

    def step(operation: Operation, done: bool) -> None:
        if operation.verb == "read_files":
            (vm_dir / "20261124T015859Z.json").unlink(missing_ok=True)

    assert names(await list_vm_backups(Watched(remote, step), VM)) == ["20261124T015901Z.json"]


async def test_metadata_larger_than_usual_is_listed_and_cached(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_recorded("full", root)
    path = vm_dir / "20261124T015901Z.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"vtpms": ["x" * 2**19]}))
    (vm_dir / "cache.json.gz").unlink()
    assert len(await list_vm_backups(remote, VM)) == 2
    assert len(cache_of(vm_dir)) == 2


async def test_metadata_beyond_any_measure_is_left_out(
    remote: Remote, root: Path, vm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.repository.cache._USUAL", 1000)
    monkeypatch.setattr("proxy.repository.cache.LIMIT", 8000)
    place_recorded("full", root)
    path = vm_dir / "20261124T015901Z.json"
    path.write_text(path.read_text() + " " * 10_000)
    (vm_dir / "cache.json.gz").unlink()
    assert names(await list_vm_backups(remote, VM)) == ["20261124T015859Z.json"]


async def test_more_than_a_cache_may_hold_is_listed_without(
    remote: Remote, root: Path, vm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.repository.cache._LARGEST", 8000)
    place_recorded("full", root)
    (vm_dir / "cache.json.gz").unlink()
    assert len(await list_vm_backups(remote, VM)) == 2
    assert not (vm_dir / "cache.json.gz").exists()
