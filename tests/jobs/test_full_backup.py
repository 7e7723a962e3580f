"""A full backup against the simulated pool: what the log says, what is on the remote."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from proxy.errors import Refused
from proxy.remotes.faults import Fail, Gate
from proxy.simulator import SimulatedPool
from proxy.xapi import ownership

from . import archives
from .conftest import JOB, SCHEDULE, House, Outcome, open_house, until

MIB = 1024 * 1024
FIXTURES = Path(__file__).parents[1] / "fixtures"
OTHER = "33333333-3333-4333-8333-333333333333"


def recorded(name: str) -> list[dict[str, Any]]:
    lines = (FIXTURES / "jobs" / name).read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def shape(log: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Names, order, nesting, keys in their order and kinds of values; no ids, no progress."""
    names: dict[str, str] = {}
    found: list[tuple[Any, ...]] = []
    for record in log:
        if record["type"] == "property":
            continue
        if record["type"] == "start":
            parent = names.get(record.get("parentId", ""), "")
            names[record["id"]] = f"{parent}/{record['properties']['name']}"
        found.append((names[record["id"]], tuple(record), *map(kind, record.items())))
    return found


def kind(item: tuple[str, Any]) -> Any:
    name, value = item
    if name in ("type", "status", "message", "name", "mode", "isFull", "merge"):
        return value
    if isinstance(value, dict):
        if name == "properties":  # in any order: XO reads them by name
            return sorted((key, kind((key, inner))) for key, inner in value.items())
        return [(key, kind((key, inner))) for key, inner in value.items()]
    return type(value).__name__


def metadata(house: House, remote: str = "remote1", number: int = -1) -> dict[str, Any]:
    path = house.root / remote / house.backups(remote)[number].removeprefix("/")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def archive(house: House, remote: str = "remote1", number: int = -1) -> Path:
    return house.root / remote / house.backups(remote)[number].replace(".json", ".xva")[1:]


def live_disks(house: House, vm: str = "vm1") -> dict[str, bytes]:
    pool = house.pool
    return {
        pool.store.get("VDI", ref)["name_label"]: b"".join(pool.disks.contents[ref].chunks())
        for ref in pool.vms.disks(pool.vm(vm))
    }


def vm_record(house: House, vm: str = "vm1") -> dict[str, Any]:
    return house.pool.store.get("VM", house.pool.vm(vm))


def untouched(house: House, vm: str = "vm1") -> None:
    """The live VM and its disks show nothing of a run."""
    ref = house.pool.vm(vm)
    assert house.pool.store.get("VM", ref)["blocked_operations"] == {}
    for kind_, one in [("VM", ref), *(("VDI", disk) for disk in house.pool.vms.disks(ref))]:
        config = house.pool.store.get(kind_, one)["other_config"]
        assert not [key for key in config if key.startswith(("xo:", "xo-"))]


def calls(house: House, method: str) -> int:
    return sum(call.method == method for call in house.pool.calls.log)


@asynccontextmanager
async def house_of(root: Path, **pool: Any) -> AsyncIterator[House]:
    async with open_house(SimulatedPool.small(**pool), root) as house:
        yield house


# -- the log and the files ------------------------------------------------------------------


async def test_the_log_is_the_recorded_one(house: House) -> None:
    outcome = await house.run(house.request())
    assert shape(outcome.log) == shape(recorded("full-run.ndjson"))
    (vm,) = outcome.of("backup VM")
    assert vm["data"]["name_label"] == "vm1"
    assert outcome.status == "success"


async def test_the_log_names_the_snapshot_and_the_size(house: House) -> None:
    gate = house.pool.pause_at("/export")
    task = house.services.start_backup(house.request())
    await gate.reached()
    (snapshot,) = [house.pool.store.get("VM", ref)["uuid"] for ref in house.pool.snapshots()]
    gate.release()
    outcome = await house.outcome(task)
    assert [one["data"]["result"] for one in outcome.of("snapshot")] == [snapshot]
    size = archive(house).stat().st_size
    assert [one["data"]["result"] for one in outcome.of("transfer")] == [{"size": size}]


async def test_a_tree_and_metadata_like_the_recorded_ones(house: House) -> None:
    await house.run(house.request())
    folder = f"xo-vm-backups/{house.pool.vm_uuid('vm1')}"
    with tarfile.open(FIXTURES / "recorded-full-backup.tar.xz") as tar:
        files = [entry for entry in tar if entry.isfile()]
        one = next(entry.name for entry in files if entry.name.endswith("Z.json"))
        member = tar.extractfile(one)
        assert member is not None
        theirs = json.load(member)
    date = re.compile(r"\d{8}T\d{6}Z")
    expected = {date.sub("DATE", Path(entry.name).name) for entry in files}
    ours = {date.sub("DATE", path.name): path for path in (house.folder() / folder).iterdir()}
    assert set(ours) == expected
    assert not [*house.folder().glob("xo-vm-backups/.*"), *house.folder().glob("*.lock")]
    record = metadata(house)
    assert list(record) == list(theirs)
    assert set(theirs["vm"]) <= set(record["vm"])
    assert set(theirs["vmSnapshot"]) <= set(record["vmSnapshot"])
    for key in ("jobId", "mode", "scheduleId", "version", "tags"):
        assert record[key] == theirs[key]
    assert type(record["timestamp"]) is int
    assert record["xva"] == f"./{ours['DATE.xva'].name}"
    assert record["size"] == ours["DATE.xva"].stat().st_size
    md5 = hashlib.md5(ours["DATE.xva"].read_bytes()).hexdigest()
    assert ours["DATE.xva.checksum"].read_text() == f"$1$${md5}"


