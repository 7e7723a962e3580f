"""What dead runs left on remotes: removed under the lock, told, and nothing else is touched."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.errors import Unreachable
from proxy.jobs import SweepRequest
from proxy.remotes.faults import Fail, Gate
from proxy.remotes.holding import ourselves
from proxy.remotes.interface import OpenUpload
from proxy.repository.metadata_backup_paths import CONFIG_ROOT, POOL_ROOT
from proxy.simulator import SimulatedPool
from proxy.tasks import open_tasks
from tests.remotes.objects.test_open_uploads import begun

from .conftest import SCHEDULE, House, Outcome, open_house
from .test_object_stores import house_on
from .test_sweep import dead_run, good_run

MIB = 1024 * 1024
HOUR = 3600
TEMPORARY = ".1795485249902.20261124T000000Z.xva.tmp"
ORPHAN = "20260101T000000Z.xva"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """The second life of a daemon."""
    async with trio.open_nursery() as nursery:
        async with open_tasks(str(tmp_path / "tasks.db"), nursery) as tasks:
            assert tasks.is_first_life
        nursery.cancel_scope.cancel()
    async with open_house(SimulatedPool.small(vms=2, disk_size=2 * MIB), tmp_path) as opened:
        assert not opened.services.tasks.is_first_life
        yield opened


def vm_folder(house: House, remote: str = "remote1", vm: str = "vm1") -> Path:
    return house.folder(remote) / "xo-vm-backups" / house.pool.vm_uuid(vm)


def grow_old(path: Path, age: float) -> None:
    then = time.time() - age
    os.utime(path, (then, then))


def begin_anew(house: House) -> None:
    """As if the daemon had been started again: it has met no remote yet."""
    house.services.sweeper._cleaned.clear()  # pyright: ignore[reportPrivateUsage]


def put(path: Path, *, age: float = 0, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    grow_old(path, age)
    return path


def hold(folder: Path, owner: str, *, pid: int = 2**22 + 1, age: float = 0) -> Path:
    """The lock of a directory, as a process leaves it that dies."""
    lock = folder.with_name(f"{folder.name}.lock")
    lock.mkdir(parents=True)
    record = {**ourselves(), "pid": pid, "owner": owner, "since": time.time()}
    holder = put(
        folder.with_name(f".{folder.name}.lock-holder"), content=json.dumps(record).encode()
    )
    for path in (lock, holder):
        grow_old(path, age)
    return lock


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and directory, with time and content."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in root.rglob("*")
    }


async def sweep(house: House, *remotes: str, dry_run: bool = False) -> dict[str, Any]:
    names = list(remotes) or ["remote1"]
    outcome = await house.outcome(start(house, *names, dry_run=dry_run))
    found: dict[str, Any] = outcome.log[-1]["result"]["remotes"]
    return found if len(names) > 1 else found[names[0]]


def start(house: House, *names: str, dry_run: bool = False) -> Any:
    specs = {name: house.remote_spec(name) for name in names}
    return house.services.start_sweep(SweepRequest(remotes=specs, dry_run=dry_run))


def told(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [
        (one["type"], one["name"], one["run"])
        for info in outcome.snapshot["data"].get("infos", [])
        for one in info.get("data", {}).get("swept", [])
    ]


def names(entries: list[dict[str, str]]) -> list[tuple[str, str]]:
    return sorted((entry["type"], entry["name"]) for entry in entries)


# -- at the next contact ------------------------------------------------------------------------


async def crashed(house: House) -> tuple[str, list[Path]]:
    """A good backup, and what a run left in the VM's directory moments ago."""
    await good_run(house)
    run = await dead_run(house)
    folder = vm_folder(house)
    litter = [put(folder / TEMPORARY), put(folder / ORPHAN), hold(folder, run)]
    begin_anew(house)
    return run, litter


