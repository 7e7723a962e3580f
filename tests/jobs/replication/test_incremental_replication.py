"""Incremental replication: one VM that follows its source, a snapshot of it for each transfer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.simulator import SimulatedPool
from proxy.simulator.disks import DiskContent
from proxy.xapi import ownership
from tests.jobs.conftest import JOB, SCHEDULE
from tests.jobs.test_incremental_backup import disk_records

from .conftest import BLOCK, MIB, Pair, keys_of, open_pair

REASON = "Start operation for this vm is blocked, clone it if you want to use it."


def got(outcome: Any) -> list[str]:
    return [record["got"] for record in disk_records(outcome)]


async def test_the_first_transfer_makes_a_vm_and_a_snapshot_of_it(pair: Pair) -> None:
    outcome = await pair.good()
    (ref,) = pair.vms()
    (snapshot,) = pair.replicas()
    assert pair.digests(ref) == pair.digests(snapshot) == pair.live()
    vm, frozen = pair.vm(ref), pair.vm(snapshot)
    assert vm["name_label"] == "[XO Backup lab job] vm1"
    assert vm["blocked_operations"] == {"start": REASON, "start_on": REASON}
    assert vm["tags"] == ["Continuous Replication"]
    assert frozen["snapshot_of"] == ref
    date = keys_of(pair.there, "VM", snapshot)[ownership.DATETIME]
    compact = date.replace(":", "")
    assert frozen["name_label"] == f"vm1 - lab job / lab schedule {compact}"
    assert vm["name_description"] == (f"simulated VM -- last replication: {compact} 16.8 MB read")
    assert not frozen["is_a_template"]
    assert keys_of(pair.there, "VM", ref) == {ownership.SR: pair.sr}
    (exported,) = [
        pair.here.store.get("VM", each)
        for each in pair.here.snapshots()
        if pair.here.store.get("VM", each)["other_config"][ownership.JOB] == JOB
    ]
    (vdi,) = pair.there.vms.disks(snapshot)
    (source,) = pair.here.vms.disks(next(iter(pair.here.snapshots())))
    source_uuid = pair.here.store.get("VDI", source)["uuid"]
    common = {
        ownership.SR: pair.sr,
        ownership.DATETIME: date,
        ownership.JOB: JOB,
        ownership.SCHEDULE: SCHEDULE,
        ownership.VM: pair.here.vm_uuid("vm1"),
        ownership.INCLUDE_NON_NBD_QCOW2_FIX: "true",
    }
    assert keys_of(pair.there, "VM", snapshot) == {**common, ownership.COPY_OF: exported["uuid"]}
    assert keys_of(pair.there, "VDI", vdi) == {
        **common,
        ownership.COPY_OF: source_uuid,
        ownership.CONTENT_KEY: source_uuid,
    }
    (live_vdi,) = pair.there.vms.disks(ref)
    assert keys_of(pair.there, "VDI", live_vdi) == {ownership.SR: pair.sr}
    assert pair.there.store.get("VDI", live_vdi)["name_label"] == "vm1_0"
    assert pair.there.store.get("VDI", vdi)["name_label"] == "vm1_0"
    (export,) = outcome.of("export")
    described = {key: export["data"][key] for key in ("id", "isFull", "name_label", "type")}
    assert described == {"id": pair.sr, "isFull": True, "name_label": "Storage 2", "type": "SR"}
    (transfer,) = outcome.of("transfer")
    assert transfer["data"]["result"] == {"size": 16 * MIB}
    assert [child["data"]["name"] for child in export["tasks"]] == ["transfer"]
    assert [child["data"]["name"] for child in transfer["tasks"]] == ["target snapshot"]
    assert [each["status"] for each in outcome.of("target snapshot")] == ["success"]
    await pair.quiet()


async def test_the_second_transfer_updates_the_same_vm_with_only_what_changed(pair: Pair) -> None:
    await pair.good()
    (ref,) = pair.vms()
    first, point = pair.replicas(), pair.live()
    mac = pair.there.store.get("VIF", pair.vm(ref)["VIFs"][0])["MAC"]
    pair.change(3, 9)
    before = len(pair.uploads())
    outcome = await pair.good()
    assert got(outcome) == ["delta"]
    assert pair.vms() == [ref]
    (sent,) = pair.uploads()[before:]
    assert BLOCK < sent < BLOCK + 64 * 1024
    assert pair.digests(ref) == pair.live()
    old, new = pair.replicas()
    assert [old] == first
    assert (pair.digests(old), pair.digests(new)) == (point, pair.live())
    assert pair.there.store.get("VIF", pair.vm(ref)["VIFs"][0])["MAC"] == mac
    (export,) = outcome.of("export")
    assert export["data"]["isFull"] is False
    (transfer,) = outcome.of("transfer")
    assert transfer["data"]["result"] == {"size": BLOCK}
    assert keys_of(pair.there, "VM", ref) == {ownership.SR: pair.sr}
    # nothing is left of the disks that the VM had before
    assert len([1 for _, vdi in pair.there.store.all("VDI") if vdi["managed"]]) == 3
    await pair.quiet()


async def test_nothing_changed_nothing_sent(pair: Pair) -> None:
    await pair.good()
    before = len(pair.uploads())
    outcome = await pair.good()
    assert len(pair.uploads()) == before
    assert got(outcome) == ["delta"]
    assert [pair.digests(ref) for ref in pair.replicas()] == [pair.live()] * 2


async def test_every_replica_of_many_is_its_point_in_time_and_retention_counts_them(
    pair: Pair,
) -> None:
    points: list[list[str]] = []
    for number in range(4):
        pair.change(number, number + 1)
        points.append(pair.live())
        outcome = await pair.good(settings={"copyRetention": 2})
        assert got(outcome) == ["full" if number == 0 else "delta"]
    assert [pair.digests(ref) for ref in pair.replicas()] == points[-2:]
    assert len(pair.vms()) == 1
    await pair.quiet()


@pytest.mark.parametrize("delete_first", [False, True])
async def test_weakness_5_delete_first_works_and_never_deletes_the_base(
    pair: Pair, delete_first: bool
) -> None:
    for number in range(2):
        pair.change(number, number + 1)
        await pair.good(settings={"copyRetention": 2})
    oldest, base = pair.replicas()
    pair.change(5, 5)
    gate = pair.there.pause_at("/import_raw_vdi", at_bytes=MIB)
    task = pair.start(settings={"copyRetention": 1, "deleteFirst": delete_first})
    await gate.reached()
    assert pair.replicas() == ([base] if delete_first else [oldest, base])
    gate.release()
    outcome = await pair.house.outcome(task)
    assert outcome.status == "success", outcome.snapshot
    assert got(outcome) == ["delta"]
    (only,) = pair.replicas()
    assert pair.digests(only) == pair.live()


async def test_a_key_transfer_updates_the_same_vm(pair: Pair) -> None:
    await pair.good()
    (ref,) = pair.vms()
    pair.change(1, 1)
    outcome = await pair.good(settings={"fullInterval": 1})
    assert (got(outcome), pair.vms()) == (["full"], [ref])
    assert pair.digests(ref) == pair.live()
    pair.change(2, 2)
    outcome = await pair.good()
    assert (got(outcome), pair.vms()) == (["delta"], [ref])


async def test_a_lost_base_makes_a_whole_transfer_to_the_same_vm(pair: Pair) -> None:
    await pair.good()
    (ref,) = pair.vms()
    for snapshot in pair.here.snapshots():
        for vdi in pair.here.vms.disks(snapshot):
            pair.here.disks.forget(vdi)
        pair.here.vms.destroy(snapshot)
    outcome = await pair.good()
    assert (got(outcome), pair.vms()) == (["full"], [ref])
    assert [pair.digests(each) for each in pair.replicas()] == [pair.live()] * 2


async def test_schedules_share_the_vm_and_count_for_themselves(pair: Pair) -> None:
    for number in range(2):
        for name in ("daily", "weekly"):
            pair.change(number, number + 1)
            request = pair.request(settings={"copyRetention": 2 - number})
            schedule = {"id": name, "name": name}
            request = replace(request, schedule=schedule)
            settings = {**request.job["settings"], name: request.job["settings"][SCHEDULE]}
            request = replace(request, job={**request.job, "settings": settings})
            outcome = await pair.house.run(request)
            assert outcome.status == "success", outcome.snapshot
            assert got(outcome) == ["full" if (number, name) == (0, "daily") else "delta"]
    assert len(pair.vms()) == 1
    schedules = [keys_of(pair.there, "VM", ref)[ownership.SCHEDULE] for ref in pair.replicas()]
    assert schedules == ["daily", "weekly"]


# -- what users do with replicas ------------------------------------------------------------


async def test_a_replica_that_was_written_to_is_kept_and_a_new_one_is_made_as_a_delta(
    pair: Pair,
) -> None:
    await pair.good()
    (taken,) = pair.vms()
    (uuid,) = pair.there.disk_uuids(taken)
    pair.there.write(uuid, 0, b"the user was here")
    written = pair.there.digest(uuid)
    for number in range(2):
        pair.change(number, number + 1)
        outcome = await pair.good(settings={"copyRetention": 1})
        assert got(outcome) == ["delta"]
    assert len(pair.vms()) == 2
    assert pair.there.digest(uuid) == written
    (new,) = [ref for ref in pair.vms() if ref != taken]
    assert pair.digests(new) == pair.live()
    assert [pair.digests(ref) for ref in pair.replicas()] == [pair.live()]


@pytest.mark.parametrize("how", ["unblocked", "running", "a new disk"])
async def test_a_replica_that_a_user_took_over_is_never_touched(pair: Pair, how: str) -> None:
    await pair.good()
    (taken,) = pair.vms()
    if how == "a new disk":
        vdi = pair.there.disks.create(DiskContent(BLOCK), SR=pair.there.srs[1], name_label="mine")
        pair.there.store.create("VBD", VM=taken, VDI=vdi, device="xvdb", userdevice="1")
    else:
        pair.there.store.update("VM", taken, blocked_operations={})
    if how == "running":
        pair.there.vms.start(taken)
        pair.there.store.update("VM", taken, blocked_operations={"start": "again"})
    before = pair.vm(taken)["VBDs"], pair.digests(taken)
    pair.change(1, 1)
    outcome = await pair.good(settings={"copyRetention": 1})
    (transfer,) = outcome.of("transfer")
    (export,) = outcome.of("export")
    assert [info["message"] for info in export["data"]["infos"]] == ["a new replica is made"]
    assert got(outcome) == ["delta"]
    assert len(pair.vms()) == 2
    assert (pair.vm(taken)["VBDs"], pair.digests(taken)) == before
    await pair.good(settings={"copyRetention": 1})
    assert len(pair.vms()) == 2
    assert transfer["status"] == "success"


async def test_a_replica_taken_over_during_the_transfer_is_not_updated(pair: Pair) -> None:
    await pair.good()
    (taken,) = pair.vms()
    point = pair.digests(taken)
    pair.change(1, 1)
    gate = pair.there.pause_at("/import_raw_vdi", at_bytes=MIB)
    task = pair.start()
    await gate.reached()
    pair.there.store.update("VM", taken, blocked_operations={})
    gate.release()
    outcome = await pair.house.outcome(task)
    assert outcome.status == "success", outcome.snapshot
    assert pair.digests(taken) == point
    assert len(pair.vms()) == 2
    await pair.quiet()


async def test_a_clone_of_a_replica_is_nobody_of_ours(pair: Pair) -> None:
    await pair.good()
    (ref,) = pair.vms()
    clone = pair.there.do("VM.clone", ref, "mine")
    for number in range(2):
        pair.change(number, number + 1)
        await pair.good(settings={"copyRetention": 1})
    assert set(pair.vms()) == {ref, clone}
    assert len(pair.replicas()) == 1


# -- devices ----------------------------------------------------------------------------------


async def test_disks_come_and_go_and_grow(tmp_path: Path) -> None:
    async with open_pair(tmp_path, disks_per_vm=2, disk_size=8 * MIB) as pair:
        await pair.good()
        (ref,) = pair.vms()
        vm = pair.here.vm("vm1")
        first, second = pair.here.disk_uuids(vm)
        pair.here.grow(first, 12 * MIB)
        pair.here.write(first, 11 * MIB, b"beyond the former end")
        outcome = await pair.good(settings={"copyRetention": 10})
        assert (got(outcome), pair.vms()) == (["delta", "delta"], [ref])
        assert pair.digests(ref) == pair.live()
        # one goes, another comes
        vdi = pair.here.store.by_uuid("VDI", second)
        for vbd in pair.here.store.get("VDI", vdi)["VBDs"]:
            pair.here.store.destroy("VBD", vbd)
        new = pair.here.disks.create(
            DiskContent(4 * MIB, kind="random", seed=5),
            SR=pair.here.default_sr,
            name_label="vm1_new",
        )
        pair.here.store.create("VBD", VM=vm, VDI=new, device="xvdf", userdevice="5")
        outcome = await pair.good(settings={"copyRetention": 10})
        assert (sorted(got(outcome)), pair.vms()) == (["delta", "full"], [ref])
        assert pair.digests(ref) == pair.live()
        places = [
            pair.there.store.get("VBD", vbd)["userdevice"]
            for vbd in pair.vm(ref)["VBDs"]
            if pair.there.store.get("VBD", vbd)["type"] == "Disk"
        ]
        assert sorted(places) == ["0", "5"]
        await pair.quiet()


async def test_the_replica_follows_the_fields_of_its_source(pair: Pair) -> None:
    here = pair.here
    vm = here.vm("vm1")
    await pair.good()
    (ref,) = pair.vms()
    here.store.update(
        "VM",
        vm,
        name_description="new words",
        VCPUs_max=8,
        VCPUs_at_startup=4,
        memory_static_max=2048 * MIB,
        memory_dynamic_max=2048 * MIB,
        memory_dynamic_min=2048 * MIB,
        HVM_shadow_multiplier=1.5,
        tags=["web"],
    )
    await pair.good()
    found = pair.vm(ref)
    assert found["name_description"].startswith("new words -- last replication: ")
    assert (found["VCPUs_max"], found["VCPUs_at_startup"]) == (8, 4)
    assert found["memory_static_max"] == found["memory_dynamic_min"] == 2048 * MIB
    assert found["HVM_shadow_multiplier"] == 1.5
    assert found["tags"] == ["web", "Continuous Replication"]
    here.store.update("VM", vm, VCPUs_max=2, VCPUs_at_startup=2)
    await pair.good()
    assert (pair.vm(ref)["VCPUs_max"], pair.vm(ref)["VCPUs_at_startup"]) == (2, 2)
    assert pair.vm(ref)["name_description"].count("last replication") == 1


async def test_a_tpm_is_replicated_each_time(pair: Pair) -> None:
    tpm = pair.here.store.create("VTPM", VM=pair.here.vm("vm1"), is_unique=False)
    for content in ("first", "second"):
        pair.here.vtpm_contents[tpm] = content
        await pair.good()
        (ref,) = pair.vms()
        (replica,) = pair.vm(ref)["VTPMs"]
        assert pair.there.vtpm_contents[replica] == content


async def test_memory_is_replicated_to_a_new_vm_each_time(pair: Pair) -> None:
    """A VM becomes suspended only by being made so."""
    for number in range(3):
        pair.change(number, number + 1)
        await pair.good(settings={"copyRetention": 2, "checkpointSnapshot": True})
    found = [pair.vm(ref) for ref in pair.vms()]
    assert [vm["power_state"] for vm in found] == ["Suspended"] * 2
    memory = [pair.there.store.get("VDI", vm["suspend_VDI"]) for vm in found]
    assert {vdi["type"] for vdi in memory} == {"suspend"}
    assert len(pair.replicas()) == 2
    assert pair.digests(pair.vms()[-1]) == pair.live()
    assert pair.there.disks.contents.keys() >= {vm["suspend_VDI"] for vm in found}
    await pair.quiet()


async def test_ha_is_cleared_and_told_by_a_tag(pair: Pair) -> None:
    pair.here.store.update("VM", pair.here.vm("vm1"), ha_restart_priority="restart")
    for _ in range(2):
        await pair.good()
        (ref,) = pair.vms()
        assert pair.vm(ref)["ha_restart_priority"] == ""
        assert pair.vm(ref)["tags"] == ["Continuous Replication", "HA disabled"]


async def test_a_warm_migration_keeps_ha_and_gets_no_tag(pair: Pair) -> None:
    pair.here.store.update("VM", pair.here.vm("vm1"), ha_restart_priority="restart")
    for _ in range(2):
        await pair.good(settings={"_warmMigration": True})
        (ref,) = pair.vms()
        assert (pair.vm(ref)["ha_restart_priority"], pair.vm(ref)["tags"]) == ("restart", [])


async def test_changed_block_tracking_tells_that_a_replica_is_untouched(pair: Pair) -> None:
    await pair.good()
    (ref,) = pair.vms()
    for vdi in [*pair.there.vms.disks(ref), *pair.there.vms.disks(pair.replicas()[0])]:
        pair.there.store.update("VDI", vdi, cbt_enabled=True)
    await pair.good()
    assert pair.vms() == [ref]
    assert not [t for t in pair.there.transfer_log if t.path == "/export_raw_vdi"]


# -- bases ------------------------------------------------------------------------------------


OTHER_JOB = "99999999-9999-4999-8999-999999999999"


async def test_content_that_another_job_brought_is_a_base(pair: Pair) -> None:
    await pair.good(id=OTHER_JOB)
    pair.change(4, 4)
    outcome = await pair.good()
    assert got(outcome) == ["delta"]
    assert pair.digests(pair.replicas()[-1]) == pair.live()


async def test_content_of_another_job_is_no_base_beside_other_targets(pair: Pair) -> None:
    await pair.good(id=OTHER_JOB)
    outcome = await pair.good(remotes=("remote1",))
    assert got(outcome) == ["full"]


async def test_a_source_is_never_based_on_its_own_snapshot(pair: Pair) -> None:
    """The SR is the source's own: its snapshots have the very content that is looked for."""
    sr = str(pair.here.store.get("SR", pair.here.default_sr)["uuid"])
    await pair.house.run(pair.house.request(mode="delta", id=OTHER_JOB))
    outcome = await pair.good(srs=(sr,), to=pair.here)
    assert got(outcome) == ["full"]