async def test_the_metadata_shows_the_live_vm_as_it_was(house: House) -> None:
    await house.run(house.request())
    record = metadata(house)
    assert (record["vm"]["power_state"], record["vm"]["is_a_snapshot"]) == ("Running", False)
    assert record["vm"]["blocked_operations"] == {}
    assert record["vmSnapshot"]["is_a_snapshot"]
    assert record["vmSnapshot"]["name_label"] == "[XO Backup lab job] vm1"
    assert record["vmSnapshot"]["is_a_template"] is False


@pytest.mark.parametrize(
    ("field", "compression"), [("", "none"), ("native", "native"), ("zstd", "zstd"), ("x", "zstd")]
)
async def test_the_archive_is_the_disks_of_the_snapshot(
    tmp_path: Path, field: str, compression: str
) -> None:
    async with house_of(tmp_path, disks_per_vm=2, fill=0.5) as house:
        expected = live_disks(house)
        gate = house.pool.pause_at("/export", at_bytes=0)
        task = house.services.start_backup(house.request(compression=field))
        await gate.reached()
        for uuid in house.pool.disk_uuids(house.pool.vm("vm1")):
            house.pool.write(uuid, 4096, b"written while the backup runs")
        gate.release()
        assert (await house.outcome(task)).status == "success"
        data = archives.unpacked(archive(house), compression)
        assert archives.disks(data) == expected
        assert live_disks(house) != expected
        (vm,) = archives.records(data)["VM"]
        assert vm["name_label"] == "[XO Backup lab job] vm1"
        await house.clean()


async def test_a_halted_vm_needs_no_snapshot(tmp_path: Path) -> None:
    async with house_of(tmp_path, running=False) as house:
        outcome = await house.run(house.request())
        assert (outcome.status, outcome.of("snapshot")) == ("success", [])
        record = metadata(house)
        assert record["vmSnapshot"]["uuid"] == record["vm"]["uuid"]
        assert archives.disks(archives.unpacked(archive(house))) == live_disks(house)
        untouched(house)
        await house.clean()


# -- what happens on the pool ---------------------------------------------------------------


async def test_the_snapshot_is_marked_as_recorded_and_the_live_vm_not(house: House) -> None:
    """xapi.md §7: keys on the snapshot and on each of its disks, the content key on disks only."""
    await house.run(house.request(settings={"snapshotRetention": 1}))
    (ref,) = house.pool.snapshots()
    snapshot = house.pool.store.get("VM", ref)
    assert snapshot["name_label"] == "[XO Backup lab job] vm1"
    assert snapshot["is_a_template"] is False
    live = vm_record(house)
    keys = {k: v for k, v in snapshot["other_config"].items() if k not in live["other_config"]}
    date = keys.pop(ownership.DATETIME)
    assert re.fullmatch(r"\d{8}T\d\d:\d\d:\d\dZ", date)
    assert keys == {
        "xo:backup:job": JOB,
        "xo:backup:schedule": SCHEDULE,
        "xo:backup:vm": live["uuid"],
        "xo:backup:includeNonNbdQcow2Fix": "true",
    }
    for disk in house.pool.vms.disks(ref):
        vdi = house.pool.store.get("VDI", disk)
        assert vdi["other_config"] == {
            **keys,
            "xo:backup:datetime": date,
            "xo:backup:contentKey": vdi["uuid"],
        }
    untouched(house)


async def test_migration_is_blocked_meanwhile_and_the_reasons_of_others_stay(house: House) -> None:
    vm = house.pool.vm("vm1")
    house.pool.do("VM.add_to_blocked_operations", vm, "pool_migrate", "licence of the guest")
    gate = house.pool.pause_at("/export", at_bytes=MIB)
    task = house.services.start_backup(house.request())
    await gate.reached()
    assert vm_record(house)["blocked_operations"] == {
        "pool_migrate": "licence of the guest",
        "migrate_send": "VM migration is blocked during backup",
    }
    gate.release()
    assert (await house.outcome(task)).status == "success"
    assert vm_record(house)["blocked_operations"] == {"pool_migrate": "licence of the guest"}


async def test_what_a_dead_run_left_on_the_vm_is_taken_off(house: House) -> None:
    vm = house.pool.vm("vm1")
    for operation in ("pool_migrate", "migrate_send"):
        house.pool.do(
            "VM.add_to_blocked_operations", vm, operation, "VM migration is blocked during backup"
        )
    for key in ownership.RESET_KEYS:
        house.pool.do("VM.add_to_other_config", vm, key, "old")
    assert (await house.run(house.request())).status == "success"
    untouched(house)


def unfinished(house: House, **marks: str) -> str:
    ref: str = house.pool.do("VM.snapshot", house.pool.vm("vm1"), "xo-backup-temp-snapshot-name")
    for key, value in marks.items():
        house.pool.do("VM.add_to_other_config", ref, f"xo:backup:{key}", value)
    return ref


