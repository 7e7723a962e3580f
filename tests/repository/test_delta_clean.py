"""Cleaning VMs with delta backups: what is merged, what goes, and above all what stays."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from proxy.disks import merge
from proxy.disks.merge_state import MergeState, state_path
from proxy.disks.opening import open_disk
from proxy.errors import Busy, Corrupt, Refused, Unreachable
from proxy.formats.vhd import stream_size
from proxy.remotes.faults import Fail, Faults, Gate
from proxy.remotes.recording import Recording, crash_states
from proxy.repository import clean_vm, list_vm_backups
from proxy.runtime.threads import inline_threads
from tests.disks.chains import (
    Held,
    Point,
    model,
    name_of,
    place_chain,
    place_disk,
    tags,
)
from tests.disks.directories import identity
from tests.repository.conftest import VM, open_local

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from proxy.remotes.interface import Remote

DISKS = ("vdis/job/one", "vdis/job/two")
TIMES = [f"2026010{day}T000000Z" for day in range(1, 9)]
CHAIN = [Point({0: 1, 1: 2}), Point({1: 3, 2: 4}), Point({0: 5, 2: 6}), Point({3: 7})]


def as_files(points: Sequence[Point]) -> list[Point]:
    return [Point(point.blocks, "file", point.count) for point in points]


def place_backup(vm_dir: Path, number: int, disks: Mapping[str, str], **more: Any) -> Path:
    """``<TS>.json`` of a delta backup; ``disks`` by reference, from the VM's directory."""
    path = vm_dir / f"{TIMES[number]}.json"
    record = {
        "isVhdDifferencing": dict.fromkeys(disks, number > 0),
        "jobId": "job",
        "mode": "delta",
        "scheduleId": "schedule",
        "timestamp": 1_767_225_600_000 + number * 86_400_000,
        "version": "2.0.0",
        "vhds": dict(disks),
        "vm": {"uuid": VM, "name_label": "vm"},
        "size": 1,
        **more,
    }
    path.write_text(json.dumps(record, separators=(",", ":")))
    return path


def place_vm(
    vm_dir: Path,
    points: Sequence[Point],
    backups: Sequence[int],
    disks: Sequence[str] = DISKS[:1],
) -> list[str]:
    """A VM whose ``disks`` are all ``points``; its paths of the first disk, from the root."""
    vm_dir.mkdir(parents=True, exist_ok=True)
    for disk in disks:
        place_chain(vm_dir, disk, points)
    for number in backups:
        named = {
            f"OpaqueRef:{disk[-3:]}": f"{disk}/{name_of(number, points[number])}" for disk in disks
        }
        place_backup(vm_dir, number, named)
    return [
        f"xo-vm-backups/{VM}/{disks[0]}/{name_of(number, each)}"
        for number, each in enumerate(points)
    ]


async def clean(remote: Remote, **options: Any) -> tuple[dict[str, Any], list[str]]:
    warnings: list[str] = []
    result = await clean_vm(
        remote,
        VM,
        lock=options.pop("lock", Held()),
        warn=lambda message, data: warnings.append(message),
        **{"merge": True, "min_age": 0, **options},
    )
    return result, warnings


def tree(vm_dir: Path) -> set[str]:
    """Files and the top of each data directory, without the cache."""
    found: set[str] = set()
    for path in vm_dir.rglob("*"):
        name = path.relative_to(vm_dir).as_posix()
        is_known = path.is_file() and "/data/" not in name and name != "cache.json.gz"
        if is_known or (path.parent.name == "data" and path.parents[2].name == "job"):
            found.add(name)
    return found


def disk_names(disk: str, *numbers: int, kind: str = "brotli") -> set[str]:
    return {f"{disk}/{name_of(number, Point({}, kind))}" for number in numbers}


def metadata(*numbers: int) -> set[str]:
    return {f"{TIMES[number]}.json" for number in numbers}


# -- merging