@pytest.mark.parametrize("contact", ["run", "restore"])
async def test_the_next_contact_cleans_where_our_dead_run_was(house: House, contact: str) -> None:
    run, litter = await crashed(house)
    backups = house.backups()
    if contact == "run":  # of another VM
        outcome = await house.run(house.request(vms=[house.pool.vm_uuid("vm2")]))
    else:
        outcome = await house.outcome(await house.restore(backups[0]))
    assert outcome.status == "success", outcome.snapshot
    assert [path.exists() for path in litter] == [False] * 3
    vm = house.pool.vm_uuid("vm1")
    assert sorted(told(outcome)) == [
        ("file", TEMPORARY, run),
        ("file", ORPHAN, run),
        ("lock", f"{vm}.lock", run),
    ]
    assert set(backups) <= set(house.backups())


@pytest.mark.parametrize("owner", ["0mwv00000-another", "live"])
async def test_a_contact_leaves_directories_of_others(house: House, owner: str) -> None:
    await good_run(house)
    begin_anew(house)
    folder = vm_folder(house)
    litter = [put(folder / TEMPORARY, age=9 * HOUR), hold(folder, owner)]
    outcome = await house.run(house.request(vms=[house.pool.vm_uuid("vm2")]))
    assert outcome.status == "success"
    assert told(outcome) == []
    assert [path.exists() for path in litter] == [True, True]


async def test_a_contact_trusts_no_lock_of_this_very_process(house: House) -> None:
    """Its run ended, but something that it had begun may still be written."""
    await good_run(house)
    run = await dead_run(house)
    begin_anew(house)
    folder = vm_folder(house)
    young = put(folder / TEMPORARY)
    hold(folder, run, pid=os.getpid(), age=60)
    outcome = await house.run(house.request(vms=[house.pool.vm_uuid("vm2")]))
    assert told(outcome) == []
    assert young.exists()


async def test_a_first_life_looks_for_nothing(tmp_path: Path) -> None:
    async with open_house(SimulatedPool.small(), tmp_path) as opened:
        await good_run(opened)
        async with opened.faulty() as faults:
            gate = faults.add("list", Gate(), path="xo-pool-metadata-backups")
            await good_run(opened)
            assert not gate.reached.is_set()


async def test_a_remote_that_cannot_be_listed_is_told_and_tried_again(house: House) -> None:
    _, litter = await crashed(house)
    async with house.faulty() as faults:
        faults.add("list", Fail(Unreachable("gone")), path="xo-vm-backups")
        outcome = await house.run(house.request(vms=[house.pool.vm_uuid("vm2")]))
        assert outcome.status == "success"
        warnings = [each["message"] for each in outcome.snapshot["data"]["warnings"]]
        assert warnings == ["could not sweep what dead runs left"]
    outcome = await house.run(house.request(vms=[house.pool.vm_uuid("vm2")]))
    assert len(told(outcome)) == len(litter)


# -- by call ------------------------------------------------------------------------------------


async def test_a_sweep_cleans_each_directory_and_a_dry_run_says_the_same(house: House) -> None:
    run, litter = await crashed(house)
    await house.run(house.request(vms=[house.pool.vm_uuid("vm2")], remotes=("directories",)))
    other = vm_folder(house, "directories", "vm2")
    old = put(other / TEMPORARY, age=2 * HOUR)
    before = {name: tree(house.folder(name)) for name in ("remote1", "directories")}
    planned = await sweep(house, "remote1", "directories", dry_run=True)
    for name, content in before.items():
        assert tree(house.folder(name)) == content, "a dry run changes nothing"
    done = await sweep(house, "remote1", "directories")
    assert done == planned
    assert names(done["remote1"]["swept"]) == [
        ("file", TEMPORARY),
        ("file", ORPHAN),
        ("lock", f"{house.pool.vm_uuid('vm1')}.lock"),
    ]
    assert {entry["run"] for entry in done["remote1"]["swept"]} == {run}
    assert [path.exists() for path in litter] == [False] * 3
    assert not old.exists()
    await house.clean()
    nothing: dict[str, Any] = {"swept": [], "left": []}
    assert await sweep(house, "remote1", "directories") == dict.fromkeys(
        ("remote1", "directories"), nothing
    )