async def test_only_our_own_unfinished_snapshots_are_removed(house: House) -> None:
    installation = house.services.installation
    ours = unfinished(house, proxy=installation, run="a dead run")
    foreign = unfinished(house, proxy="another installation", run="a dead run")
    unmarked = unfinished(house)
    renamed = unfinished(house, proxy=installation, run="a dead run")
    house.pool.do("VM.set_name_label", renamed, "the user keeps this one")
    assert (await house.run(house.request())).status == "success"
    assert set(house.pool.snapshots()) == {foreign, unmarked, renamed}
    assert ours not in house.pool.snapshots()


async def test_an_unfinished_snapshot_of_a_live_run_stays(house: House) -> None:
    async def work(root: Any) -> None:
        del root
        await trio.sleep_forever()

    live = house.services.tasks.start("another run", {}, work)
    theirs = unfinished(house, proxy=house.services.installation, run=live.id)
    assert (await house.run(house.request())).status == "success"
    assert house.pool.snapshots() == [theirs]
    live.cancel()


async def test_a_replica_of_this_very_job_is_refused(house: House) -> None:
    vm = house.pool.vm("vm1")
    house.pool.do("VM.add_to_other_config", vm, "xo:backup:job", JOB)
    house.pool.do("VM.add_to_blocked_operations", vm, "start", "clone it")
    request = house.request(settings={"nRetriesVmBackupFailures": 3})
    outcome = await house.run(request)
    assert outcome.error("backup VM")["message"] == "cannot backup a VM created by this very job"
    assert outcome.of("backup VM")[0]["data"].get("warnings") is None  # no retry helps
    assert vm_record(house)["other_config"]["xo:backup:job"] == JOB
    assert house.backups() == []


@pytest.mark.parametrize("operation", ["migrate_send", "pool_migrate"])
async def test_a_vm_on_the_move_is_refused(house: House, operation: str) -> None:
    vm = house.pool.vm("vm1")
    house.pool.store.update("VM", vm, current_operations={"OpaqueRef:task": operation})
    outcome = await house.run(house.request())
    message = "cannot backup a VM currently being migrated"
    assert outcome.error("backup VM")["message"] == message
    assert calls(house, "Async.VM.snapshot") == 0


async def test_an_unknown_vm_fails_its_task_and_not_the_others(house: House) -> None:
    unknown = "00000000-0000-4000-8000-000000000000"
    outcome = await house.run(house.request(vms=[unknown, house.pool.vm_uuid("vm1")]))
    vms = {vm["data"]["id"]: vm for vm in outcome.of("backup VM")}
    assert (vms[unknown]["status"], len(house.backups())) == ("failure", 1)
    assert "name_label" not in vms[unknown]["data"]
    assert outcome.log[-1]["status"] == "success"  # XO derives the rest
    assert outcome.status == "failure"


async def test_a_vm_without_pool_is_told(house: House) -> None:
    request = house.request()
    request = replace(request, record_to_xapi={})
    outcome = await house.run(request)
    uuid = house.pool.vm_uuid("vm1")
    assert outcome.error("backup VM")["message"] == f"no XAPI associated to {uuid}"


@pytest.mark.parametrize(
    "xapi", [{}, {"url": "no url at all://"}, {"url": "http://127.0.0.1", "credentials": 3}]
)
async def test_a_pool_described_wrongly_is_a_failed_vm(house: House, xapi: dict[str, Any]) -> None:
    request = house.request()
    request = replace(request, xapis={"xapi1": xapi})
    outcome = await house.run(request)
    assert [vm["status"] for vm in outcome.of("backup VM")] == ["failure"]


async def test_whatever_goes_wrong_before_a_vm_has_its_task_is_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(spec: Any) -> Any:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(house.services, "xapi", broken)
    outcome = await house.run(house.request())
    assert [vm["status"] for vm in outcome.of("backup VM")] == ["failure"]
    assert outcome.status == "failure"


async def test_an_unhealthy_chain_is_skipped(house: House) -> None:
    vdi = house.pool.vms.disks(house.pool.vm("vm1"))[0]
    house.pool.coalesces = False
    for _ in range(3):
        house.pool.disks.destroy(house.pool.disks.snapshot(vdi))
    outcome = await house.run(house.request())
    assert outcome.error("backup VM")["message"] == "unhealthy VDI chain"
    assert (outcome.status, outcome.of("backup VM")[0]["status"]) == ("skipped", "skipped")
    assert [r["status"] for r in outcome.log if r["type"] == "end"][-2:] == ["failure", "success"]
    assert house.pool.snapshots() == []
    bypassed = await house.run(house.request(settings={"bypassVdiChainsCheck": True}))
    assert bypassed.status == "success"


# -- how the VM is frozen -------------------------------------------------------------------


async def test_offline_backup_exports_the_vm_itself(house: House) -> None:
    gate = house.pool.pause_at("/export", at_bytes=0)
    task = house.services.start_backup(house.request(settings={"offlineBackup": True}))
    await gate.reached()
    assert vm_record(house)["power_state"] == "Halted"
    gate.release()
    outcome = await house.outcome(task)
    assert (outcome.status, outcome.of("snapshot")) == ("success", [])
    assert vm_record(house)["power_state"] == "Running"
    assert archives.disks(archives.unpacked(archive(house))) == live_disks(house)
    untouched(house)
    await house.clean()