async def test_backups_that_are_gone_are_merged_into_the_next(remote: Remote, vm_dir: Path) -> None:
    chain = place_vm(vm_dir, CHAIN, [2, 3], DISKS)
    told: list[tuple[list[str], int, int]] = []

    @contextlib.asynccontextmanager
    async def progress(merged: Sequence[str]) -> AsyncIterator[Any]:
        yield lambda done, total: told.append((list(merged), done, total))

    result, warnings = await clean(remote, progress=progress)
    one = stream_size(4, 3)
    assert result == {"merge": True, "size": 2 * one}
    assert warnings == []
    assert [(len(merged), done, total) for merged, done, total in told] == [
        (3, 0, 3),
        (3, 3, 3),
    ] * 2
    assert tree(vm_dir) == metadata(2, 3) | {
        name
        for disk in DISKS
        for name in disk_names(disk, 2, 3)
        | {f"{disk}/data/{TIMES[0]}.vhd", f"{disk}/data/{TIMES[3]}.vhd"}
    }
    assert await tags(remote, chain[2]) == {0: 5, 1: 3, 2: 6}
    assert await tags(remote, chain[3]) == model(CHAIN)
    merged = json.loads((vm_dir / f"{TIMES[2]}.json").read_bytes())
    assert merged["size"] == 2 * one
    assert merged["isVhdDifferencing"] == {"OpaqueRef:one": False, "OpaqueRef:two": False}
    assert list(merged)[:3] == ["isVhdDifferencing", "jobId", "mode"]
    untouched = json.loads((vm_dir / f"{TIMES[3]}.json").read_bytes())
    assert (untouched["size"], untouched["isVhdDifferencing"]["OpaqueRef:one"]) == (1, True)
    cache = json.loads(gzip.decompress((vm_dir / "cache.json.gz").read_bytes()))
    assert cache[f"/xo-vm-backups/{VM}/{TIMES[2]}.json"]["size"] == 2 * one
    assert await clean(remote) == ({"merge": False, "size": 0}, [])


async def test_the_size_is_that_of_all_disks_and_each_says_what_it_is(
    remote: Remote, vm_dir: Path
) -> None:
    """Upstream counts only what it merged, and calls every disk full (weakness 8)."""
    place_vm(vm_dir, CHAIN[:2], [0, 1])
    place_chain(vm_dir, DISKS[1], CHAIN[:2])
    named = {
        "a": f"{DISKS[0]}/{name_of(1, CHAIN[1])}",
        "b": f"{DISKS[1]}/{name_of(1, CHAIN[1])}",
    }
    path = place_backup(vm_dir, 1, named)
    result, _ = await clean(remote)
    assert result == {"merge": True, "size": stream_size(4, 3)}
    record = json.loads(path.read_bytes())
    assert record["size"] == stream_size(4, 2) + stream_size(4, 3)
    assert record["isVhdDifferencing"] == {"a": True, "b": False}


async def test_a_chain_that_stands_on_an_older_backup_stays_differencing(
    remote: Remote, vm_dir: Path
) -> None:
    chain = place_vm(vm_dir, CHAIN, [0, 2, 3])
    await clean(remote)
    record = json.loads((vm_dir / f"{TIMES[2]}.json").read_bytes())
    assert record["isVhdDifferencing"] == {"OpaqueRef:one": True}
    for number in (0, 2, 3):
        assert await tags(remote, chain[number]) == model(CHAIN[: number + 1])


async def test_metadata_with_a_list_of_disks(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN[:2], [])
    place_backup(vm_dir, 1, {}, vhds=[f"./{DISKS[0]}/{name_of(1, CHAIN[1])}"])
    assert (await clean(remote))[0]["merge"]
    record = json.loads((vm_dir / f"{TIMES[1]}.json").read_bytes())
    assert (record["size"], record["isVhdDifferencing"]) == (stream_size(4, 3), {})


async def test_without_merge_everything_waits(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN, [2, 3])
    before = tree(vm_dir)
    assert await clean(remote, merge=False) == ({"merge": True, "size": 0}, [])
    assert tree(vm_dir) == before


async def test_on_an_immutable_remote_nothing_is_merged(tmp_path: Path) -> None:
    remote = await open_local(tmp_path, is_immutable=True)
    vm_dir = tmp_path / "xo-vm-backups" / VM
    place_vm(vm_dir, CHAIN, [2, 3])
    before = tree(vm_dir)
    assert (await clean(remote))[0]["size"] == 0
    assert tree(vm_dir) == before
    await remote.aclose()