async def test_what_is_young_stays_where_no_dead_run_of_ours_was(house: House) -> None:
    await good_run(house)
    folder = vm_folder(house)
    young = put(folder / TEMPORARY)
    old = put(folder / ORPHAN, age=2 * HOUR)
    lock = hold(folder, "0mwv00000-another")
    report = await sweep(house)
    assert names(report["swept"]) == [("file", ORPHAN), ("lock", lock.name)]
    assert {entry["run"] for entry in report["swept"]} == {""}
    assert (young.exists(), old.exists(), lock.exists()) == (True, False, False)


@pytest.mark.parametrize("dry_run", [True, False])
async def test_only_what_was_there_is_told_as_removed(house: House, dry_run: bool) -> None:
    """The metadata of a backup whose archive is gone goes, with a checksum if there is one."""
    await good_run(house)
    (archive,) = vm_folder(house).glob("*.xva")
    archive.unlink()
    archive.with_name(f"{archive.name}.checksum").unlink()
    metadata = archive.with_suffix(".json")
    report = await sweep(house, dry_run=dry_run)
    assert names(report["swept"]) == [("file", metadata.name)]
    assert metadata.exists() is dry_run


@pytest.mark.parametrize("dry_run", [False, True])
async def test_a_directory_that_a_live_run_holds_stays(house: House, dry_run: bool) -> None:
    await good_run(house)
    put(vm_folder(house) / ORPHAN, age=2 * HOUR)
    gate = house.pool.pause_at("/export", at_bytes=MIB)
    task = house.services.start_backup(house.request())
    with trio.fail_after(10):
        await gate.reached()
    put(vm_folder(house) / ".1795485249902.cache.json.gz.tmp", age=2 * HOUR)
    report = await sweep(house, dry_run=dry_run)
    assert report["swept"] == []
    (left,) = report["left"]
    assert left["path"].endswith(house.pool.vm_uuid("vm1"))
    assert task.id in left["reason"]
    gate.release()
    assert (await house.outcome(task)).status == "success"


async def test_a_run_does_not_wait_for_a_sweep_of_the_whole_remote(house: House) -> None:
    """Which takes hours where there is much; a run waits for the directory of its own VM alone."""
    uuids = [house.pool.vm_uuid("vm1"), house.pool.vm_uuid("vm2")]
    assert (await house.run(house.request(vms=uuids))).status == "success"
    begin_anew(house)
    async with house.faulty() as faults:
        gate = faults.add("list", Gate(), path=f"*{uuids[0]}")
        sweeping = start(house, "remote1")
        with trio.fail_after(10):
            await gate.reached.wait()
            outcome = await house.run(house.request(vms=uuids[1:]))
        assert outcome.status == "success"
        assert sweeping.pending
        gate.release.set()
        assert (await house.outcome(sweeping)).status == "success"


async def test_a_listing_that_fails_removes_nothing_there_and_the_others_go_on(
    house: House,
) -> None:
    uuids = [house.pool.vm_uuid("vm1"), house.pool.vm_uuid("vm2")]
    assert (await house.run(house.request(vms=uuids))).status == "success"
    litter = [put(vm_folder(house, vm=vm) / ORPHAN, age=2 * HOUR) for vm in ("vm1", "vm2")]
    async with house.faulty() as faults:
        faults.add("list", Fail(Unreachable("gone")), path=f"*{uuids[0]}")
        outcome = await house.outcome(start(house, "remote1"))
    assert outcome.status == "failure"
    assert outcome.log[-1]["status"] == "success"
    assert [path.exists() for path in litter] == [True, False]
    result = outcome.log[-1]["result"]["remotes"]["remote1"]
    assert result["error"] == "gone"
    (left,) = result["left"]
    assert left["reason"] == "not cleaned; it failed: gone"
    again = await sweep(house)
    assert names(again["swept"]) == [("file", ORPHAN)]


OPERATIONS = ["list", "stat", "unlink", "read_files", "lock.acquire"]