async def test_offline_backup_and_kept_snapshots_exclude_one_another(house: House) -> None:
    settings = {"offlineBackup": True, "snapshotRetention": 1}
    outcome = await house.run(house.request(settings=settings))
    message = "offlineBackup is not compatible with snapshotRetention"
    assert outcome.error("backup VM")["message"] == message
    assert vm_record(house)["power_state"] == "Running"
    assert calls(house, "Async.VM.clean_shutdown") == 0


@pytest.mark.parametrize("by_tag", [False, True], ids=["setting", "tag"])
async def test_offline_snapshot_halts_the_vm_for_the_snapshot_only(
    house: House, by_tag: bool
) -> None:
    if by_tag:
        house.pool.do("VM.add_tags", house.pool.vm("vm1"), "xo-offline-backup")
    snapshot = house.pool.pause_at("VM.snapshot")
    export = house.pool.pause_at("/export", at_bytes=0)
    settings = {} if by_tag else {"offlineSnapshot": True}
    task = house.services.start_backup(house.request(settings=settings))
    await snapshot.reached()
    assert vm_record(house)["power_state"] == "Halted"
    snapshot.release()
    await export.reached()
    assert vm_record(house)["power_state"] == "Running"
    export.release()
    assert (await house.outcome(task)).status == "success"
    assert calls(house, "Async.VM.start") == 1, "upstream starts it a second time"
    untouched(house)
    await house.clean()


async def test_a_halted_vm_stays_halted(tmp_path: Path) -> None:
    async with house_of(tmp_path, running=False) as house:
        for setting in ("offlineBackup", "offlineSnapshot"):
            assert (await house.run(house.request(settings={setting: True}))).status == "success"
        assert vm_record(house)["power_state"] == "Halted"
        assert calls(house, "Async.VM.start") == 0


async def test_a_vm_that_starts_late_still_has_its_backup(house: House) -> None:
    house.pool.fail("VM.start", error=("NO_HOSTS_AVAILABLE",))
    outcome = await house.run(house.request(settings={"offlineSnapshot": True}))
    assert (outcome.status, len(house.backups())) == ("success", 1)
    assert vm_record(house)["power_state"] == "Running"


async def test_upstream_weakness_23_a_vm_that_does_not_start_again_is_told(house: House) -> None:
    house.pool.fail("VM.start", error=("NO_HOSTS_AVAILABLE",), times=None)
    outcome = await house.run(house.request(settings={"offlineBackup": True}))
    told = json.dumps([one["data"].get("warnings") for one in outcome.of("backup VM")])
    assert "start the VM again" in told
    assert "NO_HOSTS_AVAILABLE" in told


@pytest.mark.parametrize("by_tag", [False, True], ids=["setting", "tag"])
async def test_a_checkpoint_keeps_the_memory(house: House, by_tag: bool) -> None:
    if by_tag:
        house.pool.do("VM.add_tags", house.pool.vm("vm1"), "xo-memory-backup")
    settings = {} if by_tag else {"checkpointSnapshot": True}
    outcome = await house.run(house.request(settings=settings))
    assert outcome.status == "success"
    assert (calls(house, "Async.VM.checkpoint"), calls(house, "Async.VM.snapshot")) == (1, 0)
    assert metadata(house)["vmSnapshot"]["power_state"] == "Suspended"
    await house.clean()


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("old", [False, True], ids=["today's host", "an old host"])
async def test_disks_named_nobak_are_left_out(tmp_path: Path, running: bool, old: bool) -> None:
    async with house_of(tmp_path, disks_per_vm=2, running=running) as house:
        house.pool.is_old = old
        skipped = house.pool.vms.disks(house.pool.vm("vm1"))[1]
        house.pool.do("VDI.set_name_label", skipped, "scratch [NOBAK]")
        assert (await house.run(house.request())).status == "success"
        assert list(archives.disks(archives.unpacked(archive(house)))) == ["vm1_0"]
        assert len(house.pool.vms.disks(house.pool.vm("vm1"))) == 2
        await house.clean()


async def test_a_snapshot_on_request_of_a_halted_vm(tmp_path: Path) -> None:
    async with house_of(tmp_path, running=False) as house:
        outcome = await house.run(house.request(settings={"unconditionalSnapshot": True}))
        assert (outcome.status, len(outcome.of("snapshot"))) == ("success", 1)
        await house.clean()


# -- rolling snapshots ----------------------------------------------------------------------