async def test_replication_within_one_pool(pair: Pair) -> None:
    sr = str(pair.here.store.get("SR", pair.here.srs[1])["uuid"])
    for number in range(3):
        pair.change(number, number + 1)
        outcome = await pair.good(srs=(sr,), to=pair.here, settings={"snapshotRetention": 2})
        assert got(outcome) == ["full" if number == 0 else "delta"]
    replica = pair.here.vm("[XO Backup lab job] vm1")
    assert [pair.here.digest(uuid) for uuid in pair.here.disk_uuids(replica)] == pair.live()
    assert len(pair.here.store.get("VM", replica)["snapshots"]) == 2
    assert len(pair.here.store.get("VM", pair.here.vm("vm1"))["snapshots"]) == 2


async def test_a_replica_of_the_old_model_is_a_base(pair: Pair) -> None:
    """Before, each transfer made a VM: its disks are copied, and it is deleted when too old."""
    await pair.good()
    (ref,) = pair.vms()
    (snapshot,) = pair.replicas()
    keys = keys_of(pair.there, "VM", snapshot)
    (frozen,) = pair.there.vms.disks(snapshot)
    disk_keys = keys_of(pair.there, "VDI", frozen)
    pair.there.disks.forget(frozen)
    pair.there.vms.destroy(snapshot)
    (vdi,) = pair.there.vms.disks(ref)
    pair.there.store.update("VM", ref, other_config=keys)
    pair.there.store.update("VDI", vdi, other_config=disk_keys)
    pair.change(2, 2)
    outcome = await pair.good(settings={"copyRetention": 1})
    assert got(outcome) == ["delta"]
    (new,) = pair.vms()
    assert new != ref
    assert pair.digests(new) == pair.live()