@pytest.mark.parametrize("how", ["error", "cancel"])
@pytest.mark.parametrize("verb", OPERATIONS)
async def test_a_sweep_that_ends_anywhere_can_be_run_again(
    house: House, verb: str, how: str
) -> None:
    _, litter = await crashed(house)
    dated = house.folder() / CONFIG_ROOT[1:] / SCHEDULE / "20260101T000000Z"
    litter.append(put(dated / "data.json", age=2 * HOUR))
    kept = house.backups()
    async with house.faulty() as faults:
        if how == "error":
            faults.add(verb, Fail(Unreachable("gone")))
            await house.outcome(start(house, "remote1"))
        else:
            gate = faults.add(verb, Gate())
            task = start(house, "remote1")
            with trio.fail_after(10):
                await gate.reached.wait()
            await house.services.tasks.cancel(task.id)
            gate.release.set()
            assert (await house.outcome(task)).status == "canceled"
        assert house.backups() == kept
        await house.services.tasks.flush()
    with pytest.MonkeyPatch.context() as patch:  # what was held by us is not held any more
        patch.setattr("proxy.jobs.sweep.remote_sweep.ORPHAN_AGE", 0.0)
        report = await sweep(house)
    assert "error" not in report
    assert [path.exists() for path in litter] == [False] * 4
    assert house.backups() == kept
    await house.clean()


# -- metadata backups ---------------------------------------------------------------------------


async def test_half_written_metadata_goes_when_it_is_old(house: House) -> None:
    root = house.folder()
    pool = house.pool.vm_uuid("vm1")
    config, database = root / CONFIG_ROOT[1:] / SCHEDULE, root / POOL_ROOT[1:] / SCHEDULE / pool
    old = [
        put(config / "20260101T000000Z" / "data.json", age=2 * HOUR),
        put(database / "20260101T000000Z" / ".1795485249902.data.tmp", age=2 * HOUR),
    ]
    young = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept = [
        put(config / young / "data.json"),
        put(config / "20260102T000000Z" / "data.json"),
        put(database / "20260102T000000Z" / "notes.txt", age=2 * HOUR),
        put(database / "20260103T000000Z" / "data", age=2 * HOUR),
        put(database / "20260103T000000Z" / "metadata.json", age=2 * HOUR, content=b"{}"),
        put(database / "readme", age=2 * HOUR),
    ]
    lock = hold(database, "0mwv00000-another")
    before = tree(root)
    planned = await sweep(house, dry_run=True)
    assert tree(root) == before
    report = await sweep(house)
    assert report == planned
    assert [path.exists() for path in old] == [False, False]
    assert all(path.exists() for path in kept)
    assert not lock.exists()
    assert names(report["swept"]) == [
        ("file", ".1795485249902.data.tmp"),
        ("file", "20260101T000000Z"),
        ("file", "20260101T000000Z"),
        ("file", "data.json"),
        ("lock", lock.name),
    ]
    left = {entry["path"].rpartition("/")[2] for entry in report["left"]}
    assert left == {young, "20260102T000000Z"}


async def test_encryption_hides_no_lock(house: House) -> None:
    begin_anew(house)
    request = house.request(remotes=("encrypted",))
    assert (await house.run(request)).status == "success"
    run = await dead_run(house)
    folder = vm_folder(house, "encrypted")
    litter = [put(folder / TEMPORARY), hold(folder, run)]
    begin_anew(house)
    other = house.request(vms=[house.pool.vm_uuid("vm2")], remotes=("encrypted",))
    outcome = await house.run(other)
    assert {entry[2] for entry in told(outcome)} == {run}
    assert [path.exists() for path in litter] == [False, False]


# -- uploads that no listing shows --------------------------------------------------------------