@pytest.fixture
def minutes_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute lies between two snapshots, whose dates have seconds."""
    minutes = itertools.count(29_924_500)
    clock = SimpleNamespace(time=lambda: next(minutes) * 60)
    monkeypatch.setattr("proxy.jobs.vm_backup.time", clock)


@pytest.mark.usefixtures("minutes_pass")
async def test_rolling_snapshots_keep_exactly_their_number(house: House) -> None:
    """backup-runs.md §3.5: upstream prunes a stale list and leaves one too many."""
    uuids: list[str] = []
    for _ in range(4):
        outcome = await house.run(house.request(remotes=(), settings={"snapshotRetention": 2}))
        assert outcome.status == "success"
        uuids += [one["data"]["result"] for one in outcome.of("snapshot")]
    kept = {house.pool.store.get("VM", ref)["uuid"] for ref in house.pool.snapshots()}
    assert kept == set(uuids[2:])
    assert outcome.of("export") == outcome.of("clean-vm") == []
    untouched(house)


@pytest.mark.usefixtures("minutes_pass")
async def test_each_schedule_keeps_its_own_and_others_are_never_touched(house: House) -> None:
    vm = house.pool.vm("vm1")
    users = house.pool.do("VM.snapshot", vm, "before the upgrade")
    levels = {
        "": {"snapshotRetention": 1},
        SCHEDULE: {"exportRetention": 0},
        OTHER: {"snapshotRetention": 2},
    }
    request = house.request(remotes=(), settings={})
    await house.run(replace(request, job={**request.job, "id": OTHER}))
    foreign = [
        ref
        for ref in house.pool.snapshots()
        if house.pool.store.get("VM", ref)["other_config"].get("xo:backup:job") == OTHER
    ]
    assert foreign == []  # no retention: nothing to do
    another = {**request.job, "id": OTHER, "settings": levels}
    await house.run(replace(request, job=another))
    (foreign_ref,) = set(house.pool.snapshots()) - {users}
    for schedule in (SCHEDULE, OTHER, OTHER, SCHEDULE, OTHER):
        job = {**request.job, "settings": levels}
        again = replace(request, job=job, schedule={"id": schedule})
        assert (await house.run(again)).status == "success"
    assert {users, foreign_ref} <= set(house.pool.snapshots())
    ours = [house.pool.store.get("VM", r)["other_config"] for r in house.pool.snapshots()]
    schedules = [c["xo:backup:schedule"] for c in ours if c.get("xo:backup:job") == JOB]
    assert sorted(schedules) == [SCHEDULE, OTHER, OTHER]


async def test_upstream_weakness_7_the_jobs_own_snapshot_retention_counts(house: House) -> None:
    """Upstream forgets ``settings['']`` when it prunes, and keeps none."""
    request = house.request(remotes=())
    job = {**request.job, "settings": {"": {"snapshotRetention": 1}}}
    await house.run(replace(request, job=job))
    assert len(house.pool.snapshots()) == 1


async def test_a_failed_run_keeps_the_snapshots_of_good_ones(house: House) -> None:
    """Upstream weakness 26, for rolling snapshots: a failure destroys the new one, no old one."""
    settings = {"snapshotRetention": 1}
    good = await house.run(house.request(settings=settings))
    house.pool.fail("/export", cut="reset", after_bytes=MIB)
    assert (await house.run(house.request(settings=settings))).status == "failure"
    (left,) = house.pool.snapshots()
    assert house.pool.store.get("VM", left)["uuid"] == good.of("snapshot")[0]["data"]["result"]


# -- retention on the remote ----------------------------------------------------------------


async def test_retention_counts_the_new_backup(house: House) -> None:
    stored: list[str] = []
    for _ in range(3):
        assert (await house.run(house.request(settings={"exportRetention": 2}))).status == "success"
        stored += [one for one in house.backups() if one not in stored]
    assert house.backups() == stored[1:]
    await house.clean()


@pytest.mark.parametrize("first", [False, True])
async def test_delete_first(house: House, first: bool) -> None:
    await house.run(house.request())
    (old,) = house.backups()
    before = metadata(house)["timestamp"]
    settings = {"exportRetention": 1, "deleteFirst": first}
    async with house.faulty() as faults:
        gate = faults.add("create.write", Gate())
        task = house.services.start_backup(house.request(settings=settings))
        await gate.reached.wait()
        assert house.backups() == ([] if first else [old])
        gate.release.set()
        assert (await house.outcome(task)).status == "success"
    assert len(house.backups()) == 1
    assert metadata(house)["timestamp"] > before
    await house.clean()


async def test_a_failed_run_deletes_no_old_backup(house: House) -> None:
    await house.run(house.request())
    before = house.backups()
    house.pool.fail("/export", cut="reset", after_bytes=MIB)
    outcome = await house.run(house.request(settings={"exportRetention": 1}))
    assert outcome.status == "failure"
    assert house.backups() == before
    await house.clean()


async def test_each_schedule_has_its_own_window(house: House) -> None:
    request = house.request()
    settings = {SCHEDULE: {"exportRetention": 1}, OTHER: {"exportRetention": 1}}
    for schedule in (SCHEDULE, OTHER, SCHEDULE):
        job = {**request.job, "settings": settings}
        again = replace(request, job=job, schedule={"id": schedule})
        assert (await house.run(again)).status == "success"
    owners = [metadata(house, number=n)["scheduleId"] for n in range(len(house.backups()))]
    assert owners == [OTHER, SCHEDULE]


async def test_old_entries_stay_on_request(house: House) -> None:
    settings = {"exportRetention": 1, "skipDeleteOldEntries": True}
    for _ in range(2):
        await house.run(house.request(settings=settings))
    assert len(house.backups()) == 2


async def test_only_the_first_backup_of_a_period_is_tagged_whatever_its_mode(house: House) -> None:
    """remote-layout.md §3.3: every mode of the schedule counts."""
    long_term = {"longTermRetention": {"yearly": {"retention": 3}}, "timezone": "UTC"}
    await house.run(house.request(settings=long_term))
    first = metadata(house)
    assert [tag.partition("=")[0] for tag in first["tags"]] == ["yearly"]
    path = house.folder() / house.backups()[0].removeprefix("/")
    path.write_text(json.dumps({**first, "mode": "delta", "vhds": {}, "vdis": {}}))
    (path.parent / "cache.json.gz").unlink()
    await house.run(house.request(settings={**long_term, "exportRetention": 9}))
    assert metadata(house)["tags"] == []


# -- settings -------------------------------------------------------------------------------


async def test_levels_schedule_then_vm_then_target(house: House) -> None:
    request = house.request(remotes=("remote1", "remote2", "remote3"))
    vm = house.pool.vm_uuid("vm1")
    job = {
        **request.job,
        "settings": {
            "": {"exportRetention": 9, "compression": "ignored"},
            SCHEDULE: {"exportRetention": 3},
            vm: {"exportRetention": 2},
            "remote2": {"exportRetention": 1},
            "remote3": {"exportRetention": 0},
        },
    }
    for _ in range(3):
        outcome = await house.run(replace(request, job=job))
        assert outcome.status == "success"
        assert len(outcome.of("export")) == 2
    kept = {name: len(house.backups(name)) for name in ("remote1", "remote2", "remote3")}
    assert kept == {"remote1": 2, "remote2": 1, "remote3": 0}
    await house.clean()


async def test_an_unknown_setting_is_told_once(house: House) -> None:
    outcome = await house.run(house.request(settings={"exportRetentoin": 3, "reportWhen": "never"}))
    warnings = [r["message"] for r in outcome.log if r["type"] == "warning"]
    assert warnings == ["the setting 'exportRetentoin' is not known and has no effect"]


async def test_a_wrong_setting_of_one_vm_fails_that_vm(tmp_path: Path) -> None:
    async with house_of(tmp_path, vms=2) as house:
        uuids = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        request = house.request(vms=uuids)
        levels = {**request.job["settings"], uuids[0]: {"exportRetention": "many"}}
        outcome = await house.run(replace(request, job={**request.job, "settings": levels}))
        status = {vm["data"]["id"]: vm["status"] for vm in outcome.of("backup VM")}
        assert status == {uuids[0]: "failure", uuids[1]: "success"}


async def test_concurrency_is_a_bound(tmp_path: Path) -> None:
    async with house_of(tmp_path, vms=4) as house:
        gates = [house.pool.pause_at("/export", at_bytes=MIB, nth=1) for _ in range(4)]
        uuids = [house.pool.vm_uuid(f"vm{number}") for number in range(1, 5)]
        task = house.services.start_backup(house.request(vms=uuids, settings={"concurrency": 2}))
        await until(lambda: len(house.pool.transfers) == 2)
        await trio.sleep(0.2)
        assert len(house.pool.transfers) == 2
        assert sum(vm.pending for vm in task.children) == 2
        for gate in gates:
            gate.release()
        assert (await house.outcome(task)).status == "success"
        assert len(house.backups()) == 4
        await house.clean()


async def test_no_concurrency_means_no_bound(tmp_path: Path) -> None:
    async with house_of(tmp_path, vms=3) as house:
        for _ in range(3):
            house.pool.pause_at("/export", at_bytes=MIB)
        uuids = [house.pool.vm_uuid(f"vm{number}") for number in range(1, 4)]
        request = house.request(vms=uuids, settings={"concurrency": 0})
        task = house.services.start_backup(request)
        await until(lambda: len(house.pool.transfers) == 3)
        house.pool.gates.release_all()
        assert (await house.outcome(task)).status == "success"


async def test_upstream_weakness_1_the_export_rate_is_kept_over_all_vms(tmp_path: Path) -> None:
    async with house_of(tmp_path, vms=2) as house:
        uuids = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        began = trio.current_time()
        outcome = await house.run(house.request(vms=uuids, settings={"maxExportRate": 4 * MIB}))
        took = trio.current_time() - began
        assert outcome.status == "success"
        # 2 x 4 MiB, of which one second's worth may go at once
        assert 0.9 < took < 4
        limits = {one["data"]["transfer"]["bottleneck"] for one in outcome.of("transfer")}
        assert "maxExportRate" in limits


async def test_no_target_left_is_no_success(house: House) -> None:
    outcome = await house.run(house.request(settings={"exportRetention": 0}))
    assert outcome.error("backup VM")["code"] == "ENOTARGET"
    nothing = await house.run(house.request(remotes=(), settings={"exportRetention": 0}))
    assert (nothing.status, nothing.of("backup VM")) == ("success", [])


# -- time limits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "name"),
    [("timeout", "the job's timeout"), ("vmTimeout", "the VM's timeout")],
)
async def test_upstream_weakness_1_time_limits_end_the_run(
    house: House, setting: str, name: str
) -> None:
    house.pool.fail("/export", cut="stall", after_bytes=MIB)
    outcome = await house.run(house.request(settings={setting: 700}))
    error = outcome.error("backup VM")
    assert (error["code"], error["deadline"]) == ("ETIMEDOUT", name)
    assert error["message"] == f"{name} of 0.7 s is over"
    assert outcome.status == "failure"
    assert outcome.of("clean-vm") == [], "what nobody asked to stop was not cancelled"
    await house.clean()
    assert (await house.run(house.request())).status == "success"


async def test_vms_that_wait_behind_the_jobs_timeout_fail_too(tmp_path: Path) -> None:
    async with house_of(tmp_path, vms=2) as house:
        house.pool.fail("/export", cut="stall", after_bytes=MIB, times=None)
        uuids = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        settings = {"timeout": 600, "concurrency": 1}
        outcome = await house.run(house.request(vms=uuids, settings=settings))
        assert [vm["status"] for vm in outcome.of("backup VM")] == ["failure", "failure"]
        errors = [vm["data"]["error"] for vm in outcome.of("backup VM")]
        assert {error["code"] for error in errors} == {"ETIMEDOUT"}
        assert {error["message"] for error in errors} == {"the job's timeout of 0.6 s is over"}
        assert vm_record(house, "vm2")["blocked_operations"] == {}
        await house.clean()


# -- several targets ------------------------------------------------------------------------

TARGETS = ("remote1", "remote2")


def by_target(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return {one["data"]["id"]: one for one in outcome.of("export")}


async def only_first(house: House, outcome: Outcome, code: str) -> None:
    """remote1 has the whole backup, remote2 nothing and a failed task; the rest is upstream's."""
    assert archives.disks(archives.unpacked(archive(house))) == live_disks(house)
    assert house.backups("remote2") == []
    exports = by_target(outcome)
    assert (exports["remote1"]["status"], exports["remote2"]["status"]) == ("success", "failure")
    assert exports["remote2"]["data"]["error"]["code"] == code
    assert [vm["status"] for vm in outcome.of("backup VM")] == ["failure"]
    assert outcome.status == "failure"
    names = {r["id"]: r["properties"]["name"] for r in outcome.log if r["type"] == "start"}
    ends = {names[r["id"]]: r["status"] for r in outcome.log if r["type"] == "end"}
    assert (ends["backup VM"], ends["backup run"]) == ("success", "success")
    await house.clean()