async def test_the_queue_of_xen_orchestra_is_done_with(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    place_vm(vm_dir, CHAIN, [2, 3])
    queue = root / "xo-vm-backups/.queue/clean-vm"
    queue.mkdir(parents=True)
    for name, content in (
        ("20260101T000000Z-k3j9", VM),
        ("__20260101T000000Z-ab", VM),
        ("other", "5aa3f422-d502-4dca-b4e0-4b9862e119af"),
    ):
        (queue / name).write_text(content)
    await clean(remote, merge=False)
    assert len(list(queue.iterdir())) == 3
    await clean(remote)
    assert [path.name for path in queue.iterdir()] == ["other"]


async def test_a_failed_merge_is_told_and_others_go_on(
    remote: Remote, root: Path, vm_dir: Path
) -> None:
    chain = place_vm(vm_dir, CHAIN, [2, 3], DISKS)
    queue = root / "xo-vm-backups/.queue/clean-vm"
    queue.mkdir(parents=True)
    (queue / "x").write_text(VM)
    faults = Faults(remote)
    faults.add("rename_all", Fail(Refused("full", code="ENOSPC")), path="*/one/*")
    with pytest.raises(Refused):
        await clean(faults)
    assert (queue / "x").exists()
    assert not (vm_dir / DISKS[1] / name_of(0, CHAIN[0])).exists()
    assert (root / state_path(chain[0])).exists()
    assert await tags(remote, chain[2]) == model(CHAIN[:3])
    result, _ = await clean(remote)
    assert result == {"merge": True, "size": stream_size(4, 3)}
    assert await tags(remote, chain[2]) == model(CHAIN[:3])
    assert not (queue / "x").exists()


async def test_damage_is_not_merged(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN, [2, 3])
    (vm_dir / DISKS[0] / f"data/{TIMES[1]}.vhd/blocks/0/1").unlink()
    before = tree(vm_dir)
    with pytest.raises(Corrupt):
        await clean(remote)
    assert tree(vm_dir) == before


async def test_two_merges_at_once_on_one_remote(root: Path) -> None:
    remote = await open_local(root)
    faults = Faults(remote)
    gate = faults.add("rename_all", Gate(), times=3)
    vms = [f"fda19ed2-4e86-4644-a698-49{number:010}" for number in range(3)]
    for vm in vms:
        place_chain(root / "xo-vm-backups" / vm, DISKS[0], CHAIN[:2])
        place_backup(root / "xo-vm-backups" / vm, 1, {"a": f"{DISKS[0]}/{name_of(1, CHAIN[1])}"})
    async with trio.open_nursery() as nursery:
        for vm in vms:
            nursery.start_soon(_clean_one, faults, vm)
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert [verb for verb, _ in faults.seen].count("rename_all") == 2
        gate.release.set()
    assert [verb for verb, _ in faults.seen].count("rename_all") == 3
    await remote.aclose()


async def _clean_one(remote: Remote, vm: str) -> None:
    result = await clean_vm(
        remote, vm, lock=Held(), warn=lambda message, data: None, merge=True, min_age=0
    )
    assert result["merge"]


async def test_a_lost_lock_ends_it(remote: Remote, vm_dir: Path) -> None:
    class Lost:
        async def check(self) -> None:
            raise Busy("lost")

    place_vm(vm_dir, CHAIN, [1])
    before = tree(vm_dir)
    with pytest.raises(Busy):
        await clean(remote, lock=Lost())
    assert tree(vm_dir) == before


# -- what stays, what goes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"mode":"delta","vm":{},"vhds":{"a":"vdis',
        b'{"mode":"newer","vm":{}}',
        b'{"mode":"delta","vm":{}}',
        b'{"mode":"delta","vm":{},"vhds":{}}',
        b'{"mode":"delta","vm":{},"vhds":{"a":7}}',
        b'{"mode":"delta","vm":{},"vhds":{"a":"../../x/y.vhd"}}',
    ],
)
async def test_metadata_that_is_not_understood_protects_all_disks(
    remote: Remote, vm_dir: Path, content: bytes
) -> None:
    """Upstream removes it, then its disks (weakness 3)."""
    place_vm(vm_dir, CHAIN, [2])
    (vm_dir / f"{TIMES[3]}.json").write_bytes(content)
    before = tree(vm_dir)
    result, warnings = await clean(remote)
    assert result == {"merge": False, "size": 0}
    assert warnings
    assert tree(vm_dir) == before