async def test_an_unreadable_sr_is_told_as_the_reason_of_a_full(pair: Pair) -> None:
    await pair.good()
    pair.there.fail("VDI.get_all_records_where", error=("SR_BACKEND_FAILURE_40", "no"))
    outcome = await pair.good()
    assert got(outcome) == ["full"]
    (record,) = disk_records(outcome)
    assert record["reason"] == "UNREADABLE_SR"
    assert record["evidence"]["target"] == pair.sr


@pytest.mark.parametrize("data", [True, False])
async def test_a_suspect_replica_of_a_qcow2_disk_forces_a_full(tmp_path: Path, data: bool) -> None:
    kind = "random" if data else None
    async with open_pair(tmp_path, kind=kind) as pair:
        pair.here.enable_nbd()
        pair.change(0, 1)
        await pair.good(settings={"preferNbd": True})
        (snapshot,) = pair.replicas()
        (vdi,) = pair.there.vms.disks(snapshot)
        config = dict(pair.there.store.get("VDI", vdi)["other_config"])
        del config[ownership.INCLUDE_NON_NBD_QCOW2_FIX]
        pair.there.store.update("VDI", vdi, other_config=config)
        pair.change(3, 3)
        outcome = await pair.good(settings={"preferNbd": True})
        (vm,) = outcome.of("backup VM")
        told = [warning["message"] for warning in vm["data"].get("warnings", [])]
        suspect = "forcing a full: replicated qcow2 chain predates the non-NBD qcow2 fix"
        assert got(outcome) == (["delta"] if data else ["full"])
        assert any(message.startswith(suspect) for message in told) is not data
        assert pair.digests(pair.replicas()[-1]) == pair.live()


async def test_parts_of_blocks_without_a_readable_base_become_a_full(tmp_path: Path) -> None:
    """A qcow2 delta brings clusters that are smaller than blocks; the rest is on an SR only."""
    async with open_pair(tmp_path, disk_size=8 * MIB) as pair:
        (vdi,) = pair.here.vms.disks(pair.here.vm("vm1"))
        pair.here.store.update("VDI", vdi, sm_config={"image-format": "qcow2"})
        await pair.good()
        pair.change(2, 2)
        outcome = await pair.good()
        assert pair.digests(pair.vms()[0]) == pair.live()
        assert [pair.digests(ref) for ref in pair.replicas()][-1] == pair.live()
        assert got(outcome) == ["full"]


async def test_a_small_pool_of_its_own_seed_has_other_references() -> None:
    """What one pool's references mean on another must never be by chance the right thing."""
    assert SimulatedPool(seed=77).srs[0] != SimulatedPool(seed=0).srs[0]