async def test_several_targets_get_the_same_bytes(house: House) -> None:
    outcome = await house.run(house.request(remotes=TARGETS))
    assert outcome.status == "success"
    assert archive(house).read_bytes() == archive(house, "remote2").read_bytes()
    assert [t.path for t in house.pool.transfer_log] == ["/export"]
    await house.clean()


async def test_a_target_that_fills_up_does_not_take_the_others_with_it(house: House) -> None:
    async with house.faulty("remote2") as faults:
        faults.fill_after(3 * MIB)
        outcome = await house.run(house.request(remotes=TARGETS))
    await only_first(house, outcome, "ENOSPC")


async def test_a_target_without_space_for_the_metadata(house: House) -> None:
    async with house.faulty("remote2") as faults:
        faults.add("write_file", Fail(Refused("ENOSPC: no space", code="ENOSPC")), path="*Z.json")
        outcome = await house.run(house.request(remotes=TARGETS))
        assert not faults.unused
    await only_first(house, outcome, "ENOSPC")


async def test_upstream_weakness_3_a_locked_target_is_a_failure_and_no_warning(
    house: House,
) -> None:
    async with house.services.remote(house.remote_spec("remote2")) as remote:
        folder = f"xo-vm-backups/{house.pool.vm_uuid('vm1')}"
        await remote.mktree(folder)
        async with remote.lock(folder, owner="somebody else"):
            settings = {"getRemoteTimeout": 100}
            outcome = await house.run(house.request(remotes=TARGETS, settings=settings))
    await only_first(house, outcome, "ELOCKED")