@pytest.mark.parametrize("verb", ["read_files", "read_file", "list"])
@pytest.mark.parametrize("path", [f"*/{TIMES[1]}.vhd/*", "*/data", "*/one", "*/job", "*.alias.vhd"])
async def test_errors_of_the_storage_remove_nothing(
    remote: Remote, vm_dir: Path, verb: str, path: str
) -> None:
    """Upstream takes any error for a broken disk and removes what stands on it (weakness 4)."""
    chain = place_vm(vm_dir, CHAIN, [2, 3])
    faults = Faults(remote)
    faults.add(verb, Fail(Unreachable("EIO", code="EIO")), path=path, times=1000)
    with contextlib.suppress(Unreachable):
        await clean(faults)
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(CHAIN[: number + 1])
    assert metadata(2, 3) <= tree(vm_dir)


async def test_a_backup_whose_disk_is_provably_gone_goes(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN, [0, 1, 2])
    (vm_dir / DISKS[0] / name_of(2, CHAIN[2])).unlink()
    _, warnings = await clean(remote)
    assert warnings[:2] == ["disk file missing", "incremental backup is incomplete"]
    assert metadata(0, 1) <= tree(vm_dir)
    assert not metadata(2) & tree(vm_dir)
    assert disk_names(DISKS[0], 0, 1) <= tree(vm_dir)
    # no ghost of it stays in the cache (weakness 5)
    cache = json.loads(gzip.decompress((vm_dir / "cache.json.gz").read_bytes()))
    assert len(cache) == 2
    assert len(await list_vm_backups(remote, VM)) == 2


async def test_a_disk_that_only_the_listing_lacks_is_not_gone(remote: Remote, vm_dir: Path) -> None:
    class Partial(Faults):
        async def list(self, path: str) -> Any:
            return [
                entry for entry in await super().list(path) if entry.name != name_of(2, CHAIN[2])
            ]

    place_vm(vm_dir, CHAIN, [0, 1, 2])
    before = tree(vm_dir)
    await clean(Partial(remote))
    assert tree(vm_dir) >= before - disk_names(DISKS[0], 3)
    assert metadata(2) <= tree(vm_dir)


@pytest.mark.parametrize("lost", ["parent", "data", "directory"])
async def test_a_broken_backup_is_told_and_kept(remote: Remote, vm_dir: Path, lost: str) -> None:
    place_vm(vm_dir, CHAIN, [1, 2])
    match lost:
        case "parent":
            (vm_dir / DISKS[0] / name_of(0, CHAIN[0])).unlink()
        case "data":
            shutil.rmtree(vm_dir / DISKS[0] / f"data/{TIMES[2]}.vhd")
        case _:
            shutil.rmtree(vm_dir / "vdis")
    before = tree(vm_dir)
    _, warnings = await clean(remote)
    assert "incremental backup is incomplete" in warnings
    assert tree(vm_dir) == before


async def test_disks_that_nobody_needs_go(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN, [1])
    assert (await clean(remote, merge=False))[0] == {"merge": True, "size": 0}
    assert tree(vm_dir) == metadata(1) | disk_names(DISKS[0], 0, 1) | {
        f"{DISKS[0]}/data/{TIMES[0]}.vhd",
        f"{DISKS[0]}/data/{TIMES[1]}.vhd",
    }


async def test_a_directory_of_no_backup_is_given_back(remote: Remote, vm_dir: Path) -> None:
    """Upstream never reclaims it (weakness 18)."""
    place_vm(vm_dir, CHAIN[:1], [0])
    place_chain(vm_dir, "vdis/old/x", as_files(CHAIN))
    place_chain(vm_dir, "vdis/old/y", CHAIN)
    await clean(remote, min_age=3600)
    assert (vm_dir / "vdis/old/x").exists(), "perhaps its writer lives"
    await clean(remote)
    assert sorted(path.name for path in (vm_dir / "vdis").iterdir()) == ["job"]
    (vm_dir / f"{TIMES[0]}.json").unlink()
    await clean(remote)
    assert not (vm_dir / "vdis").exists()


