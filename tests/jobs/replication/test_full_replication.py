"""Full replication: the archive becomes a VM on an SR of another pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.xapi import ownership
from tests.jobs.conftest import JOB, SCHEDULE

from .conftest import MIB, Pair, keys_of, open_pair

REASON = "Start operation for this vm is blocked, clone it if you want to use it."


async def test_a_full_replica_has_every_byte_and_what_xen_orchestra_looks_for(pair: Pair) -> None:
    outcome = await pair.good(mode="full")
    (ref,) = pair.vms()
    vm = pair.vm(ref)
    assert pair.digests(ref) == pair.live()
    date = keys_of(pair.there, "VM", ref)[ownership.DATETIME]
    compact = date.replace(":", "")
    assert vm["name_label"] == f"[XO Backup lab job] vm1 - lab job - ({compact})"
    assert vm["blocked_operations"] == {"start": REASON, "start_on": REASON}
    assert vm["tags"] == ["Disaster Recovery"]
    expected = {
        ownership.SR: pair.sr,
        ownership.DATETIME: date,
        ownership.JOB: JOB,
        ownership.SCHEDULE: SCHEDULE,
        ownership.VM: pair.here.vm_uuid("vm1"),
    }
    (vdi,) = pair.there.vms.disks(ref)
    for found in (keys_of(pair.there, "VM", ref), keys_of(pair.there, "VDI", vdi)):
        assert expected.items() <= found.items()
    assert pair.there.store.get("VDI", vdi)["SR"] == pair.there.srs[1]
    (export,) = outcome.of("export")
    described = {key: export["data"][key] for key in ("id", "isFull", "name_label", "type")}
    assert described == {"id": pair.sr, "isFull": True, "name_label": "Storage 2", "type": "SR"}
    (transfer,) = outcome.of("transfer")
    assert transfer["data"]["result"] == {"size": pair.uploads()[0]}
    await pair.quiet()


@pytest.mark.parametrize("compression", ["native", "zstd"])
async def test_a_compressed_archive_is_imported_as_it_comes(pair: Pair, compression: str) -> None:
    await pair.good(mode="full", compression=compression)
    (ref,) = pair.vms()
    assert pair.digests(ref) == pair.live()


async def test_retention_counts_the_new_replica(pair: Pair) -> None:
    points: list[list[str]] = []
    for number in range(3):
        pair.change(number, number + 1)
        points.append(pair.live())
        await pair.good(mode="full", settings={"copyRetention": 2})
    assert sorted(pair.digests(ref) for ref in pair.vms()) == sorted(points[1:])
    await pair.quiet()


async def test_a_replica_whose_start_was_unblocked_is_kept_and_not_counted(pair: Pair) -> None:
    await pair.good(mode="full", settings={"copyRetention": 1})
    (taken,) = pair.vms()
    pair.there.store.update("VM", taken, blocked_operations={})
    for _ in range(2):
        await pair.good(mode="full", settings={"copyRetention": 1})
    assert taken in pair.vms()
    assert len(pair.vms()) == 2


async def test_a_replica_with_snapshots_of_a_user_is_kept(pair: Pair) -> None:
    await pair.good(mode="full", settings={"copyRetention": 1})
    (old,) = pair.vms()
    pair.there.do("VM.snapshot", old, "mine")
    outcome = await pair.good(mode="full", settings={"copyRetention": 1})
    assert old in pair.vms()
    (export,) = outcome.of("export")
    (warning,) = export["data"]["warnings"]
    assert warning["message"] == "an old replica is kept: somebody uses it"
    assert warning["data"]["reason"] == "it has snapshots"


async def test_delete_first_deletes_first(pair: Pair) -> None:
    await pair.good(mode="full", settings={"copyRetention": 1})
    (old,) = pair.vms()
    gate = pair.there.pause_at("/import", at_bytes=MIB)
    task = pair.start(mode="full", settings={"copyRetention": 1, "deleteFirst": True})
    await gate.reached()
    assert pair.there.store.find("VM", old) is None
    gate.release()
    assert (await pair.house.outcome(task)).status == "success"
    assert len(pair.vms()) == 1


async def test_skip_delete_old_entries(pair: Pair) -> None:
    for _ in range(3):
        await pair.good(mode="full", settings={"copyRetention": 1, "skipDeleteOldEntries": True})
    assert len(pair.vms()) == 3


async def test_weakness_29_a_replica_does_not_keep_the_block_of_its_source(
    tmp_path: Path,
) -> None:
    """Without a snapshot the archive carries what blocks the source during its backup."""
    async with open_pair(tmp_path, running=False) as pair:
        await pair.good(mode="full")
        (ref,) = pair.vms()
        assert set(pair.vm(ref)["blocked_operations"]) == {"start", "start_on"}
        assert pair.vm(ref)["name_label"].startswith("vm1 - lab job - (")


async def test_a_shut_down_source_does_not_leave_its_mark_on_the_replica(pair: Pair) -> None:
    await pair.good(mode="full", settings={"offlineBackup": True})
    (ref,) = pair.vms()
    assert ownership.SHUT_DOWN not in pair.vm(ref)["other_config"]
    await pair.quiet()


async def test_weakness_28_the_snapshots_of_the_source_are_no_replicas(pair: Pair) -> None:
    """The SR may be in the pool of the source."""
    sr = str(pair.here.store.get("SR", pair.here.srs[1])["uuid"])
    settings = {"copyRetention": 1, "snapshotRetention": 2}
    for _ in range(3):
        await pair.good(srs=(sr,), to=pair.here, mode="full", settings=settings)
    mine = [
        ref
        for ref in pair.here.snapshots()
        if pair.here.store.get("VM", ref)["snapshot_of"] == pair.here.vm("vm1")
    ]
    assert len(mine) == 2
    names = [record["name_label"] for _, record in pair.here.store.all("VM")]
    assert sum(" - lab job - (" in name for name in names) == 1


async def test_ha_is_cleared_and_told_by_a_tag(pair: Pair) -> None:
    pair.here.store.update("VM", pair.here.vm("vm1"), ha_restart_priority="restart")
    await pair.good(mode="full")
    (ref,) = pair.vms()
    assert pair.vm(ref)["ha_restart_priority"] == ""
    assert sorted(pair.vm(ref)["tags"]) == ["Disaster Recovery", "HA disabled"]


async def test_a_warm_migration_keeps_ha_and_gets_no_tag(pair: Pair) -> None:
    pair.here.store.update("VM", pair.here.vm("vm1"), ha_restart_priority="restart")
    await pair.good(mode="full", settings={"_warmMigration": True})
    (ref,) = pair.vms()
    assert pair.vm(ref)["ha_restart_priority"] == "restart"
    assert pair.vm(ref)["tags"] == []


async def test_a_remote_and_two_srs_from_one_read(pair: Pair) -> None:
    srs = (pair.sr_uuid(0), pair.sr_uuid(1))
    await pair.good(mode="full", srs=srs, remotes=("remote1",))
    assert len([t for t in pair.here.transfer_log if t.path == "/export"]) == 1
    assert [pair.digests(ref) for ref in pair.vms()] == [pair.live()] * 2
    assert len(pair.house.backups()) == 1