async def test_upstream_weakness_2_the_lock_is_free_after_a_failure(house: House) -> None:
    house.pool.fail("/export", cut="reset", after_bytes=MIB)
    assert (await house.run(house.request())).status == "failure"
    settings = {"getRemoteTimeout": 2000}
    assert (await house.run(house.request(settings=settings))).status == "success"


async def test_a_target_that_cannot_be_opened(house: House) -> None:
    (house.root / "remote2").write_text("a file where a folder should be")
    outcome = await house.run(house.request(remotes=TARGETS))
    (adapter,) = outcome.of("get remote adapter")
    assert (adapter["data"]["id"], adapter["data"]["type"]) == ("remote2", "remote")
    assert (adapter["status"], outcome.status) == ("failure", "failure")
    assert list(by_target(outcome)) == ["remote1"]
    assert len(house.backups()) == 1
    ends = [r["status"] for r in outcome.log if r["type"] == "end"]
    assert (ends[0], ends[-1]) == ("failure", "success")


async def test_a_job_that_has_nothing_to_do_says_so(house: House) -> None:
    outcome = await house.run(house.request(remotes=()))
    assert outcome.status == "success"
    assert outcome.snapshot["data"]["warnings"] == [
        {"message": "the job has no remote, no SR and keeps no snapshot: nothing is done"}
    ]


async def test_no_target_opens(house: House) -> None:
    (house.root / "remote1").write_text("a file where a folder should be")
    outcome = await house.run(house.request())
    assert (outcome.status, outcome.log[-1]["status"]) == ("failure", "success")
    assert outcome.of("backup VM") == []


async def test_all_targets_lost_is_upstreams_message(house: House) -> None:
    async with house.faulty("remote1") as one, house.faulty("remote2") as two:
        one.fill_after(MIB)
        two.fill_after(2 * MIB)
        outcome = await house.run(house.request(remotes=TARGETS))
    error = outcome.error("backup VM")
    assert error["message"] == "all targets have failed, step: writer.run()"
    assert [inner["code"] for inner in error["errors"]] == ["ENOSPC", "ENOSPC"]
    assert house.backups("remote1") == house.backups("remote2") == []
    await house.clean()