async def test_young_disks_and_data_stay_with_what_they_stand_on(
    remote: Remote, vm_dir: Path
) -> None:
    place_vm(vm_dir, CHAIN, [1])
    (vm_dir / DISKS[0] / name_of(2, CHAIN[2])).rename(vm_dir / "away")
    before = tree(vm_dir)
    await clean(remote, min_age=3600, merge=False)
    assert tree(vm_dir) == before


async def test_a_young_child_keeps_its_parent_from_being_merged(
    remote: Remote, vm_dir: Path
) -> None:
    """A writer without lock may be about to write its metadata."""
    place_vm(vm_dir, CHAIN[:2], [1])
    place_disk(
        vm_dir / DISKS[0],
        name_of(2, CHAIN[2]),
        CHAIN[2],
        identity(9),
        (name_of(0, CHAIN[0]), identity(1)),
    )
    before = tree(vm_dir)
    assert (await clean(remote, min_age=3600))[0]["size"] == 0
    assert tree(vm_dir) == before
    assert (await clean(remote))[0]["size"] > 0


@pytest.mark.parametrize("text", ["", " \n", ".", "..", "data", "data/", "../one/data"])
async def test_a_bad_alias_takes_nothing_with_it(remote: Remote, vm_dir: Path, text: str) -> None:
    """Upstream removes what it resolves to: the whole VDI directory (weakness 22)."""
    chain = place_vm(vm_dir, CHAIN, [3])
    bad = vm_dir / DISKS[0] / "20260301T000000Z.alias.vhd"
    bad.write_text(text)
    _, warnings = await clean(remote)
    assert "failed to open disk" in warnings
    assert await tags(remote, chain[3]) == model(CHAIN)
    assert bad.exists()


async def test_two_aliases_of_one_directory_keep_it(remote: Remote, vm_dir: Path) -> None:
    chain = place_vm(vm_dir, CHAIN[:1], [0])
    second = vm_dir / DISKS[0] / "20260301T000000Z.alias.vhd"
    second.write_text(f"data/{TIMES[0]}.vhd")
    _, warnings = await clean(remote)
    assert warnings == ["duplicate disk UUID detected"]
    assert not second.exists()
    assert await tags(remote, chain[0]) == model(CHAIN[:1])


async def test_an_alias_of_nothing_goes_alone(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN[:2], [0])
    shutil.rmtree(vm_dir / DISKS[0] / f"data/{TIMES[1]}.vhd")
    _, warnings = await clean(remote)
    assert warnings == ["missing target of alias"]
    assert disk_names(DISKS[0], 0) == {name for name in tree(vm_dir) if name.endswith("alias.vhd")}


async def test_data_without_alias_goes_when_it_is_old(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN[:1], [0])
    data = vm_dir / DISKS[0] / "data"
    shutil.copytree(data / f"{TIMES[0]}.vhd", data / "unclaimed.vhd")
    old = time.time() - 7200
    for path in (data / "unclaimed.vhd").rglob("*"):
        os.utime(path, (old, old))
    os.utime(data / "unclaimed.vhd", (old, old))
    young = data / "unclaimed.vhd/blocks/0/1"
    os.utime(young, None)
    _, warnings = await clean(remote, min_age=3600)
    assert warnings == ["orphaned data file"]
    assert young.exists()
    os.utime(young, (old, old))
    await clean(remote, min_age=3600)
    assert [path.name for path in data.iterdir()] == [f"{TIMES[0]}.vhd"]


async def test_unfinished_files_are_no_disks(remote: Remote, vm_dir: Path) -> None:
    """Upstream takes a leftover `.<ms>.<TS>.vhd` for a disk, and the chain is lost (weakness 2)."""
    points = as_files(CHAIN)
    chain = place_vm(vm_dir, points, [2, 3])
    left = vm_dir / DISKS[0] / f".1795485541901.{TIMES[3]}.vhd"
    shutil.copyfile(vm_dir / DISKS[0] / f"{TIMES[3]}.vhd", left)
    await clean(remote, min_age=3600)
    assert left.exists()
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(points[: number + 1])
    await clean(remote)
    assert not left.exists()