async def test_uploads_go_when_they_are_ours_and_old(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await dead_run(house)
    root = json.loads(bytes(await house.services.tasks.get(run)))
    during = (root["start"] + root["end"]) / 2000
    vms = [house.pool.vm_uuid("vm1"), house.pool.vm_uuid("vm2")]
    uploads = {
        "ours": OpenUpload(f"/xo-vm-backups/{vms[0]}/20261124T000000Z.xva", "1", during),
        "before it": OpenUpload(f"/xo-vm-backups/{vms[0]}/a.xva", "2", during - 9000),
        "of another VM": OpenUpload(f"/xo-vm-backups/{vms[1]}/b.xva", "3", during),
    }
    aborted: list[OpenUpload] = []

    async def listed(remote: object, path: str) -> list[OpenUpload]:
        assert path == "/xo-vm-backups"
        return [upload for upload in uploads.values() if upload not in aborted]

    async def abort(remote: object, upload: OpenUpload) -> None:
        lock = house.folder() / "xo-vm-backups" / f"{upload.path.split('/')[2]}.lock"
        assert lock.exists(), "under the lock of its directory"
        aborted.append(upload)

    module = "proxy.jobs.sweep.remote_sweep"
    monkeypatch.setattr(f"{module}.open_uploads_of", listed)
    monkeypatch.setattr(f"{module}.abort_upload_of", abort)
    young = await sweep(house)
    assert aborted == []
    assert len(young["left"]) == 3
    assert "it is not a day old" in {e["reason"].partition("; ")[2] for e in young["left"]}
    monkeypatch.setattr(f"{module}._UPLOAD_AGE", 0.0)
    planned = await sweep(house, dry_run=True)
    assert aborted == []
    report = await sweep(house)
    assert report == planned
    assert aborted == [uploads["ours"]]
    (gone,) = report["swept"]
    assert (gone["type"], gone["run"], gone["path"]) == ("upload", run, uploads["ours"].path)
    assert {e["reason"].partition("; ")[2] for e in report["left"]} == {
        "no run of this daemon that died is known to have begun it"
    }


async def test_uploads_that_cannot_be_listed_keep_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await good_run(house)
    litter = put(vm_folder(house) / ORPHAN, age=2 * HOUR)

    async def listed(remote: object, path: str) -> list[OpenUpload]:
        raise Unreachable("a strange listing", code="EPROTO")

    monkeypatch.setattr("proxy.jobs.sweep.remote_sweep.open_uploads_of", listed)
    report = await sweep(house)
    assert names(report["swept"]) == [("file", ORPHAN)]
    assert not litter.exists()
    assert report["error"] == "a strange listing"


# -- object stores ------------------------------------------------------------------------------


async def test_what_a_dead_run_left_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease, an upload, and data that is young: Xen Orchestra, which takes no lock there,
    could be writing that."""
    async with house_on(tmp_path, {"page": 50}, vms=2, disk_size=2 * MIB) as (house, server):
        await good_run(house)
        run = await dead_run(house)
        vms = [house.pool.vm_uuid("vm1"), house.pool.vm_uuid("vm2")]
        base = "some dir/xo-vm-backups"
        record = {
            **ourselves(),
            "pid": 2**22 + 1,
            "owner": run,
            "since": time.time(),
            "nonce": "n",
            "number": 1,
        }
        async with house.services.remote(house.remote_spec("remote1")) as remote:
            lock = f"xo-vm-backups/{vms[0]}.lock"
            await remote.write_file(lock, json.dumps(record).encode())
            await remote.write_file(f"xo-vm-backups/{vms[0]}/{ORPHAN}", b"x")
        root = json.loads(bytes(await house.services.tasks.get(run)))
        ours = begun(server, f"{base}/{vms[0]}/20261124T000000Z.xva")
        # of a VM that has nothing else there: a store knows no such directory
        theirs = begun(server, f"{base}/{vms[1]}/20261124T000000Z.xva")
        server.begun[ours] = server.begun[theirs] = root["end"] // 1000 + 0.0
        before = dict(server.objects)
        monkeypatch.setattr("proxy.jobs.sweep.remote_sweep._UPLOAD_AGE", 0.0)
        planned = await sweep(house, dry_run=True)
        assert server.objects == before
        report = await sweep(house)
        assert names(report["swept"]) == names(planned["swept"])
        assert names(report["swept"]) == [
            ("lock", f"{vms[0]}.lock"),
            ("upload", "20261124T000000Z.xva"),
        ]
        assert {entry["run"] for entry in report["swept"]} == {run}
        assert list(server.uploads) == [theirs]
        assert f"{base}/{vms[0]}/{ORPHAN}" in server.objects
        assert f"some dir/{lock}" not in server.objects
        assert [entry["type"] for entry in report["left"]] == ["upload"]