# -- retries --------------------------------------------------------------------------------


def retries(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        warning
        for vm in outcome.of("backup VM")
        for warning in vm["data"].get("warnings", [])
        if warning["data"].get("isRetry")
    ]


async def test_a_failed_attempt_is_repeated_and_forgotten(house: House) -> None:
    house.pool.fail("/export", cut="reset", after_bytes=MIB)
    outcome = await house.run(house.request(settings={"nRetriesVmBackupFailures": 1}))
    (warning,) = retries(outcome)
    assert warning["message"] == "Retry the VM backup due to an error"
    assert warning["data"]["attempt"] == 1
    assert isinstance(warning["data"]["error"], str)
    assert [one["status"] for one in outcome.of("export")] == ["failure", "success"]
    assert (outcome.status, len(house.backups())) == ("success", 1)
    await house.clean()


async def test_the_last_attempt_decides(house: House) -> None:
    house.pool.fail("/export", cut="reset", after_bytes=MIB, times=3)
    outcome = await house.run(house.request(settings={"nRetriesVmBackupFailures": 2}))
    assert [warning["data"]["attempt"] for warning in retries(outcome)] == [1, 2]
    assert outcome.status == "failure"
    await house.clean()


async def test_no_retries_is_one_attempt(house: House) -> None:
    outcome = await house.run(house.request(settings={"nRetriesVmBackupFailures": 0}))
    assert (outcome.status, len(house.backups())) == ("success", 1)


async def test_upstream_weakness_9_only_failed_targets_are_written_again(house: House) -> None:
    async with house.faulty("remote2") as faults:
        faults.add("create.write", Fail(Refused("ENOSPC: no space", code="ENOSPC")))
        settings = {"nRetriesVmBackupFailures": 2}
        outcome = await house.run(house.request(remotes=TARGETS, settings=settings))
    assert (outcome.status, len(retries(outcome))) == ("success", 1)
    exports = [(one["data"]["id"], one["status"]) for one in outcome.of("export")]
    assert sorted(exports[:2]) == [("remote1", "success"), ("remote2", "failure")]
    assert exports[2:] == [("remote2", "success")]
    assert (len(house.backups("remote1")), len(house.backups("remote2"))) == (1, 1)
    await house.clean()


async def test_trouble_after_the_copies_writes_none_of_them_again(house: House) -> None:
    house.pool.fail("VM.destroy", error=("SR_BACKEND_FAILURE_40", "no", "more", ""), times=1)
    outcome = await house.run(house.request(settings={"nRetriesVmBackupFailures": 2}))
    assert len(house.backups()) == 1
    assert len(outcome.of("export")) == 1
    assert outcome.error("backup VM")["code"] == "SR_BACKEND_FAILURE_40"


async def test_an_old_backup_that_cannot_be_removed_writes_nothing_again(house: House) -> None:
    await house.run(house.request(settings={"exportRetention": 1}))
    async with house.faulty() as faults:
        faults.add("unlink", Fail(Refused("EROFS: read-only", code="EROFS")), path="*Z.json")
        settings = {"exportRetention": 1, "nRetriesVmBackupFailures": 2}
        outcome = await house.run(house.request(settings=settings))
        assert not faults.unused
    assert (outcome.status, outcome.error("export")["code"]) == ("failure", "EROFS")
    assert (len(house.backups()), retries(outcome)) == (2, [])


async def test_upstream_weakness_9_a_vm_is_repeated_while_others_still_run(tmp_path: Path) -> None:
    async with house_of(tmp_path, vms=2) as house:
        stuck = house.pool.pause_at("/export", at_bytes=MIB, nth=2)
        house.pool.fail("VM.snapshot", error=("SR_FULL",), times=1)
        uuids = [house.pool.vm_uuid(name) for name in ("vm1", "vm2")]
        settings = {"nRetriesVmBackupFailures": 1}
        task = house.services.start_backup(house.request(vms=uuids, settings=settings))
        await stuck.reached()
        await until(lambda: len(house.backups()) == 1)
        stuck.release()
        outcome = await house.outcome(task)
        assert (outcome.status, len(house.backups())) == ("success", 2)


@pytest.mark.parametrize(
    ("mark", "power_state"),
    [
        ("{ours}/0dead0run-x/{vm}", "Running"),
        ("another1/0dead0run-x/{vm}", "Halted"),
        ("{ours}/0dead0run-x/{vm}-copy", "Halted"),
        ("", "Halted"),
    ],
    ids=["a dead run of ours", "another installation", "a copy", "its owner"],
)
async def test_only_a_vm_that_our_dead_run_shut_down_is_started(
    house: House, mark: str, power_state: str
) -> None:
    vm = house.pool.vm("vm1")
    house.pool.do("VM.hard_shutdown", vm)
    value = mark.format(ours=house.services.installation, vm=house.pool.vm_uuid("vm1"))
    house.pool.do("VM.add_to_other_config", vm, "xo:backup:shutdown", value)
    outcome = await house.run(house.request())
    assert outcome.status == "success"
    record = house.pool.store.get("VM", vm)
    assert record["power_state"] == power_state
    kept = record["other_config"].get("xo:backup:shutdown")
    assert kept == (None if power_state == "Running" else value)
    (task,) = outcome.of("backup VM")
    assert bool(task["data"].get("warnings")) is (power_state == "Running")
    await house.clean()