# -- what Xen Orchestra left half done


def place_state(vm_dir: Path, disks: Sequence[str], **changes: Any) -> Path:
    state = MergeState(
        chain=tuple(path.rpartition("/")[2] for path in disks),
        child_uuid=identity(len(disks)),
        parent_uuid=identity(1),
    )
    record = json.loads(state.encode()) | changes
    path = vm_dir.parents[1] / state_path(disks[0])
    path.write_text(json.dumps({key: value for key, value in record.items() if value != ()}))
    return path


@pytest.mark.parametrize("kind", ["brotli", "file"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"currentBlock": None},
        {"currentBlock": -1},
        {"chain": ()},
        {"chain": (), "child": {"header": 1}, "parent": {"header": 2}, "vhdSize": 5},
        {"step": "cleanup"},  # announced, but nothing of it came through the crash
    ],
)
async def test_a_merge_that_just_began_is_finished(
    remote: Remote, vm_dir: Path, changes: dict[str, Any], kind: str
) -> None:
    points = [Point(point.blocks, kind) for point in CHAIN[:2]]
    chain = place_vm(vm_dir, points, [1])
    place_state(vm_dir, chain, **changes)
    assert await tags(remote, chain[1]) == model(points)
    result, warnings = await clean(remote)
    assert result == {"merge": True, "size": stream_size(4, 3)}
    assert warnings == []
    assert await tags(remote, chain[1]) == model(points)
    kept = {name for name in tree(vm_dir) if "/data/" not in name}
    assert kept == metadata(1) | disk_names(DISKS[0], 1, kind=kind)
    assert json.loads((vm_dir / f"{TIMES[1]}.json").read_bytes())["size"] == stream_size(4, 3)


@pytest.mark.parametrize("step", ["cleanup", "cleanupVhds"])
@pytest.mark.parametrize("left", ["parent", "renamed", "both names", "some children"])
async def test_a_cleanup_that_stopped_is_finished(
    remote: Remote, vm_dir: Path, step: str, left: str
) -> None:
    """Upstream loses the chain when only the parent is left (weakness 1), cannot go on from
    two aliases (vhd, weakness 2), and stops at `cleanupVhds` for ever (weakness 6)."""
    points = [*CHAIN[:3], Point({3: 7})]
    chain = place_vm(vm_dir, points, [2, 3])
    folder = vm_dir / DISKS[0]
    shutil.copytree(folder, vm_dir / "copy")
    await clean(remote)
    names = [name_of(number, each) for number, each in enumerate(points)]
    if left != "renamed":
        shutil.copyfile(folder / names[2], folder / names[0])
    if left in ("parent", "some children"):
        (folder / names[2]).unlink()
    if left in ("some children", "renamed"):
        shutil.copyfile(vm_dir / "copy" / names[1], folder / names[1])
        shutil.copytree(vm_dir / f"copy/data/{TIMES[1]}.vhd", folder / f"data/{TIMES[1]}.vhd")
    shutil.rmtree(vm_dir / "copy")
    place_state(vm_dir, chain[:3], step=step)
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(points[: number + 1])
    result, _ = await clean(remote)
    assert result == {"merge": True, "size": stream_size(4, 3)}
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(points[: number + 1])
    assert tree(vm_dir) == metadata(2, 3) | disk_names(DISKS[0], 2, 3) | {
        f"{DISKS[0]}/data/{TIMES[0]}.vhd",
        f"{DISKS[0]}/data/{TIMES[3]}.vhd",
    }


@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize("moved", [(), (0,), (0, 1, 2)])
async def test_a_merge_whose_state_is_cut_is_done_again(
    remote: Remote, vm_dir: Path, moved: tuple[int, ...], size: int
) -> None:
    """Whatever it had moved: of a chain of three, the newest disk's blocks first."""
    chain = place_vm(vm_dir, CHAIN, [2, 3])
    data = [vm_dir / DISKS[0] / "data" / f"{TIMES[number]}.vhd/blocks/0" for number in range(3)]
    for index in moved:
        owner = max(number for number in range(3) if index in CHAIN[number].blocks)
        (data[owner] / str(index)).rename(data[0] / str(index))
    path = place_state(vm_dir, chain[:3])
    path.write_bytes(path.read_bytes()[:size])
    _, warnings = await clean(remote)
    assert warnings == []
    assert tree(vm_dir) == metadata(2, 3) | disk_names(DISKS[0], 2, 3) | {
        f"{DISKS[0]}/data/{TIMES[number]}.vhd" for number in (0, 3)
    }
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(CHAIN[: number + 1])


@pytest.mark.parametrize("merge_too", [False, True])
async def test_a_cut_state_of_a_disk_that_is_needed_keeps_everything(
    remote: Remote, vm_dir: Path, merge_too: bool
) -> None:
    chain = place_vm(vm_dir, CHAIN, [0, 2, 3] if merge_too else [2, 3])
    path = place_state(vm_dir, chain[:3])
    path.write_bytes(path.read_bytes()[:-9])
    before = tree(vm_dir)
    _, warnings = await clean(remote, merge=merge_too)
    assert warnings == [f"Issue loading {path.name}"]
    assert tree(vm_dir) == before


async def test_a_state_without_disks_goes(remote: Remote, vm_dir: Path) -> None:
    place_vm(vm_dir, CHAIN[:1], [0])
    path = place_state(vm_dir, [f"xo-vm-backups/{VM}/{DISKS[0]}/{name}.vhd" for name in "xy"])
    _, warnings = await clean(remote)
    assert warnings == ["orphan merge state"]
    assert not path.exists()


# -- crashes


KINDS = {
    "directories": CHAIN,
    "files": [Point(point.blocks, "file", 3 + number) for number, point in enumerate(CHAIN)],
    "mixed": [
        Point(point.blocks, kind, 4 + number)
        for number, (point, kind) in enumerate(
            zip(CHAIN, ("gzip", "aliased", "brotli", "brotli"), strict=True)
        )
    ],
    "moved table": [
        Point({**point.blocks, count - 1: 9 - number}, "file", count)
        for number, (point, count) in enumerate(zip(CHAIN, (4, 4, 130, 130), strict=True))
    ],
    "grown": [Point(point.blocks, "brotli", 4 + number) for number, point in enumerate(CHAIN)],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_crash_at_any_step_every_backup_reads_the_same(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2 and I3: before the next clean, through the state, and after it."""
    monkeypatch.setattr(merge, "BATCH", 2)
    monkeypatch.setattr(merge, "COPIED", 1)
    points = KINDS[kind]
    start, live, place = tmp_path / "start", tmp_path / "live", tmp_path / "place"
    vm = f"xo-vm-backups/{VM}"
    chain = place_vm(start / vm, points, [2, 3])
    shutil.copytree(start, live)
    with inline_threads():
        remote = await open_local(live)
        recording = Recording(remote)
        await clean(recording)
        await remote.aclose()
        expected = tree(live / vm)
        place.mkdir()
        count = 0
        for label, apply in crash_states(recording.changes, start=start):
            apply(place)
            count += 1
            await _recovers(place, chain, points, expected, label)
    assert count > 20


async def _recovers(
    root: Path, chain: Sequence[str], points: Sequence[Point], expected: set[str], label: str
) -> None:
    remote = await open_local(root)
    for number in (2, 3):
        assert await tags(remote, chain[number]) == model(points[: number + 1]), label
    for _ in range(2):  # the second finds nothing to do
        result, warnings = await clean(remote)
        assert [each for each in warnings if each != "orphaned data file"] == [], label
        for number in (2, 3):
            assert await tags(remote, chain[number]) == model(points[: number + 1]), label
    assert result == {"merge": False, "size": 0}, label
    vm_dir = root / "xo-vm-backups" / VM
    assert tree(vm_dir) == expected, label
    async with open_disk(remote, chain[2]) as disk:
        size = stream_size(disk.header.max_entries, len(disk.blocks))
    record = json.loads((vm_dir / f"{TIMES[2]}.json").read_bytes())
    assert (record["size"], record["isVhdDifferencing"]) == (size, {"OpaqueRef:one": False}), label
    await remote.aclose()
